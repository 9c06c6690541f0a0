"""Quantized checkpoints: the weights are those that the format's own implementation computes.

compressed-tensors, bitsandbytes and transformers quantize and dequantize what they can on a CPU;
GPTQ and AWQ are packed here as AutoGPTQ and AutoAWQ pack them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_tensors import checkpoint_tensors
from qeff_proxy.load.load_model import load_model
from safetensors.torch import load_file, save_file

ROWS, COLUMNS = 48, 96
Stored = dict[str, torch.Tensor]
#: Tensors stored, settings of the config, and the weight they stand for.
Quantized = tuple[Stored, dict[str, Any], torch.Tensor]


WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7))


def by_groups(
    weight: torch.Tensor, size: int, bits: int, *, shuffled: bool = False
) -> tuple[torch.Tensor, ...]:
    """Codes [rows, columns], scales and zero points [rows, groups] (fp16), groups, weight."""
    groups = torch.arange(weight.shape[1]) // size
    if shuffled:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    low = torch.stack([weight[:, groups == g].amin(1) for g in groups.unique()], 1)
    high = torch.stack([weight[:, groups == g].amax(1) for g in groups.unique()], 1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1).to(torch.int32)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.int32)
    return codes, scales, zeros, groups, (codes - zeros[:, groups]).half() * scales[:, groups]


def pack(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack the last axis into 32-bit words, as AutoGPTQ's and AutoAWQ's loops do."""
    each = 32 // bits
    words = torch.zeros(*codes.shape[:-1], -(-codes.shape[-1] // each), dtype=torch.int64)
    for column in range(codes.shape[-1]):
        place = column % each
        place = place if order is None else order.index(place)
        words[..., column // each] |= codes[..., column].long() << bits * place
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(
    weight: torch.Tensor, bits: int = 4, *, act_order: bool = False, layout: str = "gptq"
) -> Quantized:
    codes, scales, zeros, groups, weight = by_groups(weight, 32, bits, shuffled=act_order)
    stored = {
        "X.qweight": pack(codes, bits).t(),
        "X.scales": scales.t(),
        "X.qzeros": pack(zeros.t() - int(layout == "gptq"), bits),
        "X.g_idx": groups.to(torch.int32),
    }
    settings = {"bits": bits, "group_size": 32, "desc_act": act_order, "checkpoint_format": layout}
    return stored, {"quant_method": "gptq", **settings}, weight


def awq(weight: torch.Tensor) -> Quantized:
    codes, scales, zeros, _, weight = by_groups(weight, 32, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "X.qweight": pack(codes.t(), 4, order),
        "X.scales": scales.t(),
        "X.qzeros": pack(zeros.t(), 4, order),
    }
    settings = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return stored, {"quant_method": "awq", **settings}, weight


def fp8(
    weight: torch.Tensor, block: tuple[int, int] | None = None, *, by_row: bool = False
) -> Quantized:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape
    grid = (rows // block[0], columns // block[1]) if block else (rows, 1) if by_row else ()
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.5
    codes = weight.to(torch.float8_e4m3fn)
    method = "fbgemm_fp8" if by_row else "fp8"
    weight = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    name = "X.weight_scale_inv" if method == "fp8" else "X.weight_scale"
    stored = {"X.weight": codes, name: scales, "X.activation_scale": torch.ones(())}
    return stored, {"quant_method": method, "weight_block_size": block}, weight


def fp8_with_smaller_blocks_at_the_edge(weight: torch.Tensor) -> Quantized:
    codes, scales = weight.to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5
    spread = scales.repeat_interleave(32, 0)[:ROWS].repeat_interleave(40, 1)[:, :COLUMNS]
    stored = {"X.weight": codes, "X.weight_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": [32, 40]}
    return stored, settings, codes.float() * spread


def mxfp4(_: torch.Tensor) -> Quantized:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, ROWS, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, ROWS, 3), dtype=torch.uint8, generator=generator)
    weight = convert_moe_packed_tensors(blocks, scales)
    return {"X_blocks": blocks, "X_scales": scales}, {"quant_method": "mxfp4"}, weight


def compressed(
    weight: torch.Tensor, layout: str, dtype: torch.dtype = torch.bfloat16, **weights: Any
) -> Quantized:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    rows, columns = weight.shape
    strategy, size = settings["strategy"], settings.get("group_size") or columns
    blocks = weight.view(rows, -1, size)
    if strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    elif strategy == "block":
        blocks = weight.view(rows // 16, 16, columns // 32, 32)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = blocks.amin(-1), blocks.amax(-1)
    scales, zeros = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight.to(dtype), "weight_scale": scales.to(dtype)}
    state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = compressor.compress(state, scheme)
    weight = compressor.decompress(dict(state), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    config["quantization_status"] = "compressed"
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": settings}}
    return {f"X.{name}": tensor for name, tensor in state.items()}, config, weight


def int4_of_eight_rows(weight: torch.Tensor) -> Quantized:
    """Whose zero points fill one word of a column: compressed-tensors' own code fails on them."""
    settings = compressed(weight, "pack-quantized", group_size=32, symmetric=False)[1]
    codes, scales, zeros, _, weight = by_groups(weight[:8], 32, 4)
    stored = {"X.weight_packed": pack(codes, 4), "X.weight_scale": scales}
    stored["X.weight_zero_point"] = pack(zeros.t(), 4).t()
    return {**stored, "X.weight_shape": torch.tensor(weight.shape)}, settings, weight


def bitsandbytes_4(
    weight: torch.Tensor, kind: str, *, nested: bool, dtype: torch.dtype = torch.bfloat16
) -> Quantized:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.to(dtype), quant_type=kind, compress_statistics=nested)
    stored = {f"X.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings |= {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": nested}
    return {"X.weight": codes, **stored}, settings, dequantize_4bit(codes, state)


def bitsandbytes_8(weight: torch.Tensor) -> Quantized:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight.half())
    stored = {
        "X.weight": codes,
        "X.SCB": scales,
        "X.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    weight = int8_vectorwise_dequant(codes, scales)
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, weight


FORMATS: dict[str, Callable[[torch.Tensor], Quantized]] = {
    "fp8 in blocks": partial(fp8, block=(16, 32)),
    "fp8 by tensor": fp8,
    "fp8 by channel": partial(fp8, by_row=True),
    "fp8 in blocks that do not divide": fp8_with_smaller_blocks_at_the_edge,
    "mxfp4": mxfp4,
    "gptq of 4 bits": gptq,
    "gptq of 4 bits in act-order": partial(gptq, act_order=True),
    "gptq of 8 bits": partial(gptq, bits=8),
    "gptq of 2 bits": partial(gptq, bits=2),
    "gptq_v2": partial(gptq, layout="gptq_v2"),
    "awq": awq,
    "int4": partial(compressed, layout="pack-quantized", group_size=32),
    "int4 with zero points": partial(
        compressed, layout="pack-quantized", group_size=32, symmetric=False
    ),
    "int4 of eight rows": int4_of_eight_rows,
    "int8 packed by channel": partial(
        compressed, layout="pack-quantized", strategy="channel", num_bits=8, symmetric=False
    ),
    "int4 by tensor": partial(compressed, layout="pack-quantized", strategy="tensor"),
    "int8": partial(compressed, layout="int-quantized", num_bits=8, strategy="channel"),
    "int8 with zero points": partial(
        compressed, layout="int-quantized", num_bits=8, group_size=32, symmetric=False
    ),
    "float8 by tensor": partial(
        compressed, layout="float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "float8 by channel": partial(
        compressed,
        layout="naive-quantized",
        dtype=torch.float32,
        num_bits=8,
        type="float",
        strategy="channel",
    ),
    "float8 in blocks": partial(
        compressed,
        layout="float-quantized",
        num_bits=8,
        type="float",
        strategy="block",
        block_structure=[16, 32],
    ),
    "nf4": partial(bitsandbytes_4, kind="nf4", nested=False),
    "nf4 with nested scales": partial(bitsandbytes_4, kind="nf4", nested=True, dtype=torch.float16),
    "fp4 with nested scales": partial(bitsandbytes_4, kind="fp4", nested=True, dtype=torch.float32),
    "llm.int8": bitsandbytes_8,
}


def save(folder: Path, stored: Stored, **config: Any) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_one_that_the_format_stands_for(name: str, tmp_path: Path) -> None:
    stored, settings, weight = FORMATS[name](WEIGHT)
    save(tmp_path, {**stored, "Y.weight": torch.ones(2)})
    held = checkpoint_tensors(tmp_path, {"quantization_config": settings})
    assert held.keys() == {"X" if name == "mxfp4" else "X.weight", "Y.weight"}
    found = next(value for key, value in held.items() if key.startswith("X"))
    computed = found.read()
    assert computed.shape == weight.shape == found.shape
    assert computed.dtype == weight.dtype
    # A rounding may fall to the other side: bitsandbytes multiplies by a constant near 1/127.
    torch.testing.assert_close(computed, weight, rtol=2e-7, atol=0)


def quantize_checkpoint(
    source: Path, folder: Path, quantize: Callable[[torch.Tensor], Quantized]
) -> Path:
    """Quantize the matrices of the layers of a checkpoint; returns what they stand for, plain."""
    stored, plain, settings = {}, {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in key and tensor.dim() == 2 and not key.endswith("mlp.gate.weight"):
            pieces, settings, plain[key] = quantize(tensor)
            name = key.removesuffix(".weight")
            stored |= {name + piece[1:]: values for piece, values in pieces.items()}
        else:
            stored[key] = plain[key] = tensor
    (folder / "plain").mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    save(folder / "plain", {key: tensor.float() for key, tensor in plain.items()}, **config)
    save(folder, stored, **config, quantization_config=settings)
    return folder / "plain"


def check_export(folder: Path, expected: Any, output: Path) -> None:
    """An export of a quantized checkpoint has the weights and tokens of a model of transformers."""
    model = QEFFAutoModelForCausalLM.from_pretrained(folder, proxy="split")
    model.export(output)
    assert json.loads((output / "export.json").read_text())["cut"]["weights"].startswith("streamed")
    weights = load_file(output / "body.safetensors")
    state = expected.state_dict()
    assert len(weights) > 30
    for name, weight in weights.items():
        torch.testing.assert_close(weight, state[name], rtol=2e-7, atol=0)
    ids = torch.arange(3, 23)[None]
    tokens = expected.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 20:]
    result = model.generate(inputs={"input_ids": ids}, max_new_tokens=8, do_sample=False)
    assert result.generated_ids.tolist() == tokens.tolist()


def dequantized(folder: Path, name: str) -> Any:
    """The model as transformers loads it from the codes, or from the plain weights if it cannot."""
    from transformers import (
        AutoModelForCausalLM,
        CompressedTensorsConfig,
        FineGrainedFP8Config,
        Mxfp4Config,
    )

    arguments: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    kinds = {"fp8": FineGrainedFP8Config, "int4": CompressedTensorsConfig, "mxfp4": Mxfp4Config}
    if name.split()[0] in kinds:
        arguments["quantization_config"] = kinds[name.split()[0]](dequantize=True)
    elif name.split()[0] != "nf4":
        folder = folder / "plain"
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    return model.dequantize().float() if name.startswith("nf4") else model


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("fp8 in blocks", "qwen3_moe"),
        ("gptq of 4 bits in act-order", "llama"),
        ("int4 with zero points", "llama"),
        ("nf4 with nested scales", "llama"),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_deep_quantized_checkpoint_is_streamed(
    name: str, model_type: str, make_model: Any, tmp_path: Path
) -> None:
    make_model(model_type, layers=5).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "codes", FORMATS[name])
    check_export(tmp_path / "codes", dequantized(tmp_path / "codes", name), tmp_path / "export")


def test_experts_in_mxfp4_are_streamed(make_model: Any, tmp_path: Path) -> None:
    make_model("gpt_oss", layers=6).save_pretrained(tmp_path / "source")
    generator = torch.Generator().manual_seed(5)
    stored = {}
    for key, tensor in load_file(tmp_path / "source" / "model.safetensors").items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 125, shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "codes").mkdir()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    save(tmp_path / "codes", stored, **config, quantization_config=settings)
    check_export(tmp_path / "codes", dequantized(tmp_path / "codes", "mxfp4"), tmp_path / "export")


