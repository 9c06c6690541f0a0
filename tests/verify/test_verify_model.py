"""One command: export, compile for each backend, run the same input, compare with PyTorch."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.hashes import hash_weights_file
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.backends.torch.backend import TorchBackend
from qeff_proxy.cli import main
from qeff_proxy.compare import Tolerances
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import ArtifactError, BackendError, UsageError
from qeff_proxy.load.load_model import load_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.request import Request
from qeff_proxy.run.example_request import DEFAULT_PROMPT
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model

pytestmark = pytest.mark.one_home

PROMPT = "Anna went to the market"
SHORT = VerifyOptions(max_new_tokens=4)


class ChangedSession:
    """A session whose outputs are changed."""

    def __init__(self, session: Any, change: Callable[[dict[str, Any]], None]) -> None:
        self.session = session
        self.change = change

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        outputs = {name: np.array(value) for name, value in self.session.run(feeds).items()}
        self.change(outputs)
        return outputs

    def close(self) -> None:
        self.session.close()


@pytest.fixture
def backend_that(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a backend that does something to what PyTorch gives; gives its name."""

    def register(change: Callable[[dict[str, Any]], None], name: str = "strange") -> str:
        class Strange(TorchBackend):
            def open(self, *args: Any) -> Any:
                return ChangedSession(super().open(*args), change)

        module = ModuleType(f"{name}_backend")
        module.Strange = Strange  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(BUILTIN_BACKENDS, name, f"{module.__name__}:Strange")
        return name

    return register


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """Where the trained checkpoint is exported to with taps; made by the first who asks."""
    return tmp_path_factory.mktemp("tapped") / "export"


