"""Weights of 8 bits, activations of 16 or 8: calibrated on the user's inputs, wholly on HTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.backends.recipe import Recipe, identity_of
from qeff_proxy.cli import main
from qeff_proxy.compare import Tolerance, Tolerances
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions, DumpWriter, read_dump
from qeff_proxy.dump.format import name_tensor
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.calibration import requests_of, with_calibration
from qeff_proxy.run.run_compiled import run_compiled
from qeff_proxy_npu.fixed_shapes.calibration_samples import samples_of
from qeff_proxy_npu.fixed_shapes.fold_weights import fold_weights
from qeff_proxy_npu.fixed_shapes.host_split import HostSplit
from qeff_proxy_npu.fixed_shapes.tensor_ranges import RangeSession, bound_masks
from qeff_proxy_npu.qnn.backend import QnnBackend
from qeff_proxy_npu.qnn.quantize import quantize_graph

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

pytestmark = pytest.mark.one_home

PROMPTS = ("Anna went to the market", "The cat sat on the mat", "One day, a boy found a red ball")
SHAPES = CompileOptions(prefill_seq_len=8, ctx_len=32)


@pytest.fixture(scope="module")
def calibrated(make_export: Any) -> tuple[Export, CompileOptions]:
    """The trained GPT-2, and options with a folder of dumps made of prompts."""
    export = make_export("gpt2")
    hooks = Plugins.discover().hooks_for("gpt2")
    return export, with_calibration(export, hooks, "qnn", SHAPES, PROMPTS)


def with_precision(options: CompileOptions, precision: str) -> CompileOptions:
    return CompileOptions(
        prefill_seq_len=options.prefill_seq_len,
        ctx_len=options.ctx_len,
        backend={**options.backend, "precision": precision},
    )


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    noise = ((reference.astype(np.float64) - found) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise))


@pytest.mark.parametrize(("precision", "least"), [("a16w8", 30.0), ("a8w8", 18.0)])
def test_a_quantized_body_is_on_htp_and_near_on_inputs_it_was_not_calibrated_on(
    precision: str, least: float, calibrated: Any, shared_home: Path, monkeypatch: Any, capsys: Any
) -> None:
    export, options = calibrated
    folder = options.backend["calibration"]
    code = main(
        [
            *("verify", str(export.folder), "--backend", "qnn", "--max-new-tokens", "3", "--json"),
            *("--prompt", "Tom saw a dog", "--prefill-seq-len", "8", "--ctx-len", "32"),
            *("-O", f"qnn.precision={precision}", "--calibrate", folder),
        ]
    )
    (result,) = json.loads(capsys.readouterr().out)["backends"]
    assert code == 0, result
    # A run on the CPU, or in half precision, would be nearer.
    assert least < result["sqnr"] < 45
    compiled = compile_export(export, "qnn", with_precision(options, precision))
    assert compiled.was_there
    reports = [json.loads(path.read_text()) for path in compiled.folder.glob("body.*.json")]
    assert [(one["on_cpu"], one["precision"]) for one in reports] == [([], precision)] * 2
    assert all(-60 < one["lowest_mask"] < -16 for one in reports)
    for path in compiled.folder.glob("body.*.onnx"):
        if not path.name.endswith(".host.onnx"):
            assert [node.op_type for node in onnx.load(path).graph.node] == ["EPContext"]
    assert not list(compiled.folder.glob("*weights*"))  # they are in the binaries


def test_calibration_is_part_of_what_was_compiled(calibrated: Any) -> None:
    export, options = calibrated
    backend = QnnBackend()
    first = backend.fingerprint(with_precision(options, "a16w8"))
    hooks = Plugins.discover().hooks_for("gpt2")
    again = with_calibration(export, hooks, "qnn", SHAPES, PROMPTS)
    assert again == options  # a lookup
    fewer = with_calibration(export, hooks, "qnn", SHAPES, PROMPTS[:1])
    assert backend.fingerprint(with_precision(fewer, "a16w8")) != first
    dump = Path(fewer.backend["calibration"]) / "0001"
    direct = with_calibration(export, hooks, "qnn", SHAPES, dump)
    assert direct.backend["calibration"] == str(dump)


def test_without_inputs_to_calibrate_on_it_says_what_to_give(make_export: Any) -> None:
    export = make_export("gpt2")
    with pytest.raises(UsageError, match=r"a16w8 needs inputs to calibrate on. Give --calibrate"):
        compile_export(export, "qnn", CompileOptions(backend={"precision": "a16w8"}))


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxruntime", {}, "backend 'onnxruntime' cannot be calibrated"),
        ("qnn", {"precision": "float16"}, "precision float16 needs no calibration"),
    ],
)
def test_calibration_where_nothing_is_quantized_is_refused(
    backend: str, options: dict[str, Any], message: str, calibrated: Any
) -> None:
    export, found = calibrated
    hooks = Plugins.discover().hooks_for("gpt2")
    asked = CompileOptions(backend=options)
    with pytest.raises(UsageError, match=message):
        compile_export(
            export,
            backend,
            with_calibration(export, hooks, backend, asked, found.backend["calibration"]),
        )


def test_files_of_any_kind_are_requests(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.PNG").write_bytes(b"")
    sound, image, *texts = requests_of(tmp_path)
    assert sound.audio == (str(tmp_path / "a.wav"),)
    assert image.images == (str(tmp_path / "b.PNG"),)
    assert image.prompts[0]
    assert [one.prompts for one in texts] == [("one",), (" two ",)]
    assert requests_of(["a", Request(audio=("x",))])[1].audio == ("x",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "is not there to calibrate on"),
        (lambda folder: folder, "holds nothing to calibrate on"),
        (lambda _: [], "no list of prompts or requests"),
        (lambda _: [3], "no list of prompts or requests"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        requests_of(make(tmp_path))


def test_a_long_prefill_is_cut_as_the_engine_would_have_run_it(
    calibrated: Any, tmp_path: Path
) -> None:
    export, _ = calibrated
    hooks = Plugins.discover().hooks_for("gpt2")
    request = Request(inputs={"input_ids": np.array([[5, 7, 11, 13, 17, 19, 23]])})
    settings = {"max_new_tokens": 2, "do_sample": False}
    for name, chunk in (("whole", None), ("chunks", 3)):
        compiled = compile_export(export, "onnxruntime", CompileOptions(prefill_seq_len=chunk))
        run_compiled(
            compiled, hooks, request, settings=settings, write_io=True, io_folder=tmp_path / name
        )
    part = export.part("body")
    options = CompileOptions(prefill_seq_len=3, ctx_len=16)
    pieces = list(samples_of(tmp_path / "whole", part, options))
    lengths = [(one["inputs_embeds"].shape[1], one["past_key_values.0.key"].shape[2])
               for one in pieces]  # fmt: skip
    # Three chunks, the last position once more as a decode step, and the decode step.
    assert lengths == [(3, 0), (3, 3), (1, 6), (1, 6), (1, 7)]
    chunked = read_dump(tmp_path / "chunks")
    for index in range(3):
        for spec in part.inputs:
            expected = chunked.array("prefill", index, name_tensor("body", "in", spec.name))
            np.testing.assert_allclose(pieces[index][spec.name], expected, atol=1e-5)


def test_dumps_of_another_part_or_beyond_the_context_are_refused(calibrated: Any) -> None:
    export, options = calibrated
    folder = Path(options.backend["calibration"])
    short = CompileOptions(prefill_seq_len=1, ctx_len=1)
    pieces = list(samples_of(folder, export.part("body"), short))
    assert {one["inputs_embeds"].shape[1] for one in pieces} == {1}  # what fits is taken
    part = type("Other", (), {"name": "vision", "inputs": export.part("body").inputs})()
    with pytest.raises(UsageError, match="holds no inputs of the vision part"):
        list(samples_of(folder, part, short))


def test_rms_norms_of_small_embeddings_keep_their_precision(
    make_export: Any, feeds_of: Any, tmp_path: Path
) -> None:
    export = make_export("llama")
    part = export.part("body")
    plain = onnxruntime.InferenceSession(
        export.folder / part.file, providers=["CPUExecutionProvider"]
    )
    names = [spec.name for spec in part.outputs]
    runs = []
    for seed in range(4):
        feeds = feeds_of(part, {"batch": 1, "query": 1, "past": 3}, seed)
        feeds["inputs_embeds"] *= np.float32(0.02)  # as untrained embeddings are
        outputs = dict(zip(names, plain.run(None, feeds), strict=True))
        with DumpWriter(tmp_path / "dumps" / str(seed), {}, DumpOptions(kv="full")) as writer:
            writer.step("decode", 0, "body", feeds, outputs, past_length=3)
        runs.append((feeds, outputs))
    backend = {"precision": "a16w8", "calibration": str(tmp_path / "dumps")}
    options = CompileOptions(prefill_seq_len=4, ctx_len=8, backend=backend)
    session = QnnBackend().open(export, part, options, tmp_path)
    feeds, outputs = runs[-1]
    found = session.run(feeds)
    session.close()
    assert min(sqnr(outputs[name], found[name]) for name in names) > 30
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert report["on_cpu"] == []


def attention(tmp_path: Path, width: int = 8) -> ir.Model:
    """Scores of ``x [1, 8]`` under a mask, and a weight that is shared, turned."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["w"], ["same"], name="share"),
        helper.make_node("Transpose", ["same"], ["turned"], name="turn"),
        helper.make_node("MatMul", ["x", "turned"], ["scores"], name="multiply"),
        helper.make_node("Unsqueeze", ["mask", "zero"], ["wide"], name="widen"),
        helper.make_node("Squeeze", ["wide", "zero"], ["flat"], name="narrow"),
        helper.make_node("Add", ["scores", "flat"], ["masked"], name="hide"),
        helper.make_node("Softmax", ["masked"], ["y"], name="share out"),
    ]
    shape = [1, width]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "mask")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([0]), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