def changed(stored: Stored, key: str, change: Any) -> Stored:
    """The tensors with one changed, or without it."""
    return {
        name: change(tensor) if name == key else tensor
        for name, tensor in stored.items()
        if name != key or change is not None
    }


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("gptq of 4 bits", "X.scales", None, r"holds X.qweight without its X.scales"),
        (
            "gptq of 4 bits",
            "X.scales",
            lambda t: t[:2],
            r"X.scales in .*safetensors has shape \[2,",
        ),
        ("gptq of 4 bits", "X.qzeros", lambda t: t.float(), r"X.qzeros in .* is of float32"),
        (
            "awq",
            "X.qzeros",
            lambda t: t[:, :3],
            r"X.qzeros .* with groups of 32 takes \[3, 6",
        ),
        ("fp8 in blocks", "X.weight_scale_inv", None, "holds X.weight without its X.weight_scale"),
        (
            "fp8 in blocks",
            "X.weight_scale_inv",
            lambda t: t[:1],
            r"in blocks of 16 x 32 takes \[3,",
        ),
        (
            "fp8 by channel",
            "X.weight_scale",
            lambda t: t[:9],
            r"X.weight_scale in .*shape \[9, 1\]",
        ),
        ("mxfp4", "X_scales", None, "holds X_blocks without its X_scales"),
        ("mxfp4", "X_blocks", lambda t: t[..., :8], "X_blocks in .* and not .experts"),
        ("int4", "X.weight_scale", lambda t: t[:, :2], r"X.weight_scale in .* takes \[48, 3\]"),
        ("int4", "X.weight_shape", None, "without its X.weight_shape"),
        (
            "int4",
            "X.weight_packed",
            lambda t: t[:, :5],
            r"X.weight_packed in .* has shape \[48, 5\]",
        ),
        ("int4 with zero points", "X.weight_zero_point", None, "without its X.weight_zero_point"),
        ("int8", "X.weight_scale", None, "holds X.weight without its X.weight_scale"),
        ("nf4", "X.weight.absmax", lambda t: t[:7], r"X.weight.absmax in .* has shape \[7\]"),
        ("nf4", "X.weight", lambda t: t[:7], r"X.weight in .* has 7 bytes, where \[48, 96\] takes"),
        (
            "nf4",
            "X.weight.quant_state.bitsandbytes__nf4",
            None,
            r"X.weight in .* is quantized, but",
        ),
        ("nf4", "X.weight.quant_state.bitsandbytes__nf4", lambda t: t[:9], "is no description"),
        ("llm.int8", "X.SCB", None, r"X.weight in .* is quantized, but"),
        ("llm.int8", "X.weight_format", lambda t: t + 1, "in the layout 1 of X.weight_format"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_named_with_their_file(
    name: str, key: str, change: Any, message: str, tmp_path: Path
) -> None:
    stored, settings, _ = FORMATS[name](WEIGHT)
    save(tmp_path, changed(stored, key, change))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_tensors(tmp_path, {"quantization_config": settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gptq of 4 bits",
            {"group_size": 64},
            r"X.scales in .* bits and groups of 64 takes \[2, 48",
        ),
        ("gptq of 4 bits", {"bits": 3}, "GPTQ weights of 3 bits"),
        ("gptq of 4 bits", {"checkpoint_format": "marlin"}, "in the layout 'marlin'"),
        ("gptq of 4 bits", {"dynamic": {"+:down": {"bits": 8}}}, "settings for single modules"),
        ("awq", {"group_size": 48}, "with groups of 48 takes"),
        ("awq", {"group_size": 64}, "X.qweight in .* has 96 inputs, which are no groups of 64"),
        ("awq", {"version": "gemv"}, "in the layout 'gemv'"),
        ("fp8 in blocks", {"weight_block_size": [128, 128]}, r"takes \[1, 1\]"),
        ("int4", {"format": "marlin-24"}, "compressed-tensors' format 'marlin-24'"),
        ("int4", {"config_groups": {}}, "no settings of quantization_config"),
        ("int4", {"transform_config": {"config_groups": {"R4": {}}}}, "weights that were rotated"),
        ("int4", {"quant_method": "hqq"}, "quantized with hqq, which are not supported"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stored, settings, _ = FORMATS[name](WEIGHT)
    save(tmp_path, stored)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_tensors(tmp_path, {"quantization_config": {**settings, **change}})


def test_a_scheme_that_differs_in_zero_points_only_is_told_by_them(tmp_path: Path) -> None:
    stored, settings, weight = FORMATS["int4 with zero points"](WEIGHT)
    groups = settings["config_groups"]
    symmetric = {**groups["group_0"]["weights"], "symmetric": True}
    settings["config_groups"] = {"first": {"targets": ["x"], "weights": symmetric}, **groups}
    save(tmp_path, stored)
    held = checkpoint_tensors(tmp_path, {"quantization_config": settings})
    torch.testing.assert_close(held["X.weight"].read(), weight, rtol=0, atol=0)


def test_act_order_without_groups_is_refused(tmp_path: Path) -> None:
    stored, settings, _ = FORMATS["int4"](WEIGHT)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    save(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"holds X.weight_packed without its X.weight_g_idx"):
        checkpoint_tensors(tmp_path, {"quantization_config": settings})


def test_gptq_in_act_order_without_its_groups_is_refused(tmp_path: Path) -> None:
    stored, settings, _ = gptq(WEIGHT, act_order=True)
    del stored["X.g_idx"]
    save(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"holds X.qweight without its X.g_idx"):
        checkpoint_tensors(tmp_path, {"quantization_config": settings})


def test_scaled_activations_of_awq_are_refused(tmp_path: Path) -> None:
    """transformers divides their outputs by these scales (`AWQ_SCALES_MAPPINGS`)."""
    stored, settings, _ = awq(WEIGHT)
    save(tmp_path, {**stored, "layers.0.mlp.act.scales": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.act.scales in .* is of no weight"):
        checkpoint_tensors(tmp_path, {"quantization_config": settings})


def test_what_is_stored_for_activations_and_caches_is_left_out(tmp_path: Path) -> None:
    stored, settings, weight = FORMATS["int8"](WEIGHT)
    also = ("input_scale", "input_zero_point", "output_zero_point", "k_scale", "v_scale")
    save(tmp_path, {**stored, **{f"X.{name}": torch.ones(1) for name in also}})
    held = checkpoint_tensors(tmp_path, {"quantization_config": settings})
    assert held.keys() == {"X.weight"}
    torch.testing.assert_close(held["X.weight"].read(), weight, rtol=2e-7, atol=0)


def test_scales_of_fp8_may_be_powers_of_two(tmp_path: Path) -> None:
    stored, settings, _ = fp8(WEIGHT, (16, 32))
    scales = stored["X.weight_scale_inv"].log2().round().exp2()
    save(tmp_path, {**stored, "X.weight_scale_inv": scales.to(torch.float8_e8m0fnu)})
    found = checkpoint_tensors(tmp_path, {"quantization_config": settings})["X.weight"].read()
    wide = scales.repeat_interleave(16, 0).repeat_interleave(32, 1)
    torch.testing.assert_close(found, stored["X.weight"].float() * wide, rtol=0, atol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_bias_that_a_quantizer_added_must_be_zeros(
    zeros: bool, make_model: Any, tmp_path: Path
) -> None:
    make_model("llama", layers=2).save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    bias = torch.zeros(96) if zeros else torch.ones(96)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    save(tmp_path, {**stored, "model.layers.0.mlp.up_proj.bias": bias}, **config)
    loaded = load_model(str(tmp_path))
    if zeros:
        assert loaded.model.model.layers[0].mlp.up_proj.bias is None
        return
    with pytest.raises(CheckpointError, match=r"up_proj.bias, which .* does not use"):
        _ = loaded.model


@pytest.mark.parametrize("settings", [None, {"quant_method": "awq"}])
def test_fp8_that_no_settings_speak_of_is_refused(settings: Any, tmp_path: Path) -> None:
    stored, _, _ = fp8(WEIGHT, (16, 32))
    save(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"X.weight in .*safetensors is of FP8, and the quan"):
        checkpoint_tensors(tmp_path, {"quantization_config": settings})


def test_an_input_in_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    stored, settings, _ = gptq(WEIGHT, act_order=True)
    save(tmp_path, changed(stored, "X.g_idx", lambda t: t + 1))
    weight = checkpoint_tensors(tmp_path, {"quantization_config": settings})["X.weight"]
    with pytest.raises(CheckpointError, match=r"X.g_idx in .* names groups 1 to 3"):
        weight.read()
