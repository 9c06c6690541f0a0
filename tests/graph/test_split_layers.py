"""A part's graph, split by layer: run in sequence, the pieces give the same bits as the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import transformers
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.graph.split_layers import split_layers
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.tiny import random_weights

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_TEXT = {"vocab_size": 131, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES = {"batch": 2, "query": 3, "past": 5, "sequence": 8, "images": 2}


def bert() -> Any:
    config = transformers.BertConfig(**_TEXT, num_hidden_layers=5, **_SMALL)
    return transformers.BertModel(config)


def whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=131,
            d_model=64,
            encoder_layers=4,
            decoder_layers=6,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=40,
            max_target_positions=48,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    )


def llava() -> Any:
    text = transformers.LlamaConfig(**_TEXT, num_hidden_layers=5, **_SMALL)
    tower = transformers.CLIPVisionConfig(
        num_hidden_layers=8, image_size=28, patch_size=14, projection_dim=32, **_SMALL
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5)
    )


#: Model → the number of graphs that each of its parts with layers is split into.
GRAPHS = {
    "llama": {"body": 7},
    "gpt2": {"body": 7},
    "gemma2": {"body": 7},
    "bert": {"body": 5},
    "whisper": {"encoder": 5, "body": 7},
    "llava": {"vision": 8, "body": 6},
}


def exported(name: str, make_model: Any, folder: Path) -> Export:
    own = {"bert": bert, "whisper": whisper, "llava": llava}
    model = random_weights(own[name](), 0) if name in own else make_model(name, layers=6)
    loaded = wrap_model(model.eval())
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    return export_model(loaded, hooks, output=folder, taps="layers")


def run(path: Path, outputs: list[str], feeds: Any) -> dict[str, Any]:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])
    inputs = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_pieces_in_sequence_equal_the_whole(name, make_model, tmp_path):
    export = exported(name, make_model, tmp_path / "export")
    for part_name, count in GRAPHS[name].items():
        part = export.part(part_name)
        feeds = random_inputs(part, SIZES, np.random.default_rng(0))
        names = [spec.name for spec in part.outputs]
        whole = run(export.folder / part.file, names, feeds)
        pieces = split_layers(ir.load(export.folder / part.file), part.inputs, part.outputs)
        assert len(pieces) == count
        assert sorted(spec.name for piece in pieces for spec in piece.outputs) == sorted(names)
        known = dict(feeds)
        for stage, piece in enumerate(pieces):
            taps = [spec.name for spec in piece.inputs if spec.name.startswith("hidden_states.")]
            assert taps == ([f"hidden_states.{stage - 1}"] if stage else [])
            path = export.folder / "piece.onnx"
            ir.save(piece.model, path)
            assert path.stat().st_size < 100_000  # its weights lie in the export's file
            known |= run(path, [spec.name for spec in piece.outputs], known)
        for output in names:
            np.testing.assert_array_equal(known[output], whole[output])


def test_a_tap_that_is_a_copy_is_read_by_the_layer_that_follows(make_model, tmp_path):
    export = exported("llama", make_model, tmp_path / "export")
    part = export.part("body")
    model = ir.load(export.folder / part.file)
    tap = next(value for value in model.graph.outputs if value.name == "hidden_states.2")
    copy = ir.node("Identity", [tap])
    model.graph.append(copy)
    model.graph.outputs[list(model.graph.outputs).index(tap)] = copy.outputs[0]
    tap.name, copy.outputs[0].name = "inner", "hidden_states.2"
    pieces = split_layers(model, part.inputs, part.outputs)
    assert [piece.inputs[0].name for piece in pieces[3:5]] == ["hidden_states.2", "hidden_states.3"]


def test_a_layer_takes_its_own_cache_only(make_model, tmp_path):
    export = exported("gemma2", make_model, tmp_path / "export")
    part = export.part("body")
    for piece in split_layers(ir.load(export.folder / part.file), part.inputs, part.outputs)[1:-1]:
        assert piece.inputs[0].name == f"hidden_states.{piece.layer - 1}"
        caches = {spec.name for spec in piece.inputs if spec.name.startswith("past")}
        assert caches == {f"past_key_values.{piece.layer}.{side}" for side in ("key", "value")}
        assert "inputs_embeds" not in {spec.name for spec in piece.inputs}


def test_a_graph_without_layers_is_one_piece(demo_export):
    from qeff_proxy.artifact.export_folder import read_export

    export = read_export(demo_export)
    part = export.part("embedding")
    (piece,) = split_layers(ir.load(export.folder / part.file), part.inputs, part.outputs)
    assert piece.layer is None
    assert (piece.inputs, piece.outputs) == (part.inputs, part.outputs)
