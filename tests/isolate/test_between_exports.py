"""Two exports of one model: the operator in which they differ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_faults import REQUEST, Fault, attribute
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import read_manifest
from qeff_proxy.cli import main
from qeff_proxy.export.export_model import export_model
from qeff_proxy.isolate import isolate_between, run_capsule
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer.calls import calls_of, calls_on_ids, job_of, plain_ids
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

OPTIONS = VerifyOptions(max_new_tokens=1)


@pytest.fixture(scope="module")
def exports(checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exports")
    loaded = load_model(str(checkpoint))
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    first = export_model(loaded, hooks, output=folder / "first", taps="layers").folder
    return first, Path(shutil.copytree(first, folder / "second"))


def between(exports: tuple[Path, Path], **more: Any) -> Any:
    first, second = (read_export(folder) for folder in exports)
    return isolate_between(first, second, REQUEST, OPTIONS, **more)


def flip_bit(export: Path, weight: str) -> None:
    """Flip an exponent bit of one element: it becomes nearly 0."""
    (file,) = export.glob("body*.safetensors")
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + size])[weight]["data_offsets"]
    place = 8 + size + begin + 40
    data[place + 3] ^= 1 << 5
    file.write_bytes(data)


def test_one_wrong_bit_between_two_exports(exports, tmp_path):
    assert between(exports).healthy
    weight = "model.layers.4.mlp.up_proj.weight"
    flip_bit(exports[1], weight)
    path = tmp_path / "bit.zip"
    fault = between(exports, capsule=path)
    flip_bit(exports[1], weight)  # as it was
    assert fault.where == "body layer 4"
    (cause,) = fault.causes
    assert [operator.weights for operator in cause.operators] == [(weight,)]
    assert cause.remaining == 0 < cause.error
    again = run_capsule(path, "onnxruntime")  # the wrong bit is in the capsule
    assert again.shows, (again.recorded, again.error)
    assert again.error == pytest.approx(again.recorded, rel=1e-3)


def test_another_opset_is_the_same_model(exports, checkpoint, tmp_path):
    loaded = load_model(str(checkpoint))
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    other = export_model(loaded, hooks, output=tmp_path / "opset", taps="layers", opset=21)
    assert between((exports[0], other.folder)).healthy
    part = other.part("body")
    model = ir.load(other.folder / part.file)
    Fault("Softmax", "layers.3.self_attn", attribute("axis", 2))(model)
    ir.save(model, other.folder / part.file)
    first = read_export(exports[0])
    second = replace(
        read_manifest(other.folder),
        parts=tuple(replace(one, sha256=sha256_of(other.folder / one.file)) for one in other.parts),
    )
    fault = isolate_between(first, second, REQUEST, OPTIONS)
    assert fault.where == "body layer 3"
    assert [o.operator for cause in fault.causes for o in cause.operators] == ["Softmax"]


def test_exports_of_other_taps_are_refused(exports, checkpoint, tmp_path, capsys):
    loaded = load_model(str(checkpoint))
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    other = export_model(loaded, hooks, output=tmp_path / "plain").folder
    assert main(["isolate", str(exports[0]), "--against", str(other)]) == 2
    assert "is in one of the exports only" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_token_ids_are_called_with_as_the_flow_does(kind, make_model, tmp_path):
    """The flow is transformers' generation loop; LFM2 takes a position at a time."""
    changes = {"layer_types": ["conv", "full_attention"] * 3, "full_attn_idxs": None}
    model = make_model(kind, layers=6, **(changes if kind == "lfm2" else {}))
    export = export_model(
        wrap_model(model), Plugins.discover().hooks_for(kind), output=tmp_path / "e", taps="layers"
    )
    options = VerifyOptions(max_new_tokens=11)
    ids = plain_ids(export, REQUEST, options)
    assert ids is not None
    flow = partial(calls_of, job_of(export, options, {"input_ids": torch.from_numpy(ids)}))
    known: dict[str, Any] = {}
    for part in export.parts:
        ours = calls_on_ids(export, part.name, known, ids, 11)
        theirs = flow(part.name, known)
        assert [(c.step, c.past) for c in ours] == [(c.step, c.past) for c in theirs]
        for one, two in zip(ours, theirs, strict=True):
            assert one.inputs.keys() == two.inputs.keys()
            for name, array in one.inputs.items():
                np.testing.assert_array_equal(array, two.inputs[name])
        if part.name == "embedding":  # as the weights give it, so that not all is zero
            table = model.get_input_embeddings().weight.detach().numpy()
            known[part.name] = [{"inputs_embeds": table[call.inputs["input_ids"]]} for call in ours]


def test_a_folder_is_no_place_for_a_capsule(exports, tmp_path, capsys):
    first, second = map(str, exports)
    assert main(["isolate", first, "--against", second, "--capsule", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_what_is_more_than_token_ids_goes_through_the_flow(exports):
    export = read_export(exports[0])
    rows = export.settings["embedding_rows"]
    wrong = [[[1, rows]], [[-1, 2]], [1, 2], [[]], [[0.5, 1]], [[3] * 600], [[1, 2], [3]]]
    for ids in wrong:
        assert plain_ids(export, Request(inputs={"input_ids": ids}), OPTIONS) is None
    assert plain_ids(export, Request(prompts=["Hi"]), OPTIONS) is None
    masked = Request(inputs={"input_ids": [[1, 2]], "attention_mask": [[0, 1]]})
    assert plain_ids(export, masked, OPTIONS) is None
    assert plain_ids(export, None, OPTIONS) is not None


def test_two_exports_of_a_decoder_need_no_pytorch(exports):
    code = (
        "import sys; from qeff_proxy.cli import main; "
        f"assert main(['isolate', {str(exports[0])!r}, '--against', {str(exports[1])!r}]) == 0; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
