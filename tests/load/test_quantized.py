"""Quantized checkpoints: the weights are those that the format's own implementation computes.

compressed-tensors, bitsandbytes and transformers quantize and dequantize what they can on a CPU; GPTQ
and AWQ are packed here as AutoGPTQ and AutoAWQ pack them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_tensors import checkpoint_tensors
from safetensors.torch import load_file, save_file

ROWS, COLUMNS = 48, 96
Stored = dict[str, torch.Tensor]
#: Tensors stored, settings of the config, and the weight they stand for.
Quantized = tuple[Stored, dict[str, Any], torch.Tensor]


def weight_of(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


def by_groups(size: int, bits: int, order: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Codes [rows, columns], scales and zero points [rows, groups] (fp16), groups, weight."""
    weight = weight_of()
    groups = torch.arange(COLUMNS) // size
    if order is not None:
        groups = groups[order]
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


def gptq(bits: int, *, act_order: bool = False, layout: str = "gptq") -> Quantized:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    codes, scales, zeros, groups, weight = by_groups(32, bits, order if act_order else None)
    stored = {
        "X.qweight": pack(codes, bits).t(),
        "X.scales": scales.t(),
        "X.qzeros": pack(zeros.t() - int(layout == "gptq"), bits),
        "X.g_idx": groups.to(torch.int32),
    }
    settings = {"bits": bits, "group_size": 32, "desc_act": act_order, "checkpoint_format": layout}
    return stored, {"quant_method": "gptq", **settings}, weight


def awq() -> Quantized:
    codes, scales, zeros, _, weight = by_groups(32, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "X.qweight": pack(codes.t(), 4, order),
        "X.scales": scales.t(),
        "X.qzeros": pack(zeros.t(), 4, order),
    }
    settings = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return stored, {"quant_method": "awq", **settings}, weight


def fp8(block: tuple[int, int] | None, grid: tuple[int, ...], method: str = "fp8") -> Quantized:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = weight_of().to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.5
    weight = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    name = "X.weight_scale_inv" if method == "fp8" else "X.weight_scale"
    stored = {"X.weight": codes, name: scales, "X.activation_scale": torch.ones(())}
    return stored, {"quant_method": method, "weight_block_size": block}, weight


def fp8_with_smaller_blocks_at_the_edge() -> Quantized:
    codes, scales = weight_of().to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5
    spread = scales.repeat_interleave(32, 0)[:ROWS].repeat_interleave(40, 1)[:, :COLUMNS]
    stored = {"X.weight": codes, "X.weight_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": [32, 40]}
    return stored, settings, codes.float() * spread


def mxfp4() -> Quantized:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, ROWS, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, ROWS, 3), dtype=torch.uint8, generator=generator)
    weight = convert_moe_packed_tensors(blocks, scales)
    return {"X_blocks": blocks, "X_scales": scales}, {"quant_method": "mxfp4"}, weight


def compressed(layout: str, dtype: torch.dtype = torch.bfloat16, **weights: Any) -> Quantized:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    weight = weight_of()
    strategy, size = settings["strategy"], settings.get("group_size") or COLUMNS
    blocks = weight.view(ROWS, -1, size)
    if strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    elif strategy == "block":
        blocks = weight.view(ROWS // 16, 16, COLUMNS // 32, 32)
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
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": settings}}
    return {f"X.{name}": tensor for name, tensor in state.items()}, config, weight


def bitsandbytes_4(kind: str, *, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight_of(80, 256).to(dtype)
    codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    stored = {f"X.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return {"X.weight": codes, **stored}, settings, dequantize_4bit(codes, state)


def bitsandbytes_8() -> Quantized:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight_of().half())
    stored = {
        "X.weight": codes,
        "X.SCB": scales,
        "X.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    weight = int8_vectorwise_dequant(codes, scales)
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, weight


FORMATS: dict[str, Callable[[], Quantized]] = {
    "fp8 in blocks": lambda: fp8((16, 32), (3, 3)),
    "fp8 by tensor": lambda: fp8(None, ()),
    "fp8 by channel": lambda: fp8(None, (ROWS, 1), "fbgemm_fp8"),
    "fp8 in blocks that do not divide": fp8_with_smaller_blocks_at_the_edge,
    "mxfp4": mxfp4,
    "gptq of 4 bits": lambda: gptq(4),
    "gptq of 4 bits in act-order": lambda: gptq(4, act_order=True),
    "gptq of 8 bits": lambda: gptq(8),
    "gptq of 2 bits": lambda: gptq(2),
    "gptq_v2": lambda: gptq(4, layout="gptq_v2"),
    "awq": awq,
    "int4 in groups": lambda: compressed("pack-quantized", group_size=32),
    "int4 with zero points": lambda: compressed("pack-quantized", group_size=32, symmetric=False),
    "int8 packed by channel": lambda: compressed(
        "pack-quantized", strategy="channel", num_bits=8, symmetric=False
    ),
    "int4 by tensor": lambda: compressed("pack-quantized", strategy="tensor"),
    "int8": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "int8 with zero points": lambda: compressed(
        "int-quantized", num_bits=8, group_size=32, symmetric=False
    ),
    "float8 by tensor": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "float8 by channel": lambda: compressed(
        "naive-quantized", torch.float32, num_bits=8, type="float", strategy="channel"
    ),
    "float8 in blocks": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]
    ),
    "nf4": lambda: bitsandbytes_4("nf4", nested=False),
    "nf4 with nested scales": lambda: bitsandbytes_4("nf4", nested=True, dtype=torch.float16),
    "fp4 with nested scales": lambda: bitsandbytes_4("fp4", nested=True, dtype=torch.float32),
    "llm.int8": bitsandbytes_8,
}


def save(folder: Path, stored: Stored) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    (folder / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_one_that_the_format_stands_for(name: str, tmp_path: Path) -> None:
    stored, settings, weight = FORMATS[name]()
    save(tmp_path, {**stored, "Y.weight": torch.ones(2)})
    held = checkpoint_tensors(tmp_path, {"quantization_config": settings})
    assert held.keys() == {"X" if name == "mxfp4" else "X.weight", "Y.weight"}
    found = next(value for key, value in held.items() if key.startswith("X"))
    computed = found.read()
    assert computed.shape == weight.shape == found.shape
    assert computed.dtype == weight.dtype
    # One rounding may fall to the other side; bitsandbytes multiplies by a constant rounded to 1/127.
    torch.testing.assert_close(computed, weight, rtol=2e-7, atol=0)
