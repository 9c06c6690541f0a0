"""`--weights keep`: the graph computes its weights from the checkpoint's own codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from qeff_proxy.cli import main
from qeff_proxy.compare import Tolerances
from qeff_proxy.errors import UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from safetensors.torch import load_file, save_file

IDS = [list(range(3, 19))]


def quantize(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """int4 in groups of 32 with zero points, as compressed-tensors packs it."""
    rows = weight.shape[0]
    groups = weight.float().view(rows, -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).to(dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    shifts = torch.arange(0, 32, 4)
    words = (codes.view(rows, -1, 8).long() << shifts).sum(-1)
    points = (zeros.t().reshape(zeros.shape[1], -1, 8).long() << shifts).sum(-1).t()
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": scales,
        "weight_zero_point": points.to(torch.int32).contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    make_model("llama", layers=5).save_pretrained(folder)
    stored = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." not in key or tensor.dim() == 1:
            stored[key] = tensor
            continue
        dtype = torch.float16 if "mlp" in key else torch.float32
        pieces = quantize(tensor, dtype)
        stored |= {key.replace("weight", name): value for name, value in pieces.items()}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    groups = {"all": {"targets": ["Linear"], "weights": {**weights, "group_size": 32}}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kept") / "export"
    hooks = Plugins.discover().hooks_for("llama")
    export_model(load_model(str(checkpoint)), hooks, output=output, weights="keep")
    return output


def test_the_export_holds_the_codes_of_the_checkpoint_and_no_more(
    kept: Path, checkpoint: Path
) -> None:
    written = sum(place.length for place in read_header(kept / "body.safetensors").values())
    held = read_header(checkpoint / "model.safetensors")
    layers = sum(place.length for key, place in held.items() if ".layers." in key)
    assert written < 1.05 * layers
    cut = json.loads((kept / "export.json").read_text())["cut"]
    assert cut["weights"].startswith("streamed")
    assert cut["kept"]["body"] == 35
    graph = onnx.load(kept / "body.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 35
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {kinds[node.input[0]] for node in nodes} == {onnx.TensorProto.UINT4}


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, None),
        # The runtime does not round weights to the dtype of their scales, as PyTorch does.
        ({"weights": "keep"}, Tolerances.parse(["*=peak:2e-3"])),
    ],
)
def test_it_computes_what_pytorch_computes_with_the_dequantized_weights(
    options: dict[str, Any], limits: Tolerances | None, kept: Path, checkpoint: Path
) -> None:
    settings = VerifyOptions(backends={"onnxruntime": options}, tolerances=limits)
    result = verify_model(
        kept, request=Request(inputs={"input_ids": IDS}), options=settings
    ).results[0]
    assert result.failure is None
    assert result.passed
    plain = load_model(str(checkpoint)).model
    tokens = plain.generate(torch.tensor(IDS), max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = b"".join(file.read_bytes() for file in kept.glob("compiled/onnxruntime-*/*.onnx"))
    assert (b"MatMulNBits" in text) == bool(options)
    assert result.run.outputs["generated_ids"].tolist() == tokens[:, 16:].tolist()


def test_a_verified_checkpoint_can_keep_its_codes_and_is_compared_layer_by_layer(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(map(str, IDS[0]))
    arguments = ["--weights", "keep", "--ids", ids, "--output", str(tmp_path / "out")]
    assert main(["verify", str(checkpoint), *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["cut"]["kept"]["body"] == 35
    assert manifest["settings"]["taps"] == ["layers"]
    assert main(["verify", str(tmp_path / "out"), "--weights", "copy"]) == 2
    assert "--weights copy contradicts" in capsys.readouterr().err
    assert main(["export", str(checkpoint), *arguments[:2], "--output", str(tmp_path / "two")]) == 0
    assert "kept as the checkpoint's codes: 35 weights" in capsys.readouterr().out


def test_a_checkpoint_without_codes_is_refused_before_anything_is_read(
    make_model: Any, tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "plain")
    hooks = Plugins.discover().hooks_for("llama")
    stages: list[str] = []
    with pytest.raises(UsageError, match="has no codes that can be kept"):
        export_model(
            *(load_model(str(tmp_path / "plain")), hooks),
            output=tmp_path / "out",
            weights="keep",
            progress=stages.append,
        )
    assert not stages
    assert not (tmp_path / "out").exists()
