"""What an export looks like on disk, and when it is made again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.errors import ArtifactError, ExportError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.plugins.manager import Plugins

if TYPE_CHECKING:
    from qeff_proxy.parts import Proxy

HOOKS = Plugins.discover().hooks_for("gpt2")


def test_a_split_holds_what_the_design_says(demo_export: Path) -> None:
    export = read_export(demo_export)
    assert [part.name for part in export.parts] == ["embedding", "body", "lm_head"]
    assert export.part("embedding").inputs[0].shape == ("batch", "query")
    body = export.part("body")
    names = [spec.name for spec in body.inputs]
    assert names[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert names[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert body.inputs[1].shape == ("batch", 1, "query", "past + query")
    assert body.inputs[3].shape == ("batch", 6, "past", 16)
    assert [spec.name for spec in body.outputs[:2]] == ["last_hidden_state", "present.0.key"]
    assert body.outputs[1].shape == ("batch", 6, "past + query", 16)


def test_every_graph_passes_the_checker_and_names_its_axes(demo_export: Path) -> None:
    for part in read_export(demo_export).parts:
        path = demo_export / part.file
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        for value, spec in zip(graph.input, part.inputs, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert tuple(d.dim_param or d.dim_value for d in dims) == spec.shape


def test_tied_weights_are_stored_once_and_apart_from_the_body(demo_export: Path) -> None:
    vocabulary = read_header(demo_export / "vocabulary.safetensors")
    assert list(vocabulary) == ["transformer.wte.weight"]
    body = read_header(demo_export / "body.safetensors")
    assert "transformer.wpe.weight" in body
    assert "transformer.wte.weight" not in body
    places = [(place.offset, place.length) for place in body.values()]
    assert len(set(places)) == len(places)


def test_the_bytes_on_disk_are_those_of_the_weights(
    demo_export: Path, demo_checkpoint: Path
) -> None:
    written = sum(path.stat().st_size for path in demo_export.glob("*.safetensors"))
    assert written < 1.02 * (demo_checkpoint / "model.safetensors").stat().st_size


def test_the_graphs_point_into_the_weights_files(demo_export: Path) -> None:
    model = onnx.load(demo_export / "body.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    assert len(outside) == len(read_header(demo_export / "body.safetensors"))
    for tensor in outside:
        assert {e.key: e.value for e in tensor.external_data}["location"] == "body.safetensors"
    inside = [t for t in model.graph.initializer if t.data_location != t.EXTERNAL]
    assert all(len(t.raw_data) < 1024 for t in inside)


def test_nothing_of_the_machine_is_left_in_the_graphs(demo_export: Path) -> None:
    for path in demo_export.glob("*.onnx"):
        data = path.read_bytes()
        assert b"site-packages" not in data
        assert b"/home/" not in data
        assert b".py" not in data


def test_the_same_request_again_is_a_lookup(saved_gpt2: Path, home: Path) -> None:
    stages: list[str] = []
    first = export_model(load_model(str(saved_gpt2)), HOOKS, progress=stages.append)
    assert "tracing body" in stages
    assert first.folder.parent == home
    stages.clear()
    loaded = load_model(str(saved_gpt2))
    assert export_model(loaded, HOOKS, progress=stages.append).folder == first.folder
    assert stages == []
    assert "model" not in vars(loaded)  # not even the weights were read


def test_another_kind_dtype_or_checkpoint_is_another_folder(saved_gpt2: Path, home: Path) -> None:
    from qeff_proxy.artifact.export_folder import export_folder
    from qeff_proxy.export.cache_key import export_key

    def folder(**how: Any) -> Path:
        loaded = load_model(str(saved_gpt2), dtype=how.pop("dtype", "float32"))
        return export_folder("x", export_key(loaded, HOOKS, how.pop("kind", "split"), None))

    assert folder() == folder()
    assert len({folder(), folder(kind="stub"), folder(dtype="float16")}) == 3
    before = folder()
    weights = saved_gpt2 / "model.safetensors"
    status = weights.stat()
    try:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert folder() != before
    finally:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "export.json").write_text("{"), "damaged"),
        (lambda f: (f / "export.json").write_text("[]"), "damaged"),
        (lambda f: (f / "export.json").unlink(), "holds no export"),
        (lambda f: (f / "body.onnx").write_bytes(b"x"), "damaged or was edited"),
        (lambda f: os.truncate(f / "body.safetensors", 999), "does not have its"),
        (lambda f: (f / "vocabulary.safetensors").unlink(), "does not have its"),
    ],
)
def test_a_damaged_export_is_not_taken_for_one(
    damage: Any, message: str, demo_export: Path, tmp_path: Path
) -> None:

    folder = tmp_path / "copy"
    shutil.copytree(demo_export, folder)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        read_export(folder)


@pytest.mark.parametrize("name", ["../body.onnx", "/etc/passwd", "a/b.onnx", ""])
def test_a_manifest_cannot_point_out_of_its_folder(
    name: str, demo_export: Path, tmp_path: Path
) -> None:
    value = json.loads((demo_export / "export.json").read_text())
    value["parts"][1]["file"] = name
    (tmp_path / "export.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="is not a file name"):
        read_export(tmp_path)


def test_half_precision_is_exported_as_such(make_model: Any) -> None:
    model = make_model("llama").half()
    export = export_model(wrap_model(model), Plugins.discover().hooks_for("llama"))
    assert export.dtype == "float16"
    assert export.cut["verified"]["dtype"] == "float16"
    assert {place.dtype for place in read_header(export.folder / "body.safetensors").values()} == {
        "F16"
    }
    assert export.part("body").inputs[0].dtype == "float16"
    assert export.cut["graphs"]["body"] < 2e-2


def test_a_stub_has_no_vocabulary_and_takes_the_originals_inputs(make_model: Any) -> None:
    import onnxruntime

    model = make_model("llama")
    export = export_model(wrap_model(model), Plugins.discover().hooks_for("llama"), "stub")
    (part,) = export.parts
    assert [spec.name for spec in part.inputs[:3]] == [
        "input_ids",
        "attention_mask",
        "position_ids",
    ]
    stored = read_header(export.folder / "model.safetensors")
    assert not any(131 in place.shape for place in stored.values())
    session = onnxruntime.InferenceSession(export.folder / part.file)
    feeds = {
        "input_ids": np.array([[5, 7]]),
        "attention_mask": np.array([[[[0, -1e9], [0, 0]]]], np.float32),
        "position_ids": np.array([[0, 1]]),
    }
    for spec in part.inputs[3:]:
        feeds[spec.name] = np.zeros((1, 2, 0, 16), np.float32)
    (logits,) = session.run(["logits"], feeds)
    assert logits.shape == (1, 2, 64)  # hidden states, passed through
    embeddings = torch.tensor([[5.0, 7.0]])[..., None].expand(1, 2, 64)
    with torch.no_grad():
        expected = model.model(inputs_embeds=embeddings).last_hidden_state
    assert np.abs(logits - expected.numpy()).max() < 1e-4


def test_the_whole_model_is_one_graph(make_model: Any) -> None:
    export = export_model(
        wrap_model(make_model("gpt2")), Plugins.discover().hooks_for("gpt2"), "whole"
    )
    assert [part.name for part in export.parts] == ["model"]
    assert export.parts[0].outputs[0].shape == ("batch", "query", 131)
    assert export.cut["verified"]["max_difference"] < 1e-4


def test_a_graph_that_froze_a_size_inside_is_refused(make_model: Any, tmp_path: Path) -> None:
    import dataclasses

    from qeff_proxy.hookspecs import hookimpl
    from torch import nn

    generic = Plugins().hooks_for("none-such")

    class Frozen(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(last_hidden_state=last_hidden_state)["logits"]
            if torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling():
                logits = logits + torch.ones(3, 1)  # the query length of the trace
            return {"logits": logits}

    class Plugin:
        @hookimpl
        def build_proxy(self, model: Any, embedding: Any, lm_head: Any, kind: Any) -> Proxy:
            proxy = generic.build_proxy(model, embedding, lm_head, kind)
            parts = list(proxy.parts)
            parts[2] = dataclasses.replace(parts[2], module=Frozen(parts[2].module))
            return dataclasses.replace(proxy, parts=tuple(parts))

    plugins = Plugins()
    plugins.register(Plugin(), ["gpt2"], name="freezer")
    with pytest.raises(ExportError, match="lm_head part"):
        export_model(
            wrap_model(make_model("gpt2")), plugins.hooks_for("gpt2"), output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_model_whose_code_needs_a_later_layer_is_cut_with_more(
    make_model: Any, tmp_path: Path
) -> None:
    import dataclasses

    from qeff_proxy.hookspecs import hookimpl
    from torch import nn

    generic = Plugins().hooks_for("none-such")

    class Reaching(nn.Module):
        def __init__(self, body: nn.Module, layers: nn.ModuleList) -> None:
            super().__init__()
            self.body = body
            self.layers = (layers,)  # not registered again

        def forward(self, **tensors: torch.Tensor) -> Any:
            _ = self.layers[0][3]  # IndexError with two layers
            return self.body(**tensors)

    class Plugin:
        @hookimpl
        def build_proxy(self, model: Any, embedding: Any, lm_head: Any, kind: Any) -> Proxy:
            proxy = generic.build_proxy(model, embedding, lm_head, kind)
            embedding_part, body, *others = proxy.parts
            body = dataclasses.replace(body, module=Reaching(body.module, model.transformer.h))
            return dataclasses.replace(proxy, parts=(embedding_part, body, *others))

    plugins = Plugins()
    plugins.register(Plugin(), ["gpt2"], name="reaching")
    make_model("gpt2", layers=6).save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"))
    export = export_model(loaded, plugins.hooks_for("gpt2"), output=tmp_path / "out")
    layers = export.cut["layers"]
    assert (layers["count"], layers["verified"]) == (6, 4), export.cut


def test_an_opset_that_cannot_be_had_is_refused(make_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"opset is 3\. It must be a whole number from 18"):
        export_model(wrap_model(make_model("gpt2")), HOOKS, output=tmp_path / "out", opset=3)
    assert not (tmp_path / "out").exists()


def test_weights_of_the_same_size_and_time_are_told_apart(make_model: Any, tmp_path: Path) -> None:
    from qeff_proxy.load.checkpoint_files import checkpoint_identity

    identities = []
    for scale in (1.0, 1.5):
        model = make_model("gpt2")
        model.transformer.h[1].mlp.c_fc.weight.data *= scale
        model.save_pretrained(tmp_path / "model")
        os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))
        identities.append(checkpoint_identity(tmp_path / "model"))
    assert identities[0] != identities[1]


def test_a_hash_of_another_kind_is_refused(demo_export: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from qeff_proxy.artifact.export_folder import check_weights_of, read_export

    found = read_export(demo_export)
    check_weights_of(found)
    plain = {name: digest.removeprefix("blake3:") for name, digest in found.hashes.items()}
    with pytest.raises(ArtifactError, match=r"is not blake3:.* Export the model again"):
        check_weights_of(replace(found, hashes=plain))
