"""The ``qaic`` backend, on a stand-in for the vendor's compiler that checks what it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import qeff_proxy
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.recipe import Recipe, identity_of
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.backend_parts import feeds_of, make_export

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

pytestmark = pytest.mark.one_home

GOLDEN = Path(__file__).parent / "golden"
STAND_IN = Path(__file__).parent / "qaic_compile.py"
CHECKPOINT = Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"
LENGTHS = {"prefill_seq_len": 8, "ctx_len": 32}


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return make_export(tmp_path / "export", integer_bits=0)


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``qaic-compile`` on ``PATH``."""
    folder = tmp_path / "sdk"
    folder.mkdir()
    script = folder / "qaic-compile"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return script


def compiled(export: Export, lengths: dict[str, Any] | None = None, **options: Any) -> Path:
    chosen = CompileOptions(**(lengths or LENGTHS), backend=options)
    return compile_export(export, "qaic", chosen).folder


def command(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "body" / "command.json").read_text())
    return found


def test_the_files_are_those_of_qefficient(sdk: Path, export: Export) -> None:
    folder = compiled(
        export,
        {**LENGTHS, "num_cores": 14, "batch_size": 2},
        num_devices=4,
        mxfp6_matmul=True,
        mxint8_kv_cache=True,
        aic_enable_depth_first=True,
        allow_mxint8_mdp_io=False,
        mos=1,
        aic_hw_version="ai100",
    )
    made = {path.name: path for path in (folder / "body").iterdir() if path.is_file()}
    assert set(made) == {path.name for path in GOLDEN.iterdir()}
    for path in GOLDEN.iterdir():
        assert made[path.name].read_text() == path.read_text(), path.name
    assert (folder / "body" / "qpc" / "programqpc.bin").read_bytes() == b"a program"


def test_an_older_compiler_gets_the_sizes_alone(
    sdk: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_FAULT", "old")
    written = compiled(export, mos=3) / "body" / "specializations.json"
    sizes = {"batch_size": "1", "ctx_len": "32", "past_len": "24", "seq_len": "8"}
    assert json.loads(written.read_text())["specializations"][0] == sizes


def test_without_options_it_is_16_cores_of_one_card_in_float16(sdk: Path, export: Export) -> None:
    folder = compiled(export)
    assert command(folder)[1:] == [
        "-aic-hw",
        "-aic-hw-version=ai100",
        "-m=body.onnx",
        "-convert-to-fp16",
        "-aic-num-cores=16",
        "-network-specialization-config=specializations.json",
        "-custom-IO-list-file=custom_io.yaml",
        "-aic-binary-dir=qpc",
    ]
    assert "Precision: float16" in (folder / "body" / "custom_io.yaml").read_text()
    assert compile_export(export, "qaic", CompileOptions(**LENGTHS)).was_there


def test_other_arguments_go_through_as_they_are(sdk: Path, export: Export) -> None:
    folder = compiled(export, mos=-1, compiler_args="-stats-batchsize -ols=2")
    assert command(folder)[5:8] == ["-aic-num-cores=16", "-stats-batchsize", "-ols=2"]


def test_the_export_stays_as_it_is(sdk: Path, export: Export) -> None:
    before = {p.name: p.read_bytes() for p in export.folder.iterdir() if p.is_file()}
    folder = compiled(export)
    assert {p.name: p.read_bytes() for p in export.folder.iterdir() if p.is_file()} == before
    assert not list(folder.rglob("*.safetensors"))


def test_the_vocabulary_runs_here_and_the_binary_says_where_it_is(
    sdk: Path, export: Export
) -> None:
    options = CompileOptions(**LENGTHS)
    folder = compiled(export)
    embedding, body = export.parts
    backend = load_backend("qaic")
    session = backend.open(export, embedding, options, folder)
    assert session.run(feeds_of(embedding, query=3))["inputs_embeds"].shape == (1, 3, 16)
    with pytest.raises(BackendError, match="runs on a Cloud AI card only") as caught:
        backend.open(export, body, options, folder)
    assert str(folder / "body" / "qpc") in str(caught.value)
    with (
        pytest.raises(BackendError, match="body"),
        open_sessions(compile_export(export, "qaic", options)),
    ):
        pass


def test_a_missing_sdk_is_one_line(
    export: Export, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["compile", str(export.folder), "--backend", "qaic"]) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no qaic-compile" in line
    assert "Install Qualcomm's Cloud AI Apps SDK" in line
    assert not (export.folder / "compiled").exists() or not list(
        (export.folder / "compiled").glob("qaic-*")
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "was ended by SIGSEGV"),
        ("hang", "took more than 1 seconds"),
        ("nothing", "wrote no programqpc.bin"),
    ],
)
def test_a_compiler_that_fails_is_an_error_with_its_log(
    fault: str, message: str, sdk: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_FAULT", fault)
    timeout = {"timeout": 1} if fault == "hang" else {}
    with pytest.raises(BackendError, match=message) as caught:
        compiled(export, **timeout)
    log = Path(str(caught.value).rpartition("Its log: ")[2])
    assert log.read_text().startswith(str(sdk))
    assert not list((export.folder / "compiled").glob("qaic-*"))


def test_what_the_compiler_refuses_is_said_in_its_words(sdk: Path, export: Export) -> None:
    with pytest.raises(BackendError, match="exit status 3: ERROR: unknown argument -no-such"):
        compiled(export, compiler_args="-no-such")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 0}, "num_devices is 0"),
        ({"mxfp6_matmul": "yes"}, "mxfp6_matmul is 'yes'"),
        ({"aic_hw_version": "v73"}, "no hardware 'v73'"),
        ({"mxfp4": True}, "no option 'mxfp4'"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, sdk: Path, export: Export
) -> None:
    with pytest.raises(UsageError, match=message):
        compiled(export, **options)