FEEDS = {
    "x": np.linspace(-3, 3, 8, dtype=np.float32)[None],
    "mask": np.array([[0, 0, 0, -30_000, 0, 0, -30_000, 0]], np.float32),
}


def test_a_mask_goes_just_low_enough_and_leaves_the_range_to_the_scores(tmp_path: Path) -> None:
    ranges: Any = {}
    RangeSession(HostSplit(attention(tmp_path), None), tmp_path, ranges).run(FEEDS)
    assert ranges["masked"][0] < -29_000
    low, high = ranges["scores"]
    lowest, bounded = bound_masks(attention(tmp_path).graph, ["mask"], ranges)
    assert lowest == pytest.approx(-(high - low + 16))
    assert high + lowest <= low - 16 + 1e-4  # even the highest score is hidden
    assert bounded["masked"] == pytest.approx((low - 16, high))
    assert bounded["mask"] == bounded["wide"] == bounded["flat"] == (lowest, 0.0)
    assert set(bounded) == {"mask", "wide", "flat", "masked"}


def run_quantized(tmp_path: Path, ranges: Any, masks: list[str]) -> np.ndarray:
    tmp_path.mkdir(exist_ok=True)
    model, lowest = quantize_graph(attention(tmp_path), tmp_path, ranges, masks, "a16w8", tmp_path)
    ir.save(model, tmp_path / "quantized.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "quantized.onnx", providers=["CPUExecutionProvider"]
    )
    mask = np.maximum(FEEDS["mask"], lowest) if masks else FEEDS["mask"]
    (found,) = session.run(None, {**FEEDS, "mask": mask})
    return np.asarray(found)


