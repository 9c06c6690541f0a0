"""What the conformance suite of backends runs: a small export, and what its parts must give.

The export is made by hand, without a model: a token embedding, a decoder layer with its cache, and
an arithmetic of whole numbers. What each part gives is computed by ONNX's reference implementation
(``onnx.reference``), which is written in NumPy and shares nothing with any runtime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.artifact.hashes import hash_weights_file
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.graph.name_scopes import NAME_SCOPES
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.parts import MaskSpec, TensorSpec

_OPSET = 20
_VOCABULARY, _WIDTH, _HEADS, _HEAD, _POSITIONS = 31, 16, 2, 8, 64


@dataclass(frozen=True)
class _Graph:
    """A part's nodes and weights, before they are a file."""

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    nodes: Sequence[onnx.NodeProto]
    weights: Mapping[str, Array]
    stem: str
    constants: Mapping[str, Array] = field(default_factory=dict)
    masks: tuple[MaskSpec, ...] = ()


def make_export(folder: Path, dtype: str = "float32", *, integer_bits: int = 64) -> Export:
    """Write the export that a backend is tried on.

    Args:
        folder: New or empty.
        dtype: Of weights and activations: ``"float32"`` or ``"float16"``.
        integer_bits: Have a part that takes and gives int64, with numbers that need more than 32
            bits (64), more than a float32 holds (32), or no such part (0).
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = [_embedding(dtype), _body(dtype), *([_counts(integer_bits)] if integer_bits else [])]
    parts = tuple(_write(graph, folder) for graph in graphs)
    files = sorted({part.weights for part in parts if part.weights is not None})
    export = Export(
        folder,
        "split",
        "causal-lm",
        dtype,
        {"source": "made by hand", "model_type": "none", "architecture": "none"},
        parts,
        {name: (folder / name).stat().st_size for name in files},
        {},
        {"embedding_rows": _VOCABULARY},
        {"qeff-proxy": "testing"},
        {name: hash_weights_file(folder / name) for name in files},
        ("config.json",),
    )
    export.write_manifest()
    export.processor_folder.mkdir()
    config = {"model_type": "gpt2", "n_positions": _POSITIONS}  # for how long a context may be
    (export.processor_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return export


def unknown_operator(export: Export, part: ExportedPart) -> None:
    """Put an operator that nobody knows into a part's graph, as layer 3's MLP."""
    path = export.folder / part.file
    model = onnx.load(str(path), load_external_data=False)
    last = model.graph.node[-1]
    name = last.output[0]
    last.output[0] = "before_the_unknown"
    node = helper.make_node(
        "Nonsense", ["before_the_unknown"], [name], name="node_nonsense", domain="test.unknown"
    )
    node.metadata_props.add(key=NAME_SCOPES, value="['', 'layers.3', 'layers.3.mlp', 'nonsense']")
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("test.unknown", 1))
    path.write_bytes(model.SerializeToString())


class Reference:
    """What a part must give, by ONNX's reference implementation.

    Args:
        export: The export.
        part: Which of its parts.
    """

    def __init__(self, export: Export, part: ExportedPart) -> None:
        model = onnx.load(str(export.folder / part.file))  # with its weights
        self._names = [spec.name for spec in part.outputs]
        self._evaluator = ReferenceEvaluator(model)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The part's outputs, by name."""
        found: Any = self._evaluator.run(self._names, dict(feeds))
        return dict(zip(self._names, map(np.asarray, found), strict=True))