def test_a_length_that_nobody_said_is_asked_for(sdk: Path, tmp_path: Path) -> None:
    whole = make_export(tmp_path / "whole")  # its last part has an axis that is no query
    with pytest.raises(UsageError, match=r"counts part has the axes batch, sequence.*seq_len"):
        compiled(whole)
    folder = compiled(whole, {**LENGTHS, "seq_len": (16, 24)})
    text = (folder / "counts" / "specializations.json").read_text()
    assert [name in text for name in ("Counts_0", "Counts_1", '"24"')] == [True] * 3


def test_the_face_takes_qefficients_keywords(
    sdk: Path,
    demo_checkpoint: Path,
    shared_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qeff_proxy import QEFFAutoModelForCausalLM

    model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
    monkeypatch.setenv("QEFF_HOME", str(shared_home))
    model.export()
    folder = model.compile(
        backend="qaic",
        prefill_seq_len=32,
        ctx_len=128,
        num_cores=16,
        num_devices=1,
        mxfp6_matmul=True,
        mxint8_kv_cache=True,
        aic_enable_depth_first=True,
    )
    assert {"-mxfp6-matmul", "-aic-enable-depth-first"} <= set(command(folder))
    assert "Precision: mxint8" in (folder / "body" / "custom_io.yaml").read_text()
    with pytest.warns(UserWarning, match="mxfp6_matmul .* backend='qaic'"):
        model.compile(mxfp6_matmul=True, num_devices=1)
    with pytest.raises(UsageError, match="no option 'mxfp9'"):
        model.compile(mxfp9=True)


def test_a_recipe_becomes_a_node_precision_file(sdk: Path, tmp_path: Path) -> None:
    loaded = load_model(str(CHECKPOINT))
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    export = export_model(loaded, hooks, output=tmp_path / "gpt2")
    recipe = tmp_path / "recipe.toml"
    wide = ("transformer.h.1.mlp.c_fc", "transformer.h.2.attn:Softmax")
    Recipe("tiny-gpt2", identity_of(export), "qaic", "fp16", wide).write(recipe)
    folder = compiled(export, recipe=str(recipe))
    assert "-node-precision-info=body.fp32.yaml" in command(folder)
    graph = onnx.load(export.folder / "body.onnx", load_external_data=False).graph
    listed = (folder / "body" / "body.fp32.yaml").read_text().splitlines()
    assert listed[0] == "FP32NodeInstanceNames:"
    makers = {output: node.op_type for node in graph.node for output in node.output}
    assert sorted(makers[json.loads(line[4:])] for line in listed[1:]) == ["Gemm", "Softmax"]
    with pytest.raises(UsageError, match="both say what stays in float32"):
        compiled(export, recipe=str(recipe), node_precision_info="mine.yaml")