def test_a_bounded_mask_keeps_scores_that_one_of_30000_loses(tmp_path: Path) -> None:
    ranges: Any = {}
    expected = RangeSession(HostSplit(attention(tmp_path), None), tmp_path, ranges).run(FEEDS)["y"]
    bounded = run_quantized(tmp_path / "bounded", ranges, ["mask"])
    assert sqnr(expected, bounded) > 40
    assert bounded[0, [3, 6]].max() < 1e-4  # what is masked stays so
    assert sqnr(expected, run_quantized(tmp_path / "deep", ranges, [])) < 30


def test_weights_behind_other_nodes_become_weights_of_8_bits(tmp_path: Path) -> None:
    model = attention(tmp_path)
    fold_weights(model, tmp_path)
    assert next(node.op_type for node in model.graph) == "MatMul"
    turned = model.graph.initializers["turned"].const_value
    assert turned is not None
    weight = numpy_helper.to_array(ir.to_proto(attention(tmp_path)).graph.initializer[0])
    np.testing.assert_array_equal(turned.numpy(), weight.T)
    ranges: Any = {}
    RangeSession(HostSplit(attention(tmp_path), None), tmp_path, ranges).run(FEEDS)
    quantized, _ = quantize_graph(attention(tmp_path), tmp_path, ranges, ["mask"], "a8w8", tmp_path)
    types = {
        name: value.dtype
        for name, value in quantized.graph.initializers.items()
        if name.startswith("turned")
    }
    assert types["turned_quantized"] == ir.DataType.INT8
    scales = quantized.graph.initializers["turned_scale"].const_value
    assert scales is not None
    assert scales.shape == (8,)  # one for each output