def feeds_of(
    part: ExportedPart, *, batch: int = 1, query: int = 1, past: int = 0, seed: int = 0
) -> dict[str, Array]:
    """Random inputs of a part: token ids, positions that go on from the past, causal masks."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": batch, "query": query, "past": past, "past + query": past + query}
    sizes["sequence"] = query
    feeds: dict[str, Array] = {}
    for spec in part.inputs:
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if spec.name == "position_ids":
            feeds[spec.name] = np.tile(np.arange(past, past + query), (batch, 1)).astype(dtype)
        elif spec.name in {mask.name for mask in part.masks}:
            seen = np.tri(query, past + query, past, dtype=bool)
            mask = np.where(seen, 0, np.finfo(np.float32 if dtype.itemsize > 2 else dtype).min)
            feeds[spec.name] = np.broadcast_to(mask, shape).astype(dtype)
        elif dtype.kind in "iu":
            feeds[spec.name] = generator.integers(0, _VOCABULARY, shape).astype(dtype)
        else:
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def _embedding(dtype: str) -> _Graph:
    table = _random((_VOCABULARY, _WIDTH), dtype, 1)
    return _Graph(
        "embedding",
        [TensorSpec("input_ids", "int64", ("batch", "query"))],
        [TensorSpec("inputs_embeds", dtype, ("batch", "query", _WIDTH))],
        [helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["inputs_embeds"])],
        {"embed_tokens.weight": table},
        "vocabulary",
    )


def _counts(bits: int) -> _Graph:
    """Whole numbers beyond what a float32 holds, or an int32."""
    large = 2**53 + 1 if bits == 64 else 2**24 + 1
    ids = ("batch", "sequence")
    return _Graph(
        "counts",
        [TensorSpec("numbers", "int64", ids)],
        [TensorSpec("sums", "int64", ids), TensorSpec("numbers_again", "int64", ids)],
        [
            helper.make_node("Add", ["numbers", "large"], ["sums"]),
            helper.make_node("Identity", ["numbers"], ["numbers_again"]),
        ],
        {},
        "counts",
        constants={"large": np.array([[large]], np.int64)},
    )


def _body(dtype: str) -> _Graph:
    cache = ("batch", _HEADS, "past", _HEAD)
    longer = ("batch", _HEADS, "past + query", _HEAD)
    hidden = ("batch", "query", _WIDTH)
    sides = ("key", "value")
    weights = {
        f"layers.0.{name}.weight": _random((_WIDTH, _WIDTH), dtype, seed)
        for seed, name in enumerate(("q", "k", "v", "o"), start=2)
    }
    weights["positions.weight"] = _random((_POSITIONS, _WIDTH), dtype, 6)
    nodes = [
        helper.make_node("Gather", ["positions.weight", "position_ids"], ["positions"]),
        helper.make_node("Add", ["inputs_embeds", "positions"], ["hidden"]),
    ]
    for name in ("q", "k", "v"):
        nodes += [
            helper.make_node("MatMul", ["hidden", f"layers.0.{name}.weight"], [f"{name}_flat"]),
            helper.make_node("Reshape", [f"{name}_flat", "heads"], [f"{name}_heads"]),
            helper.make_node("Transpose", [f"{name}_heads"], [name], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Concat", [f"past_key_values.0.{s}", s[0]], [f"present.0.{s}"], axis=2)
        for s in sides
    ]
    nodes += [
        helper.make_node("Transpose", ["present.0.key"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "attention_mask"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "present.0.value"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned_back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned_back", "flat"], ["joined"]),
        helper.make_node("MatMul", ["joined", "layers.0.o.weight"], ["attended"]),
        helper.make_node("Add", ["hidden", "attended"], ["last_hidden_state"]),
    ]
    return _Graph(
        "body",
        [
            TensorSpec("inputs_embeds", dtype, hidden),
            TensorSpec("attention_mask", dtype, ("batch", 1, "query", "past + query")),
            TensorSpec("position_ids", "int64", ("batch", "query")),
            *(TensorSpec(f"past_key_values.0.{side}", dtype, cache) for side in sides),
        ],
        [
            TensorSpec("last_hidden_state", dtype, hidden),
            *(TensorSpec(f"present.0.{side}", dtype, longer) for side in sides),
        ],
        nodes,
        weights,
        "body",
        constants={
            "heads": np.array([0, 0, _HEADS, _HEAD], np.int64),
            "flat": np.array([0, 0, _WIDTH], np.int64),
            "scale": np.array(_HEAD**-0.5, numpy_dtype(dtype)),
        },
        masks=(MaskSpec("attention_mask", "causal"),),
    )


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(shape) / shape[-1] ** 0.5
    return values.astype(numpy_dtype(dtype))


def _write(graph: _Graph, folder: Path) -> ExportedPart:
    """A part's ONNX file, its weights by offset in a safetensors file, as an export has them."""
    file = f"{graph.stem}.safetensors" if graph.weights else None
    initializers = [numpy_helper.from_array(v, name) for name, v in graph.constants.items()]
    if file is not None:
        save_file(dict(graph.weights), folder / file)
        for name, place in read_header(folder / file).items():
            dtype = helper.np_dtype_to_tensor_dtype(graph.weights[name].dtype)
            tensor = onnx.TensorProto(name=name, data_type=dtype, dims=place.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            where = {"location": file, "offset": place.offset, "length": place.length}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
    for node in graph.nodes:
        node.name = f"node_{node.output[0]}"
        node.metadata_props.add(key=NAME_SCOPES, value=f"['', 'layers.0', '{node.output[0]}']")
    model = helper.make_model(
        helper.make_graph(
            list(graph.nodes),
            graph.name,
            [_value(spec) for spec in graph.inputs],
            [_value(spec) for spec in graph.outputs],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=10,
    )
    path = folder / f"{graph.name}.onnx"
    path.write_bytes(model.SerializeToString())
    return ExportedPart(
        graph.name,
        path.name,
        file,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        tuple(graph.inputs),
        tuple(graph.outputs),
        graph.masks,
    )


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(numpy_dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, dtype, spec.shape)
