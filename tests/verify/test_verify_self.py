"""``verify --self``: a backend must agree with itself, however an input is arranged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy.arrays import Array
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.cli import main
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.request import Request
from qeff_proxy.session.session import Session
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify import VerifyOptions
from qeff_proxy.verify.self_check import verify_self
from qeff_proxy.verify.self_check.arrangements import first_row
from transformers import BertConfig, BertModel, WhisperConfig, WhisperForConditionalGeneration

pytestmark = pytest.mark.one_home

IDS = np.arange(3, 20)[None] * 7 % 97
REQUEST = Request(inputs={"input_ids": IDS})
OPTIONS = VerifyOptions(max_new_tokens=4)
PADDED = ["with 5 positions of padding", "with 61 positions of padding"]
CHUNKED = ["in chunks of 3", "token by token"]


class Faulty(Session):
    """A session of ONNX Runtime's whose inputs a fault changes."""

    def __init__(self, session: Session, fault: Any) -> None:
        super().__init__(session.part)
        self._session = session
        self._fault = fault

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        return self._session.run(self._fault({n: a.copy() for n, a in feeds.items()}, sizes))

    def release(self) -> None:
        self._session.close()


@pytest.fixture
def with_fault(monkeypatch) -> Any:
    """Give the body of the onnxruntime backend a fault."""
    original = OnnxRuntimeBackend.open

    def set_fault(fault: Any) -> None:
        def opened(self: Any, export: Any, part: Any, options: Any, folder: Path) -> Session:
            session = original(self, export, part, options, folder)
            return Faulty(session, fault) if part.name == "body" else session

        monkeypatch.setattr(OnnxRuntimeBackend, "open", opened)

    return set_fault


@pytest.fixture(scope="module")
def llama(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    make_model("llama", layers=6).save_pretrained(folder)
    return folder


def agreement(folder: Path, request: Request | None = REQUEST, **more: Any) -> dict[str, Any]:
    """Arrangement → result of the onnxruntime backend."""
    (backend,) = verify_self(str(folder), request=request, options=OPTIONS, **more).results
    assert backend.error is None, backend.error
    return {one.name: one for one in backend.arrangements}


def failed(results: Mapping[str, Any]) -> dict[str, str]:
    return {name: one.first for name, one in results.items() if not one.passed}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_healthy_decoder_agrees_with_itself(name, make_model, tmp_path):
    make_model(name, layers=6).save_pretrained(tmp_path / name)  # Gemma 2 has sliding windows
    results = agreement(tmp_path / name)
    assert list(results) == ["once more", "in a batch", *PADDED, *CHUNKED]
    assert all(one.passed for one in results.values()), results
    assert all(one.error.over_peak < 1e-5 for one in results.values())
    assert any(one.error.over_peak > 0 for one in results.values())  # they are other computations


def test_a_healthy_encoder_agrees_with_itself(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=131, num_hidden_layers=5, max_position_embeddings=64)
    random_weights(BertModel(config).eval(), 0).save_pretrained(tmp_path / "bert")
    results = agreement(tmp_path / "bert")
    # 17 + 61 positions are more than the model has.
    assert list(results) == ["once more", "in a batch", PADDED[0]]
    assert all(one.passed for one in results.values()), results


def test_an_encoder_that_sees_its_padding_does_not(tmp_path, with_fault):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=131, num_hidden_layers=5, max_position_embeddings=128)
    random_weights(BertModel(config).eval(), 0).save_pretrained(tmp_path / "bert")
    with_fault(lambda feeds, _: {**feeds, "attention_mask": feeds["attention_mask"] * 0})
    assert failed(agreement(tmp_path / "bert")) == dict.fromkeys(
        ["in a batch", *PADDED], "body layer 0"
    )


def test_a_whisper_agrees_with_itself(tmp_path):
    sizes = {"encoder_layers": 5, "decoder_layers": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        **sizes, **heads, **tokens, vocab_size=131, d_model=32, max_source_positions=40
    )
    model = random_weights(WhisperForConditionalGeneration(config).eval(), 0)
    model.save_pretrained(tmp_path / "whisper")
    results = agreement(tmp_path / "whisper", None)
    assert list(results) == ["once more", "in a batch"]
    assert all(one.passed for one in results.values()), results