def test_a_tensor_that_no_input_reached_is_named(tmp_path: Path) -> None:
    ranges: Any = {}
    RangeSession(HostSplit(attention(tmp_path), None), tmp_path, ranges).run(FEEDS)
    del ranges["y"]
    with pytest.raises(BackendError, match=r"went through Softmax node share out"):
        quantize_graph(attention(tmp_path), tmp_path, ranges, ["mask"], "a8w8", tmp_path)


@pytest.mark.parametrize("precision", ["a16w8", "a8w8"])
def test_a_quantized_run_is_held_to_what_its_bits_allow(precision: str) -> None:
    found = Tolerances(precision=precision).of("body.out.x", "float32", "float32")
    half = Tolerances(precision="float16").of("body.out.x", "float32", "float32")
    assert found == Tolerances(precision=precision).of("body.out.x", "float16", "float16")
    assert (found.sqnr or 0) < (half.sqnr or 0)
    assert Tolerances(precision=precision).of("x", "int64", "int64") == Tolerance(0.0, 0.0)


def test_what_a_recipe_names_stays_in_half_precision(
    calibrated: Any, tmp_path: Path, capsys: Any
) -> None:
    """The compiler takes a graph of whole numbers with some modules in float16."""
    export, options = calibrated
    wide = ("transformer.h.2.attn:MatMul", "transformer.h.2:Add", "transformer.ln_f")
    recipe = tmp_path / "recipe.toml"
    Recipe("tiny-gpt2", identity_of(export), "qnn", "a8w8", wide).write(recipe)
    command = [
        *("verify", str(export.folder), "--backend", "qnn", "--max-new-tokens", "2", "--json"),
        *("--prompt", "Tom saw a dog", "--prefill-seq-len", "8", "--ctx-len", "32"),
        *("-O", "qnn.precision=a8w8", "--calibrate", options.backend["calibration"]),
    ]
    found = []
    for more in ([], ["--recipe", str(recipe)]):
        main([*command, *more])
        (result,) = json.loads(capsys.readouterr().out)["backends"]
        assert result["error"] is None
        found.append(result["sqnr"])
    assert abs(found[1] - found[0]) > 0.01
    assert min(found) > 18
    with pytest.raises(UsageError, match="a recipe says what stays in half precision"):
        compile_export(export, "qnn", CompileOptions(backend={"recipe": str(recipe)}))
