"""Operators that ONNX lacks, made of others while a decoder is traced."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_WINITZKI = 0.147  # of his approximation of the inverse error function
_NEWTON_STEPS = 3  # from there to float32


class ReplacedOperators(TorchFunctionMode):
    """Replaces what ONNX has no operator for.

    Complex numbers are indexed as pairs (Llama 4's rotary embedding); the inverse error function
    is solved (Gemma 3n's sparse activations, of a constant, so that it is folded afterwards).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].is_complex():
            return torch.view_as_complex(torch.view_as_real(args[0])[args[1]])
        if func in (torch.erfinv, torch.Tensor.erfinv):
            return _inverse_erf(args[0])
        return func(*args, **(kwargs or {}))


def _inverse_erf(of: torch.Tensor) -> torch.Tensor:
    """``torch.erfinv`` of numbers between -1 and 1, by Newton's method in float64."""
    y = of.double()
    log = (1 - y * y).log()
    half = 2 / (math.pi * _WINITZKI) + log / 2
    x = y.sign() * ((half * half - log / _WINITZKI).sqrt() - half).sqrt()
    for _ in range(_NEWTON_STEPS):
        x = x - (x.erf() - y) * (x * x).exp() * (math.sqrt(math.pi) / 2)
    return x.to(of.dtype)
