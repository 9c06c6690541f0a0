"""Exports of checkpoints: the first layers are loaded, the others' weights go from file to file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import pytest
import torch
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import ArtifactError, CheckpointError, UsageError
from qeff_proxy.export.check_graph import check_graph
from qeff_proxy.export.export_model import export_model
from qeff_proxy.layers.taps import tap_proxy
from qeff_proxy.load.load_model import load_config, load_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.plugins.manager import Plugins
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

MIXED = ["sliding_attention", "sliding_attention", "full_attention"]


def export(folder: Path, output: Path, dtype: str = "float32", **options: Any) -> Export:
    loaded = load_model(str(folder), dtype=dtype)
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    return export_model(loaded, hooks, output=output, **options)


def check_all_layers(folder: Path, found: Export, taps: tuple[str, ...] = ()) -> None:
    """Hold the exported graphs, all layers of them, against the whole model in PyTorch."""
    loaded = load_model(str(folder), dtype=found.dtype)
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    cut = cut_model(loaded, hooks, "split", verify=False)
    for part in tap_proxy(replace(cut, report=None).proxy, taps).parts:
        exported = found.part(part.name)
        assert [spec.name for spec in exported.outputs] == [spec.name for spec in part.outputs]
        assert check_graph(part, exported.inputs, found.folder / exported.file) is not None


def check_bytes(folder: Path, found: Export) -> None:
    """Every weight of the whole model, in the export's dtype, is in the export."""
    stored = {}
    for name in found.files:
        stored.update(load_file(found.folder / name))
    model = load_model(str(folder), dtype=found.dtype).model
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter), name
        assert stored[name].dtype == parameter.dtype


