"""The ``onnxruntime`` backend: caches written in place, and quantized weights."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.onnxruntime.cache_in_place import write_in_place
from qeff_proxy.backends.onnxruntime.fuse_norms import divide_in_norms
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.flows.generation.step_cache import StepCache
from qeff_proxy.load.load_model import load_config
from qeff_proxy.session.cache_buffers import HeldCache
from qeff_proxy.testing.backend_parts import make_export
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact.manifest_schema import Export

pytestmark = pytest.mark.one_home


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return make_export(tmp_path / "export", integer_bits=0)


@pytest.fixture
def trained(demo_export: Path) -> Export:
    return read_export(demo_export)


def step(engine: CausalEngine, ids: Any, cache: Any = None) -> tuple[Array, Any]:
    past = next(iter(cache.values())).shape[2] if cache else 0
    ids = np.array([ids])
    padding = np.ones((1, past + ids.shape[1]), np.int64)
    return engine.step(StepId("prefill", past), ids, padding, cache)


def graph_of(export: Export, part: str, **options: Any) -> onnx.ModelProto:
    compiled = compile_export(export, options=CompileOptions(backend=options))
    return onnx.load(str(compiled.folder / f"{part}.onnx"), load_external_data=False)


def generated(export: Export, tokens: int, **options: Any) -> Any:
    compiled = compile_export(export, options=CompileOptions(backend=options))
    with open_sessions(compiled) as sessions:
        job = Job(
            export=export,
            sessions=sessions,
            options=compiled.options,
            config=load_config(export.processor_folder),
            tensors={"input_ids": torch.tensor([[5, 6, 7, 8]])},
            folder=export.processor_folder,
            settings={"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False},
        )
        return load_flow(export.flow).run(job)["generated_ids"]


# The cache, in place


def test_a_step_writes_into_the_cache_of_the_step_before(trained: Export) -> None:
    with open_sessions(compile_export(trained)) as sessions:
        engine = CausalEngine(trained.parts, sessions)
        _, first = step(engine, [5, 6, 7])
        _, second = step(engine, [8], first)
    name = next(iter(first))
    assert second[name].shape[2] == 4
    assert np.shares_memory(first[name], second[name])


def test_a_cache_stays_what_it_is_whatever_goes_on_from_it(trained: Export) -> None:
    """Two steps from one cache, as a search that goes back makes them."""
    with open_sessions(compile_export(trained)) as sessions:
        engine = CausalEngine(trained.parts, sessions)
        _, first = step(engine, [5, 6, 7])
        kept = {name: array.copy() for name, array in first.items()}
        one, one_cache = step(engine, [8], first)
        one_kept = {name: array.copy() for name, array in one_cache.items()}
        two, _ = step(engine, [9], first)
        again, _ = step(engine, [8], dict(kept))  # arrays of the caller's: not written into
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(again, one, atol=1e-4)
    for name in kept:
        np.testing.assert_array_equal(first[name], kept[name])
        np.testing.assert_array_equal(one_cache[name], one_kept[name])


def test_buffers_grow_and_nothing_changes_in_the_tokens(trained: Export) -> None:
    np.testing.assert_array_equal(generated(trained, 90), generated(trained, 90, in_place=False))


def test_a_graph_that_asks_for_the_padding_is_left_as_it_is(export: Export) -> None:
    """ALiBi and the like derive more from it than a mask that can be made longer."""
    assert "ScatterND" in {node.op_type for node in graph_of(export, "body").graph.node}
    body = export.part("body")
    path = export.folder / body.file
    model = onnx.load(str(path), load_external_data=False)
    value = onnx.helper.make_tensor_value_info(
        "padding_mask", onnx.TensorProto.INT64, ["batch", "past + query"]
    )
    model.graph.input.append(value)
    path.write_bytes(model.SerializeToString())
    changed = export.to_json()
    entry = next(part for part in changed["parts"] if part["name"] == "body")
    entry["inputs"].append(
        {"name": "padding_mask", "dtype": "int64", "shape": ["batch", "past + query"]}
    )
    entry["sha256"] = sha256_of(path)
    (export.folder / "export.json").write_text(json.dumps(changed), encoding="utf-8")
    export = read_export(export.folder)
    assert "ScatterND" not in {node.op_type for node in graph_of(export, "body").graph.node}


def test_a_graph_whose_outputs_sizes_are_not_known_before_is_left_as_it_is(export: Export) -> None:
    body = export.part("body")
    model = ir.load(export.folder / body.file)
    (states, *others) = body.outputs
    unknown = replace(states, shape=("batch", "frames", states.shape[2]))
    assert not write_in_place(model, replace(body, outputs=(unknown, *others)))
    assert write_in_place(model, body)


def test_the_loop_may_reorder_and_take_back_what_it_carries() -> None:
    cache = StepCache()
    names = ("past_key_values.0.key", "past_key_values.0.value")
    arrays = {name: np.arange(12, dtype=np.float32).reshape(2, 1, 3, 2) for name in names}
    cache.hold(dict(arrays), 3)
    assert cache.get_seq_length() == 3
    cache.reorder_cache(torch.tensor([1, 1]))
    np.testing.assert_array_equal(cache.arrays()[names[0]], arrays[names[0]][[1, 1]])
    cache.crop(-1)
    assert cache.get_seq_length() == 2
    assert not isinstance(cache.arrays(), HeldCache)


# Norms


def test_a_norm_that_multiplies_by_a_reciprocal_becomes_one_kernel() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    norm (float[b, 8] x) => (float[b, 8] y) <float[8] weight = {1, 2, 3, 4, 5, 6, 7, 8},
        float two = {2}, float epsilon = {0.00001}, int64[1] last = {-1}> {
        square = Pow(x, two)
        mean = ReduceMean(square, last)
        sum = Add(mean, epsilon)
        root = Sqrt(sum)
        share = Reciprocal(root)
        normed = Mul(x, share)
        y = Mul(weight, normed)
    }"""
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    assert divide_in_norms(model)
    assert not divide_in_norms(model)
    assert [node.op_type for node in model.graph].count("Div") == 1
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    outputs, kernels = run_graph(ir.to_proto(model), x)
    np.testing.assert_allclose(outputs, run_graph(proto, x)[0], rtol=1e-5)
    assert kernels == ["SimplifiedLayerNormalization"]


