"""GGUF files: the weights, logits and tokens of transformers' own reader."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, get_peft_model
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.cli import main
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load import gguf_files
from qeff_proxy.load.first_layers import all_layers
from qeff_proxy.load.load_model import load_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[5, 9, 40, 77, 3, 61, 22, 8, 15, 90, 31]])
MIXED = (Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.BF16, Type.Q5_K, Type.Q6_K)
#: Model type, and what its file is said to be of.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
BYTES = 256


def blocks(kind: Type, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Blocks of random codes whose scales are small: package gguf writes no K-quants.

    Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.float16(0.0005).tobytes()
    at = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (size - 2,)}[kind]
    for start in at:
        data[..., start : start + 2] = np.frombuffer(scale, np.uint8)
    return data.reshape(*shape[:-1], -1)


def to_ggml(name: str, weight: torch.Tensor, config: Any, architecture: str) -> np.ndarray:
    """A weight as llama.cpp's ``convert_hf_to_gguf.py`` writes it."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if architecture.startswith("gemma") and "norm.weight" in name:
        weight = weight + 1
    return weight.contiguous().float().numpy()


def write_file(
    path: Path, model: Any, architecture: str, types: Iterator[Type], **split: Any
) -> Path:
    """Write a model with a tokenizer of bytes; matrices are of the ``types`` in turn."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, **split)
    writer.add_name(f"Tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    if config.vocab_size == BYTES + 2:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*sorted(ByteLevel.alphabet()), "th", "the"])
        writer.add_token_types([1] * (BYTES + 2))
        writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture),
        config.num_hidden_layers,
    )
    generator = np.random.default_rng(0)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = to_ggml(name, weight, config, architecture)
        kind = next(types) if array.ndim > 1 else Type.F32
        if kind in {Type.Q4_K, Type.Q5_K, Type.Q6_K}:
            data = blocks(kind, array.shape, generator)
        else:
            data = gguf.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def files(
    request: pytest.FixtureRequest, make_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path]:
    """A model, its file in float32, and one of all types that are read."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"vocab_size": BYTES + 2, "hidden_size": 256, "intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    if request.param == "mistral":
        heads["sliding_window"] = None  # its files say that they are of another architecture
    if request.param == "phi3":
        sizes["vocab_size"] = 32064  # transformers does not read the id of its padding
    if request.param == "qwen3":
        heads |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    if request.param == "gemma3_text":
        heads |= {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    model = make_model(request.param, layers=6, **sizes, **heads)
    architecture = ARCHITECTURES[request.param]
    plain = write_file(folder / "plain.gguf", model, architecture, cycle([Type.F32]))
    return model, plain, write_file(folder / "mixed.gguf", model, architecture, cycle(MIXED))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def read_by_transformers(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    ).eval()


def test_the_weights_are_those_of_transformers(files: tuple[Any, Path, Path]) -> None:
    source, plain, mixed = files
    model = load_model(str(plain)).model
    assert (logits_of(model) - logits_of(source)).abs().max() < 1e-5
    oracle = read_by_transformers(mixed)
    expected = dict(oracle.named_parameters())
    loaded = load_model(str(mixed))
    assert loaded.sample is not None
    model = loaded.sample(all_layers).model
    assert type(model) is type(oracle)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, weight in parameters.items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(logits_of(model), logits_of(oracle))


@pytest.fixture(scope="module")
def llama(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all types, alone in its folder."""
    sizes = {"vocab_size": BYTES + 2, "hidden_size": 256, "intermediate_size": 256}
    model = make_model("llama", layers=5, num_attention_heads=8, head_dim=32, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    return write_file(folder / "tiny.gguf", model, "llama", cycle(MIXED))


def test_export_streams_the_file_and_generates_the_tokens_of_transformers(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    face = QEFFAutoModelForCausalLM.from_pretrained(llama, proxy="split")
    folder = face.export()
    weights = json.loads((folder / "export.json").read_text())["cut"]["weights"]
    assert weights.startswith("streamed from the checkpoint; ")
    oracle = read_by_transformers(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name)
    ids = tokenizer("the thing", return_tensors="pt").input_ids
    expected = oracle.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = expected[0, ids.shape[1] :]
    result = face.generate("the thing", max_new_tokens=12, do_sample=False)
    assert result.generated_ids[0].tolist() == expected.tolist()
    command = ["generate", str(llama.parent), "the thing", "--max-new-tokens", "12"]
    assert main([*command, "--json", "--output", str(folder)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["generated_ids"] == [expected.tolist()]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_an_adapter_is_merged_into_dequantized_weights(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], r=4)
    model = get_peft_model(read_by_transformers(llama), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.peft_config["default"].base_model_name_or_path = llama.name
    model.save_pretrained(tmp_path)
    expected = dict(model.merge_and_unload().named_parameters())
    loaded = load_model(str(llama), adapters=[tmp_path])
    assert loaded.sample is not None
    for name, weight in loaded.sample(all_layers).model.named_parameters():
        assert (weight - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def test_two_files_in_a_folder_are_named(llama: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(llama, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        load_model(str(tmp_path))


def test_a_file_named_as_transformers_has_it(llama: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(llama, tmp_path / name)
    face = QEFFAutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="two.gguf")
    assert torch.equal(logits_of(face.model), logits_of(read_by_transformers(llama)))
    with pytest.raises(CheckpointError, match=r"holds no file 'three\.gguf'"):
        QEFFAutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="three.gguf")
    with pytest.raises(CheckpointError, match=r"hub does not give 'a\.gguf' of 'no/such'"):
        QEFFAutoModelForCausalLM.from_pretrained("no/such", gguf_file="a.gguf")


def test_a_changed_file_is_another_model(llama: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(llama, tmp_path))
    before = load_model(str(file))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="have changed since the model was loaded"):
        before.check_unchanged()
    assert load_model(str(file)).identity != before.identity


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [(0, 100, "is damaged"), (0, -5000, "is damaged"), (8, None, "is damaged: GGUF magic")],
)
def test_a_damaged_file_is_named(
    start: int, stop: int | None, message: str, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(llama.read_bytes()[start:stop])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))} {message}"):
        load_model(str(file))


def test_what_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    def write(name: str, architecture: str, **values: int) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in values.items():
            writer.add_uint16(key.replace("_", "."), value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    with pytest.raises(CheckpointError, match=r"new\.gguf cannot be read by transformers .*novel"):
        load_model(str(write("new.gguf", "novel")))
    with pytest.raises(CheckpointError, match=r"piece\.gguf is one of 3 pieces .* by another name"):
        load_model(str(write("piece.gguf", "llama", split_count=3)))


@pytest.mark.parametrize("empty", [False, True])  # the first piece with metadata only
def test_a_model_in_pieces_is_that_of_one_file(
    empty: bool, make_model: Any, tmp_path: Path
) -> None:
    sizes = {"vocab_size": BYTES + 2, "hidden_size": 256, "intermediate_size": 256}
    model = make_model("llama", layers=2, num_attention_heads=8, head_dim=32, **sizes)
    whole = write_file(tmp_path / "whole.gguf", model, "llama", cycle(MIXED))
    split = {"split_max_tensors": 8, "small_first_shard": empty}
    folder = tmp_path / "pieces"
    folder.mkdir()
    write_file(folder / "m.gguf", model, "llama", cycle(MIXED), **split)
    pieces = sorted(folder.iterdir())
    assert len(pieces) > 2
    assert not model.config.tie_word_embeddings
    expected = dict(load_model(str(whole)).model.named_parameters())
    for named in (folder, pieces[0], pieces[-1]):
        read = load_model(str(named))
        assert read.sample is not None
        for name, weight in read.sample(all_layers).model.named_parameters():
            assert torch.equal(weight, expected[name]), name
    pieces[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match="have changed since the model was loaded"):
        read.check_unchanged()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(pieces[1]))} is missing"):
        load_model(str(pieces[0]))


def test_without_package_gguf_it_is_asked_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        gguf_files.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(CheckpointError, match=r"pip install 'qeff-proxy\[gguf\]'"):
        load_model(str(llama))


def test_a_file_that_is_not_read_tensor_by_tensor_is_loaded_whole(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "find", lambda _: None)  # as where a release renames its reader
    loaded = load_model(str(llama))
    assert not loaded.weights
    assert torch.equal(logits_of(loaded.model), logits_of(read_by_transformers(llama)))


def test_factors_of_positions_that_are_not_read_are_named(
    llama: Path, tmp_path: Path, make_model: Any
) -> None:
    path = tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    reader = gguf.GGUFReader(llama)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    writer.add_string("llama.rope.scaling.type", "yarn")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match=r"llama\.rope\.scaling\.type, rope_freqs\.weight, which"):
        load_model(str(path))
