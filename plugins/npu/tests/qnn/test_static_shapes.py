"""Parts of fixed shapes, driven as parts of any shape: the same numbers, without tracing again."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import pytest
from qeff_proxy.backends.lengths import with_fixed_shapes
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import axes_of
from qeff_proxy_npu.fixed_shapes import Plan, StaticSession, name_of, runs_on_host
from qeff_proxy_npu.fixed_shapes.compiler_fixes import clean_graph
from qeff_proxy_npu.fixed_shapes.host_split import split_host
from qeff_proxy_npu.fixed_shapes.specialize import specialize

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart

pytestmark = pytest.mark.one_home

PARTS = [
    ("gpt2", "body"),
    ("llama", "body"),
    ("bert", "body"),
    ("wav2vec2", "body"),
    ("whisper", "encoder"),
    ("whisper", "body"),
    ("llava", "vision"),
]
COMMON = {"Add", "MatMul", "Mul", "Reshape", "Softmax", "Transpose"}
#: What each body is made of once its shapes are fixed and the host has its share.
OPERATORS = {
    ("gpt2", "body"): COMMON
    | {"Concat", "Gather", "Gemm", "LayerNormalization", "Pow", "Split", "Tanh"},
    ("llama", "body"): COMMON
    | {"Concat", "Expand", "Neg", "Pow", "Reciprocal", "ReduceMean", "Sigmoid", "Slice", "Sqrt"}
    | {"Unsqueeze"},
    ("bert", "body"): COMMON | {"Gather", "Gelu", "Identity", "LayerNormalization", "Slice"},
    ("wav2vec2", "body"): COMMON
    | {"Conv", "Div", "Gelu", "Identity", "InstanceNormalization", "LayerNormalization"}
    | {"ReduceL2", "Slice", "Unsqueeze"},
    ("whisper", "encoder"): COMMON | {"Conv", "Gather", "Gelu", "LayerNormalization"},
    ("whisper", "body"): COMMON | {"Concat", "GatherND", "Gelu", "LayerNormalization", "Unsqueeze"},
    ("llava", "vision"): COMMON
    | {"Concat", "Conv", "Gather", "Gelu", "LayerNormalization", "Sigmoid", "Slice"},
}
#: Refused by an NPU's compiler, or computed wrongly in half precision.
NEVER = {"Cos", "Sin", "Range", "Trilu", "Erf", "NonZero", "Shape", "If", "Loop", "CumSum"}
SIZES = {"batch": 2, "query": 3, "past": 4, "sequence": 5, "samples": 999}
OPTIONS = CompileOptions(batch_size=1, prefill_seq_len=4, ctx_len=16)


def on_cpu(path: Path | bytes, part: ExportedPart) -> OnnxRuntimeSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeSession(session, part)


def static_session(
    export: Export, part: ExportedPart, options: CompileOptions, tmp_path: Path, **extra: Any
) -> tuple[StaticSession, list[str]]:
    """ONNX Runtime on the fixed graphs, and the names of those that were opened."""
    opened: list[str] = []

    def open_one(sizes: dict[str, int]) -> OnnxRuntimeSession:
        opened.append(name_of(sizes))
        model = specialize(export.folder / part.file, part, sizes)
        path = export.folder / f".test-{tmp_path.name}.onnx"
        ir.save(model, path)  # beside the weights that it points into
        try:
            return on_cpu(path, part)
        finally:
            path.unlink()

    return StaticSession(part, options, open_one, **extra), opened


@pytest.mark.parametrize(("name", "part_name"), PARTS)
def test_fixed_shapes_give_what_any_shape_gives(
    name: str, part_name: str, make_export: Any, feeds_of: Any, tmp_path: Path
) -> None:
    export = make_export(name)
    part = export.part(part_name)
    feeds = feeds_of(part, SIZES)
    expected = on_cpu(export.folder / part.file, part).run(feeds)
    for batch_size in (1, 3):  # in two turns, and padded
        options = replace(OPTIONS, batch_size=batch_size)
        session, opened = static_session(export, part, options, tmp_path)
        found = session.run(feeds)
        session.close()
        assert len(opened) == 1
        assert list(found) == list(expected)
        for tensor, array in expected.items():
            assert found[tensor].shape == array.shape
            assert np.abs(found[tensor] - array).max() < 1e-5 * max(1, np.abs(array).max()), tensor


@pytest.mark.parametrize("key", PARTS)
def test_a_body_has_these_operators_and_no_others(key: tuple[str, str], make_export: Any) -> None:
    export = make_export(key[0])
    part = export.part(key[1])
    start = time.process_time()
    model = specialize(export.folder / part.file, part, {a: SIZES[a] for a in axes_of(part)})
    assert time.process_time() - start < 2  # far from the time of a trace
    split = split_host(model)
    clean_graph(split.body)
    used = {node.op_type for node in split.body.graph.all_nodes()}
    assert used == OPERATORS[key]
    assert not used & NEVER
    assert all(value.shape.is_static() for value in split.body.graph.outputs)


@pytest.mark.parametrize("key", PARTS)
def test_folding_gives_what_onnxscript_gives(
    key: tuple[str, str], make_export: Any, monkeypatch: Any
) -> None:
    export = make_export(key[0])
    part = export.part(key[1])
    sizes = {axis: SIZES[axis] for axis in axes_of(part)}
    ours = ir.to_proto(specialize(export.folder / part.file, part, sizes))
    used = []

    def optimize(model: ir.Model, **limits: int) -> None:
        used.append(model)
        onnxscript.optimizer.optimize(model, **limits)

    module = sys.modules[
        "qeff_proxy_npu.fixed_shapes.specialize"
    ]  # the package's name is the function's
    monkeypatch.setattr(module, "fold_graph", optimize)
    theirs = ir.to_proto(specialize(export.folder / part.file, part, sizes))
    assert len(used) == 1
    assert ours == theirs


def test_what_hangs_on_positions_alone_is_left_to_the_host(make_export: Any) -> None:
    split = {}
    for name in ("gpt2", "llama"):
        part = make_export(name).part("body")
        sizes = {"batch": 1, "query": 4, "past": 12}
        split[name] = split_host(specialize(make_export(name).folder / part.file, part, sizes))
    assert split["gpt2"].host is None  # its positions are looked up in a weight
    assert {"Cos", "Sin"} <= set(split["llama"].reasons)
    host, body = split["llama"].host, split["llama"].body
    assert [value.name for value in host.graph.inputs] == ["position_ids"]
    taken = {value.name for value in body.graph.inputs}
    assert {value.name for value in host.graph.outputs} <= taken
    assert "position_ids" not in taken


def test_host_and_body_together_give_what_the_whole_gives(make_export: Any, feeds_of: Any) -> None:
    export = make_export("llama")
    part = export.part("body")
    sizes = {"batch": 1, "query": 4, "past": 2000}
    feeds = feeds_of(part, sizes)
    expected = on_cpu(export.folder / part.file, part).run(feeds)
    split = split_host(specialize(export.folder / part.file, part, sizes))
    clean_graph(split.body)
    host = onnxruntime.InferenceSession(ir.to_proto(split.host).SerializeToString())
    names = [one.name for one in host.get_outputs()]
    found = host.run(names, {"position_ids": feeds["position_ids"]})
    given = {**feeds, **dict(zip(names, found, strict=True))}
    path = export.folder / ".test-body.onnx"
    ir.save(split.body, path)
    try:
        body = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
    found = body.run(None, {one.name: given[one.name] for one in body.get_inputs()})
    for tensor, array in zip(expected.values(), found, strict=True):
        assert np.abs(tensor - array).max() < 1e-5 * max(1, np.abs(tensor).max())


def test_padding_is_hidden_and_cut_off(make_export: Any, feeds_of: Any, tmp_path: Path) -> None:
    """What stands in padded places must not matter: here it is not zero but large."""
    export = make_export("gpt2")
    part = export.part("body")
    session, _ = static_session(export, part, OPTIONS, tmp_path)
    first = feeds_of(part, {"batch": 1, "query": 4, "past": 12})
    session.run({name: array * 50 if "past" in name else array for name, array in first.items()})
    feeds = feeds_of(part, {"batch": 1, "query": 3, "past": 0})
    found = session.run(feeds)
    expected = on_cpu(export.folder / part.file, part).run(feeds)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.abs(found[name] - array).max() < 1e-5 * max(1, np.abs(array).max())


def test_masks_go_no_lower_than_they_may(make_export: Any, feeds_of: Any, tmp_path: Path) -> None:
    export = make_export("gpt2")
    part = export.part("body")
    seen: list[float] = []

    class Seeing:
        def run(self, feeds: Any) -> Any:
            seen.append(float(feeds["attention_mask"].min()))
            sizes = {"batch": 1, "query": 4, "past": 12}
            return {
                spec.name: np.zeros(
                    [sizes.get(a, 16) if isinstance(a, str) else a for a in spec.shape]
                )
                for spec in part.outputs
            }

        def close(self) -> None:
            """Nothing to close."""

    feeds = feeds_of(part, {"batch": 1, "query": 3, "past": 5})
    StaticSession(part, OPTIONS, lambda _sizes: Seeing(), -30_000.0).run(feeds)
    StaticSession(part, OPTIONS, lambda _sizes: Seeing()).run(feeds)
    assert seen == [-30_000.0, float(np.finfo(np.float32).min)]


def test_the_plan_names_every_specialization(make_export: Any) -> None:
    body = make_export("gpt2").part("body")
    names = [name_of(one) for one in Plan.of(body, OPTIONS).specializations()]
    assert names == ["batch-1.query-4.past-12", "batch-1.query-1.past-15"]
    encoder = make_export("bert").part("body")
    assert Plan.of(encoder, OPTIONS).specializations() == []  # known when a run brings it
    lengths = replace(OPTIONS, seq_len=(8, 16))
    names = [name_of(one) for one in Plan.of(encoder, lengths).specializations()]
    assert names == ["batch-1.sequence-8", "batch-1.sequence-16"]
    assert runs_on_host(make_export("gpt2").part("lm_head"))
    assert not runs_on_host(body)


def test_a_chunk_that_begins_anywhere_finds_room() -> None:
    axes = ("batch", "query", "past")
    plan = Plan(axes, replace(OPTIONS, ctx_len=18))
    assert plan.choose({"batch": 1, "query": 3, "past": 14}) == {"batch": 1, "query": 4, "past": 14}
    assert plan.choose({"batch": 1, "query": 2, "past": 16}) == {"batch": 1, "query": 4, "past": 17}


def test_what_does_not_fit_says_what_to_compile(make_export: Any, feeds_of: Any) -> None:
    part = make_export("gpt2").part("body")
    session = StaticSession(part, OPTIONS, lambda _sizes: pytest.fail("nothing to open"))
    with pytest.raises(UsageError, match="larger ctx_len"):
        session.run(feeds_of(part, {"batch": 1, "query": 2, "past": 15}))
    with pytest.raises(UsageError, match="prefill_seq_len=5"):
        session.run(feeds_of(part, {"batch": 1, "query": 5, "past": 0}))
    feeds = feeds_of(part, {"batch": 1, "query": 2, "past": 3})
    feeds["position_ids"] = feeds["position_ids"][:, :1]
    with pytest.raises(BackendError, match=r"position_ids.* shape \[1, 1\]"):
        session.run(feeds)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run(feeds)


def test_outputs_without_rows_of_the_batch_run_in_one_turn(make_export: Any, feeds_of: Any) -> None:
    part = make_export("llava").part("vision")
    flat = replace(part, outputs=(TensorSpec("image_features", "float32", (33, 64)),))
    session = StaticSession(flat, OPTIONS, lambda _sizes: pytest.fail("nothing to open"))
    with pytest.raises(BackendError, match="larger batch_size"):
        session.run(feeds_of(flat, SIZES))


def test_lengths_that_nobody_said() -> None:
    chosen = with_fixed_shapes(CompileOptions())
    assert (chosen.prefill_seq_len, chosen.ctx_len) == (32, 128)
    assert with_fixed_shapes(CompileOptions(), most_positions=20).ctx_len == 20
    assert with_fixed_shapes(CompileOptions(prefill_seq_len=256)).ctx_len == 256
    assert with_fixed_shapes(OPTIONS) == OPTIONS


def test_a_shape_that_hangs_on_values_is_refused_with_node_and_layer(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("NonZero", ["x"], ["chosen"], name="route"),
        onnx.helper.make_node("Cast", ["chosen"], ["y"], name="widen", to=1),
    ]
    entry = nodes[0].metadata_props.add()
    entry.key = "pkg.torch.onnx.name_scopes"
    entry.value = "['', 'model', 'model.layers.5', 'model.layers.5.experts']"
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [2, None])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "body.onnx"
    )
    spec = TensorSpec("x", "float32", ("batch", 8))
    part = type("Routed", (), {"name": "body", "inputs": (spec,)})()
    with pytest.raises(BackendError, match=r"chosen .* hangs on values.*NonZero node route of lay"):
        specialize(tmp_path / "body.onnx", part, {"batch": 1})