def run_graph(proto: onnx.ModelProto, x: Array) -> tuple[Array, list[str]]:
    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        kernels = [node.op_type for node in onnx.load(f"{folder}/optimized.onnx").graph.node]
    return session.run(None, {"x": x})[0], kernels


# Quantized weights


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.45), ("int4", 0.35)])
def test_quantized_weights_are_small_and_their_loss_is_shown(
    trained: Export, weights: str, share: float
) -> None:
    asked = {"weights": weights, "save_optimized": False}
    compiled = compile_export(trained, options=CompileOptions(backend=asked))
    data = compiled.folder / "body.prepared.data"
    assert data.stat().st_size < share * trained.files["body.safetensors"]
    found = verify_model(
        trained,
        options=VerifyOptions(backends={"onnxruntime": asked}, max_new_tokens=4),
    )
    (result,) = found.results
    assert result.error is None
    assert result.passed
    assert result.sqnr is not None
    assert 5 < result.sqnr < 60  # neither broken nor as exact as before


def test_the_head_keeps_its_weights_unless_told_otherwise(trained: Export) -> None:
    plain = {node.op_type for node in graph_of(trained, "lm_head", weights="int4").graph.node}
    asked = graph_of(trained, "lm_head", weights="int4", head_weights="int8")
    (node,) = (node for node in asked.graph.node if node.op_type == "MatMulNBits")
    assert "MatMulNBits" not in plain
    assert {a.name: a.i for a in node.attribute}["bits"] == 8


def test_what_it_loses_decides_what_it_is_held_to() -> None:
    backend = load_backend("onnxruntime")
    for options, expected in (
        ({}, None),
        ({"weights": "int8"}, "int8_weights"),
        ({"weights": "int8", "head_weights": "int4"}, "int4_weights"),
    ):
        assert backend.precision(CompileOptions(backend=options)) == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weights", "int3"),
        ("head_weights", 4),
        ("block_size", 48),
        ("activations", "int4"),
        ("spinning", 1),
    ],
)
def test_what_is_none_of_the_values_is_refused(export: Export, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{option} is {value!r}"):
        compile_export(export, options=CompileOptions(backend={option: value}))


def test_weights_that_are_no_numbers_are_refused_by_name(export: Export) -> None:
    path = export.folder / "body.safetensors"
    weights = load_file(path)
    weights["layers.0.k.weight"][3, 4] = np.nan
    save_file(weights, path)
    export.hashes.clear()
    with pytest.raises(BackendError, match=r"layers\.0\.k\.weight has NaN"):
        compile_export(export, options=CompileOptions(backend={"weights": "int4"}))
    assert not list(export.folder.glob("compiled/*/compile.json"))


def test_compiling_again_what_is_there_imports_no_family(trained: Export) -> None:
    compile_export(trained)
    code = (
        "import sys\n"
        "from qeff_proxy.cli import main\n"
        f"assert main(['compile', {str(trained.folder)!r}]) == 0\n"
        "print([name for name in ('onnx', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "was compiled already" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_quantizing_leaves_the_logging_of_the_process_alone(demo_export, tmp_path):
    code = f"""
import logging
from pathlib import Path
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.compile_options import CompileOptions
options = CompileOptions(backend={{"weights": "int4"}})
compile_export(read_export(Path({str(demo_export)!r})), "onnxruntime", options, force=True)
assert not logging.getLogger().handlers and logging.getLogger().level == logging.WARNING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[INFO]" not in done.stderr