@pytest.mark.parametrize(
    ("model_type", "changes", "verified"),
    [
        ("gpt2", {}, 2),  # Conv1D, tied
        ("mixtral", {"tie_word_embeddings": False}, 2),  # experts that are fused on the way
        ("gemma3_text", {"layer_types": MIXED * 2}, 3),  # two kinds of layers, tied
    ],
)
def test_all_layers_equal_pytorch(
    model_type: str, changes: dict[str, Any], verified: int, make_model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    make_model(model_type, layers=6, **changes).save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").is_file()
    found = export(folder, tmp_path / "out")
    assert found.cut["layers"]["verified"] == verified
    assert found.cut["layers"]["count"] == 6
    assert found.cut["weights"].startswith("streamed from the checkpoint")
    check_all_layers(folder, found)
    check_bytes(folder, found)


def test_buffers_of_the_checkpoint_are_weights(make_model: Any, tmp_path: Path) -> None:
    """The router's correction bias is another in each layer, and chooses the experts."""
    folder = tmp_path / "checkpoint"
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    model = make_model("glm4_moe", layers=5, n_shared_experts=1, **experts)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    for index, bias in enumerate(biases):
        bias.copy_(torch.randn(4, generator=torch.Generator().manual_seed(index)))
    model.save_pretrained(folder)
    found = export(folder, tmp_path / "out")
    assert found.cut["traced_layers"] == {"body": 2}  # dense, experts
    assert found.cut["weights"].startswith("streamed from the checkpoint;")
    assert "all layers" not in found.cut["weights"]
    stored = load_file(found.folder / "body.safetensors")
    for index, bias in enumerate(biases, start=1):
        assert torch.equal(stored[f"model.layers.{index}.mlp.gate.e_score_correction_bias"], bias)
    check_all_layers(folder, found)


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float16"), ("bfloat16", "bfloat16")])
def test_other_dtypes(stored: str, wanted: str, make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_model("llama", layers=4).to(getattr(torch, stored)).save_pretrained(folder)
    found = export(folder, tmp_path / "out", wanted)
    assert found.cut["weights"].startswith("streamed from the checkpoint")
    check_bytes(folder, found)
    if wanted == "float16":
        check_all_layers(folder, found)


def test_taps_are_cloned_too(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_model("gemma2", layers=5).save_pretrained(folder)
    taps = ("layers", "mlp")
    found = export(folder, tmp_path / "out", taps=taps)
    assert found.cut["traced_layers"] == {"body": 2}
    check_all_layers(folder, found, taps)


def test_the_prefix_that_stands_for_a_model(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_model("gemma3_text", layers=9, layer_types=MIXED * 3).save_pretrained(folder)
    found = export(folder, tmp_path / "out", num_layers="auto")
    stands_for = found.cut["stands_for"]
    assert (stands_for["layers"], stands_for["kept"]) == (9, 6)
    assert [kind["layers"] for kind in stands_for["kinds"]] == [[0, 1, 3, 4, 6, 7], [2, 5, 8]]
    config = load_config(found.processor_folder)
    assert (config.num_hidden_layers, config.layer_types) == (6, MIXED * 2)
    names = [spec.name for spec in found.part("body").outputs]
    assert names[-1] == "present.5.value"
    assert not any(".layers.6." in name for name in read_header(found.folder / "body.safetensors"))
    with pytest.raises(UsageError, match="has 9 layers, not 10"):
        export(folder, tmp_path / "more", num_layers=10)
    with pytest.raises(UsageError, match="'none'"):
        export(folder, tmp_path / "more", num_layers="none")
    assert not (tmp_path / "more").exists()


def test_references_copy_nothing(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_model("llama", layers=4).save_pretrained(folder)
    found = export(folder, tmp_path / "out", weights="reference")
    assert list(found.files) == ["model.safetensors"]
    link = found.folder / "model.safetensors"
    assert link.stat().st_ino == (folder / "model.safetensors").stat().st_ino
    onnxruntime.InferenceSession(found.folder / "body.onnx", providers=["CPUExecutionProvider"])
    check_all_layers(folder, found)
    loaded = load_model(str(folder))
    assert loaded.model is not None  # what is in memory may have been changed
    hooks = Plugins.discover().hooks_for("llama")
    with pytest.raises(ArtifactError, match="in memory"):
        export_model(loaded, hooks, output=tmp_path / "other", weights="reference")


def test_layers_that_calculate_with_their_index_are_all_run(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qeff_proxy.load import first_layers as sampling

    folder = tmp_path / "checkpoint"
    make_model("gpt2", layers=3).save_pretrained(folder)
    monkeypatch.setattr(sampling, "uses_index", lambda _layers: True)
    found = export(folder, tmp_path / "out")
    assert found.cut["weights"].startswith(
        "streamed from the checkpoint; all layers were run, since its layers calculate with their "
    )
    assert found.cut["layers"]["verified"] == 3


@pytest.mark.parametrize("layer", [0, 5])
def test_nan_weights_are_named(layer: int, make_model: Any, tmp_path: Path) -> None:
    """In a layer that is run, and in one that only is copied."""
    folder = tmp_path / "checkpoint"
    make_model("llama", layers=6).save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    weights[name][3, 4] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        export(folder, tmp_path / "out")
    assert f"{name} of {file} has NaN" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_exchanged_weight_is_noticed(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer beyond those that are run gets another layer's weights: the names tell."""
    from qeff_proxy.export.repeat import clone_layers as layer_graphs

    original = layer_graphs._weights

    def exchanged(call: Any, name_of: Any) -> Any:
        for path, name, tensor in original(call, name_of):
            yield path, name.replace("layers.3.", "layers.0."), tensor

    monkeypatch.setattr(layer_graphs, "_weights", exchanged)
    folder = tmp_path / "checkpoint"
    make_model("llama", layers=4).save_pretrained(folder)
    found = export(folder, tmp_path / "out")
    assert "was given other weights" in found.cut["weights"]
    check_all_layers(folder, found)


def damaged(folder: Path, **changes: Any) -> str:
    """Change the first entry of the header; give its name."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name].update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return name


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dtype": "F5"}, "dtype 'F5'"), ({"shape": [3, 3]}, "bytes")],
)
def test_a_tensor_that_cannot_be_is_named(
    changes: dict[str, Any], words: str, make_model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    make_model("llama").save_pretrained(folder)
    name = damaged(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder))
    for word in (name, "model.safetensors", words):
        assert word in str(caught.value)


def test_a_tensor_in_two_shards_is_named(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_model("llama").save_pretrained(folder, max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, shard = next(iter(index.items()))
    other = next(file for file in index.values() if file != shard)
    weights = load_file(folder / other)
    weights[name] = torch.zeros(1)
    save_file(weights, folder / other, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder))
    for word in (name, other, shard):
        assert word in str(caught.value)


def test_a_kind_of_layer_that_exists_once_is_run(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    make_model("gemma2", layers=4, layer_types=kinds).save_pretrained(folder)
    found = export(folder, tmp_path / "out")
    assert [kind["layers"] for kind in found.cut["layers"]["kinds"]] == [[0, 2, 3], [1]]
    assert found.cut["layers"]["verified"] == 2
    assert found.cut["traced_layers"] == {"body": 2}
    check_all_layers(folder, found)