def test_padding_that_is_seen_shows_where_there_is_padding(llama, with_fault):
    def fault(feeds: dict[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        mask = feeds["attention_mask"]
        mask[mask[..., -1:, :].repeat(mask.shape[2], 2) < 0] = 0  # hidden from the last query
        return feeds

    with_fault(fault)
    assert failed(agreement(llama)) == dict.fromkeys(["in a batch", *PADDED], "body layer 0")


def test_a_stale_row_of_one_layers_cache_shows_in_that_layer(llama, with_fault):
    def fault(feeds: dict[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        if sizes["past"] and sizes["past"] < IDS.shape[1]:  # in a prefill of several chunks
            feeds["past_key_values.3.key"][:, :, 0] = feeds["past_key_values.3.key"][:, :, -1]
        return feeds

    with_fault(fault)
    assert failed(agreement(llama)) == dict.fromkeys(CHUNKED, "body layer 3")


def test_rows_that_depend_on_each_other_show_in_a_batch(llama, with_fault):
    def fault(feeds: dict[str, Array], _: Mapping[str, int]) -> dict[str, Array]:
        feeds["inputs_embeds"] += 0.01 * feeds["inputs_embeds"].mean(0)
        feeds["inputs_embeds"][:1] *= 1 + 0.1 * (len(feeds["inputs_embeds"]) > 1)
        return feeds

    with_fault(fault)
    assert list(failed(agreement(llama))) == ["in a batch"]


def test_a_backend_that_is_not_deterministic(llama, with_fault):
    random = np.random.default_rng(0)

    def fault(feeds: dict[str, Array], _: Mapping[str, int]) -> dict[str, Array]:
        return {**feeds, "inputs_embeds": feeds["inputs_embeds"] * np.float32(random.random())}

    with_fault(fault)
    results = agreement(llama)
    assert not any(one.passed for one in results.values())


def test_one_arrangement_that_fails_does_not_stop_the_others(llama, with_fault, capsys):
    def fault(feeds: dict[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        if sizes["batch"] > 1:
            raise BackendError("only one row fits")
        return feeds

    with_fault(fault)
    command = ["verify", str(llama), "--self", "--ids", "5,6,7,8,9", "--max-new-tokens", "2"]
    assert main([*command, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    (backend,) = shown["backends"]
    failures = {one["arrangement"]: one["failure"] for one in backend["arrangements"]}
    assert failures.pop("in a batch") == "only one row fits"
    assert set(failures.values()) == {None}
    assert main([*command, "--debug"]) == 1
    said = capsys.readouterr()
    assert "onnxruntime: in a batch: only one row fits" in said.out
    assert "in fault\n    raise BackendError" in said.err  # the traceback


def test_what_cannot_be_checked_is_refused(llama, capsys):
    with pytest.raises(UsageError, match="2 rows"):
        agreement(llama, Request(inputs={"input_ids": np.repeat(IDS, 2, 0)}))
    assert main(["verify", str(llama), "--self", "--speed"]) == 2
    assert "--speed and --self exclude each other" in capsys.readouterr().err
    assert main(["verify", str(llama), "--self", "--by-layer"]) == 2
    assert "--self and --by-layer exclude each other" in capsys.readouterr().err


def test_the_examples_first_row_without_padding_is_taken():
    ids = torch.tensor([[0, 0, 5], [6, 7, 8]])
    tensors = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": ids * 2.0}
    assert first_row(tensors)["pixel_values"].tolist() == [[12.0, 14.0, 16.0]]
    patches = {**tensors, "pixel_values": torch.zeros(9, 4)}  # no rows of the batch
    assert first_row(patches) is patches


def test_an_output_that_a_session_forgets_is_named(llama, monkeypatch):
    original = OnnxRuntimeBackend.open

    def opened(self: Any, export: Any, part: Any, options: Any, folder: Path) -> Session:
        session = original(self, export, part, options, folder)
        compute = session.compute
        session.compute = lambda *arguments: {
            name: array for name, array in compute(*arguments).items() if name != "present.2.key"
        }
        return session

    monkeypatch.setattr(OnnxRuntimeBackend, "open", opened)
    options = VerifyOptions(max_new_tokens=2, backends={"onnxruntime": {"in_place": False}})
    (result,) = verify_self(str(llama), request=REQUEST, options=options).results
    assert "the session of the body part gave no present.2.key" in result.error
