"""AWQ in the layout of its GEMM kernel: codes of 4 bits, packed along the outputs.

``X.qweight`` int32 [inputs, outputs / 8], and by groups of inputs ``X.scales`` [groups, outputs]
and ``X.qzeros`` [groups, outputs / 8]; ``X.weight`` is [outputs, inputs]. The eight outputs of a
word are in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up. Source: AutoAWQ,
``awq/modules/linear/gemm.py`` (``from_linear``) and ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qeff_proxy.load.quantized.arithmetic import scale, unpack_rows
from qeff_proxy.load.quantized.kept_codes import kept_codes, pack
from qeff_proxy.load.quantized.pieces import FLOATS, Pieces, refusal, unsupported
from qeff_proxy.load.weight_sources import Codes, StoredWeight, Weight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_VERSIONS = ("gemm", "exllama", "ipex")  # versions of the kernel; all are stored in one layout


def weights_of(held: Mapping[str, StoredWeight], settings: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a checkpoint quantized with AWQ.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: Its layout is not known, or tensors are missing or do not fit.
    """
    bits, size = settings.get("bits", settings.get("w_bit", 4)), settings.get("group_size", 128)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in _VERSIONS:
        raise unsupported(f"AWQ weights in the layout {version!r}")
    if bits != 4:
        raise unsupported(f"AWQ weights of {bits} bits")
    for key, tensor in held.items():
        if key.endswith(".scales") and f"{key.removesuffix('.scales')}.qweight" not in held:
            raise refusal(tensor, "is of no weight: scaled activations are not supported")
    pieces = Pieces(held)
    for name, codes in pieces.ending(".qweight"):
        if len(codes.shape) != 2 or codes.dtype != "I32":
            raise refusal(codes, f"has shape {list(codes.shape)} and dtype {codes.dtype}")
        inputs, words = codes.shape
        length = size if size > 0 else inputs
        if inputs % length:
            raise refusal(codes, f"has {inputs} inputs, which are no groups of {length}")
        groups, why = inputs // length, f" with groups of {length}"
        scales = pieces.take(f"{name}.scales", codes, FLOATS, (groups, words * 8), why=why)
        zeros = pieces.take(f"{name}.qzeros", codes, ("I32",), (groups, words), why=why)
        pieces.replace(
            f"{name}.weight",
            scales.dtype,
            (words * 8, inputs),
            (codes, scales, zeros),
            partial(_dequantize, length),
            codes=partial(_kept, f"{name}.weight", length, (codes, scales, zeros)),
        )
    return pieces.weights


def _dequantize(
    size: int, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> Iterator[torch.Tensor]:
    return scale(_codes(words), scales.t(), size, scales.dtype, _codes(zeros))


def _codes(words: torch.Tensor) -> torch.Tensor:
    """Uint8 [outputs, inputs or groups]."""
    return unpack_rows(words.t().contiguous(), _ORDER)


def _kept(key: str, size: int, tensors: Sequence[StoredWeight]) -> Codes | None:
    inputs, words = tensors[0].shape
    return kept_codes(
        *(key, 4, size, (words * 8, inputs), tensors[1].dtype, tensors),
        (
            lambda words, *_: pack(_codes(words), 4),
            lambda _words, scales, _zeros: scales.t(),
            lambda _words, _scales, zeros: _codes(zeros),
        ),
    )