@pytest.fixture(scope="module")
def first_run(
    tapped: Path, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The command as people run it, from a checkpoint, with a backend that is not there."""
    import contextlib
    import io

    report = tmp_path_factory.mktemp("report") / "report.html"
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        code = main(
            [
                *("verify", str(demo_checkpoint), "--output", str(tapped), "--prompt", PROMPT),
                *("--backend", "nonesuch", "--backend", "onnxruntime", "--num-cores", "1"),
                *("--max-new-tokens", "4", "--html", str(report)),
            ]
        )
    return {
        "code": code,
        "out": " ".join(said.getvalue().split()),
        "err": told.getvalue(),
        "report": report,
    }


def test_a_missing_backend_stands_in_its_row_and_the_others_go_on(
    first_run: dict[str, Any],
) -> None:
    assert first_run["code"] == 1
    assert first_run["err"] == ""
    out = first_run["out"]
    assert "nonesuch ERROR" in out
    assert "nonesuch: ERROR: there is no backend 'nonesuch'. Known are" in out
    assert "onnxruntime PASSED none" in out
    assert "4/4" in out
    assert "onnxruntime: PASSED: all of" in out


def test_each_backend_has_its_own_report(first_run: dict[str, Any]) -> None:
    report = first_run["report"]
    assert not report.exists()
    page = report.with_name("report.nonesuch.html").read_text()
    assert "ERROR: there is no backend &#x27;nonesuch&#x27;" in page.split("<script")[0]
    assert f"report: {report.with_name('report.nonesuch.html')}" in first_run["out"]
    for fact in ("input</dt><dd>&#x27;Anna went", "backend</dt><dd>nonesuch", "torch "):
        assert fact in page
    page = report.with_name("report.onnxruntime.html").read_text()
    assert page.startswith("<!doctype html>") or "<html" in page[:200]
    assert "body.out.hidden_states.layer-02" in page
    for fact in (
        "<dt>input</dt><dd>&#x27;Anna went to the market&#x27;</dd>",
        "<dt>PyTorch says</dt><dd>&#x27;",
        "<dt>options</dt><dd>batch_size=1, num_cores=1</dd>",
        "<dt>precision</dt><dd>float32</dd>",
        f"onnxruntime {onnxruntime.__version__}",
        "<dt>date</dt>",
    ):
        assert fact in page
    assert "would say" not in page
    assert f"report: {report.with_name('report.onnxruntime.html')}" in first_run["out"]


def test_a_checkpoint_gets_layer_taps_unless_told_otherwise(
    first_run: dict[str, Any], tapped: Path
) -> None:
    export = read_export(tapped)
    assert export.settings["taps"] == ["layers"]
    assert export.part("body").outputs[-1].name == "hidden_states.2"


def test_all_passed_is_exit_code_0_and_json_tells_all(
    first_run: dict[str, Any], tapped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--max-new-tokens", "3", "--io-dir", str(tmp_path / "io"), "--json"]
    assert main(["verify", str(tapped), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["taps"] == ["layers"]
    assert found["reference_weights"] == "export"
    assert found["input"] == {"prompts": [DEFAULT_PROMPT], "new_tokens": 3}
    (result,) = found["backends"]
    assert (result["backend"], result["passed"], result["error"]) == ("onnxruntime", True, None)
    assert (result["equal_tokens"], result["tokens"]) == (3, 3)
    assert result["sqnr"] > 80
    assert result["cosine"] == pytest.approx(1, abs=1e-5)
    assert result["worst"]["error_over_peak"] < 1e-4
    assert result["first_divergence"] is None
    assert sorted(path.name for path in (tmp_path / "io").iterdir()) == ["onnxruntime", "reference"]


def test_a_backend_is_fed_the_references_tokens_whatever_it_would_choose(
    first_run: dict[str, Any], tapped: Path, backend_that: Any, tmp_path: Path
) -> None:
    def negate(outputs: dict[str, Any]) -> None:
        if "logits" in outputs:
            outputs["logits"] *= -1

    options = replace(SHORT, html=tmp_path / "page.html")
    found = verify_model(tapped, [backend_that(negate)], Request(prompts=(PROMPT, "One")), options)
    page = (tmp_path / "page.html").read_text()
    says, would_say = (
        re.search(f"<dt>{label}</dt><dd>(.*?)</dd>", page)
        for label in ("PyTorch says", "strange would say")
    )
    assert says
    assert would_say
    assert says[1].count("&#x27;") == 4  # two texts
    assert would_say[1].endswith(", each token after PyTorch&#x27;s")
    assert says[1] not in would_say[1]
    (result,) = found.results
    assert (result.equal_tokens, result.tokens) == (0, 2 * 4)
    assert not result.passed
    assert not found.passed
    assert result.divergence is not None
    assert result.divergence.tensor == "lm_head.out.logits"
    assert result.comparison is not None
    inputs = [t for t in result.comparison.tensors if t.name.direction == "in"]
    assert {str(t.name) for t in inputs} >= {"embedding.in.input_ids", "body.in.inputs_embeds"}
    assert all(t.passed for t in inputs)
    assert result.cosine == pytest.approx(-1)
    assert len(result.comparison.steps) == 4


def test_the_reference_is_let_go_before_a_backend_runs(
    tapped: Path, demo_checkpoint: Path, backend_that: Callable[..., str]
) -> None:
    loaded = load_model(str(demo_checkpoint))
    held: list[bool] = []
    name = backend_that(lambda _outputs: held.append(loaded.is_read))
    request, options = Request(prompts=(PROMPT,)), VerifyOptions(output=tapped, max_new_tokens=2)
    assert verify_model(loaded, [name], request, options).passed
    assert held
    assert not any(held)
    weights = loaded.model.state_dict()
    assert verify_model(loaded, [name], request, options).passed
    assert loaded.model.state_dict().keys() == weights.keys()  # what a user has read stays
    assert loaded.is_read


def test_the_first_divergence_is_told_by_step_and_layer(
    first_run: dict[str, Any], tapped: Path, backend_that: Any, capsys: Any
) -> None:
    def shift(outputs: dict[str, Any]) -> None:
        if "hidden_states.2" in outputs and outputs["hidden_states.2"].shape[1] == 1:
            outputs["hidden_states.2"] += 0.5

    backend_that(shift)
    code = main(["verify", str(tapped), "--backend", "strange", "--max-new-tokens", "3"])
    out = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "strange FAILED layer 2 in decode-0000 " in out
    assert "First divergence: layer 2, body.out.hidden_states.layer-02 in decode-0000." in out


def test_a_tolerance_can_be_given(
    first_run: dict[str, Any], tapped: Path, backend_that: Any
) -> None:
    def shift(outputs: dict[str, Any]) -> None:
        if "logits" in outputs:
            outputs["logits"] += 1e-2

    name = backend_that(shift)
    wide = VerifyOptions(max_new_tokens=2, tolerances=Tolerances.parse(["*.logits=atol:0.02"]))
    strict, loose = (
        verify_model(tapped, [name], options=options)
        for options in (VerifyOptions(max_new_tokens=2), wide)
    )
    assert not strict.passed
    assert loose.passed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (BackendError("no room", "Buy more."), "no room. Buy more."),
        (ZeroDivisionError("by zero\nsecond line"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_a_backend_raises_stands_in_its_row(
    fault: Exception, message: str, first_run: dict[str, Any], tapped: Path, backend_that: Any
) -> None:
    def fail(_outputs: dict[str, Any]) -> None:
        raise fault

    found = verify_model(tapped, [backend_that(fail), "torch"], options=SHORT)
    broken, sound = found.results
    assert broken.error == message
    assert broken.to_json()["error"] == message
    assert (broken.passed, broken.comparison, broken.sqnr) == (False, None, None)
    assert sound.passed
    assert not found.passed
    assert not list(found.reference.parent.glob("*incomplete*"))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_wrong_bit_in_the_stored_weights_is_found_against_the_checkpoint(
    layer: int, first_run: dict[str, Any], tapped: Path, demo_checkpoint: Path, tmp_path: Path
) -> None:
    """The reference runs the checkpoint's weights, so what storing did to them is seen."""
    copy = tmp_path / "copy"
    shutil.copytree(tapped, copy, ignore=shutil.ignore_patterns("compiled", "io"))
    place = read_header(copy / "body.safetensors")[f"transformer.h.{layer}.mlp.c_fc.weight"]
    with (copy / "body.safetensors").open("r+b") as file:
        file.seek(place.offset + 4 * 17)
        bits = np.frombuffer(file.read(4), "<u4") ^ (1 << 26)
        file.seek(place.offset + 4 * 17)
        file.write(bits.astype("<u4").tobytes())
    # As if the fault had been there when it was exported: a changed file would be refused.
    manifest = json.loads((copy / "export.json").read_text())
    manifest["hashes"]["body.safetensors"] = hash_weights_file(copy / "body.safetensors")
    (copy / "export.json").write_text(json.dumps(manifest))
    options = VerifyOptions(max_new_tokens=2, output=copy)
    against_checkpoint = verify_model(demo_checkpoint, options=options)
    assert against_checkpoint.export == copy
    assert against_checkpoint.weights == "checkpoint"
    (result,) = against_checkpoint.results
    assert result.divergence is not None
    assert result.divergence.layer == layer
    assert verify_model(copy, options=VerifyOptions(max_new_tokens=2)).passed


def test_a_flipped_bit_that_keeps_size_and_time_is_named(
    first_run: dict[str, Any], tapped: Path, tmp_path: Path
) -> None:
    """The oracle is the hash in export.json: after the first compile nothing else looks at it."""
    folder = shutil.copytree(tapped, tmp_path / "export")
    verify_model(folder, options=SHORT)
    path = folder / "body.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"body.safetensors is not what was exported"):
        verify_model(folder, options=SHORT)


def test_ids_are_an_input_too(
    first_run: dict[str, Any], tapped: Path, capsys: Any, tmp_path: Path
) -> None:
    given = ["verify", str(tapped), "--max-new-tokens", "2", "--backend", "torch"]
    where = tmp_path / "io"
    assert main([*given, "--ids", "5,6,7", "--ids", "9 8 7", "--io-dir", str(where)]) == 0
    ids = read_dump(where / "reference").array("prefill", 0, "embedding.in.input_ids")
    assert ids.tolist() == [[5, 6, 7], [9, 8, 7]]
    assert main([*given, "--ids", "5,6", "--ids", "9"]) == 2
    assert main([*given, "--ids", "5,x"]) == 2
    assert main([*given, "--ids", "5", "--prompt", "a"]) == 2
    assert main([*given, "-O", "onnxruntime.optimization=none"]) == 2
    assert main([*given, "-O", "optimization=none"]) == 2
    assert main([*given, "--ids", "5,999999"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 6
    assert "differ in length" in errors[0]
    assert "names onnxruntime, which is not verified" in errors[3]
    assert "999999 is no token" in errors[5]


def test_options_reach_their_backend(first_run: dict[str, Any], tapped: Path) -> None:
    options = VerifyOptions(
        max_new_tokens=1, backends={"onnxruntime": {"optimization": "none", "depth": 3}}
    )
    (result,) = verify_model(tapped, options=options).results
    assert result.error is not None
    assert "has no option 'depth'" in result.error


def test_a_model_without_a_tokenizer_gets_random_ids(
    first_run: dict[str, Any], tapped: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tapped, copy, ignore=shutil.ignore_patterns("compiled", "io"))
    for path in (copy / "processor").glob("tokenizer*"):
        path.unlink()
    found = verify_model(copy, ["torch"], options=VerifyOptions(max_new_tokens=1))
    assert found.passed
    assert len(found.input["input_ids"][0]) == 16
    assert found.decoded is None


def test_what_cannot_be_verified_is_said(first_run: dict[str, Any], tapped: Path) -> None:
    with pytest.raises(UsageError, match="no backend is named"):
        verify_model(tapped, [])
    with pytest.raises(UsageError, match=r"has the taps layers, not layers, mlp.*checkpoint"):
        verify_model(tapped, options=VerifyOptions(taps="layers,mlp"))
    with pytest.raises(UsageError, match="nothing to verify"):
        verify_model(replace(read_export(tapped), kind="stub"))
    with pytest.raises(UsageError, match="a prompt is empty"):
        verify_model(tapped, request=Request(prompts=(" ",)))
    with pytest.raises(UsageError, match="takes text, not sound"):
        verify_model(tapped, request=Request(audio=("speech.wav",)))
    with pytest.raises(BackendError, match="no backend 'nonesuch'"):
        verify_model(tapped, ["nonesuch"])
