"""The tensors of a quantized checkpoint, from which those that make a weight are taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.weight_sources import Codes, ComputedWeight, StoredWeight, Weight

FLOATS = ("F16", "BF16", "F32")
FP8 = ("F8_E4M3", "F8_E5M2")
_DAMAGED = "Check that config.json and the weights belong together, or download them again."


def refusal(tensor: StoredWeight, problem: str) -> CheckpointError:
    """An error about a tensor of a quantized checkpoint; names it and its file."""
    return CheckpointError(f"{tensor.key} in {tensor.path} {problem}", _DAMAGED)


def unsupported(problem: str) -> CheckpointError:
    """An error about a quantized checkpoint whose layout is not known here."""
    return CheckpointError(
        f"the checkpoint has {problem}, which is not supported",
        "Name the checkpoint that it was made from, in float32, float16 or bfloat16.",
    )


class Pieces:
    """Tensors of a checkpoint; those of a weight are replaced by it.

    Attributes:
        weights: What the checkpoint holds, by key.
    """

    def __init__(self, held: Mapping[str, StoredWeight]) -> None:
        self._held = held
        self.weights: dict[str, Weight] = dict(held)

    def ending(self, suffix: str) -> list[tuple[str, StoredWeight]]:
        """The tensors whose key ends so, each with the key without it."""
        return [
            (key.removesuffix(suffix), tensor)
            for key, tensor in self._held.items()
            if key.endswith(suffix)
        ]

    def find(self, *keys: str) -> StoredWeight | None:
        """The first of these tensors that the checkpoint has."""
        return next((self._held[key] for key in keys if key in self._held), None)

    def take(
        self,
        key: str,
        codes: StoredWeight,
        dtypes: Sequence[str],
        *shapes: Sequence[int],
        why: str = "",
    ) -> StoredWeight:
        """A tensor that belongs to some codes.

        Args:
            key: Its key.
            codes: The codes.
            dtypes: Those it may have.
            shapes: Those it may have; any if there is none.
            why: What its shape follows from, for the error.

        Raises:
            CheckpointError: It is missing, or has another dtype or shape.
        """
        tensor = self._held.get(key)
        if tensor is None:
            raise CheckpointError(f"{codes.path} holds {codes.key} without its {key}", _DAMAGED)
        if tensor.dtype not in dtypes:
            names = " or ".join(TORCH_DTYPES[name] for name in dtypes)
            raise refusal(tensor, f"is of {TORCH_DTYPES[tensor.dtype]}, and not of {names}")
        if shapes and tensor.shape not in [tuple(shape) for shape in shapes]:
            needed = " or ".join(str(list(shape)) for shape in shapes)
            raise refusal(
                tensor,
                f"has shape {list(tensor.shape)}, where {codes.key} of shape {list(codes.shape)}"
                f"{why} takes {needed}",
            )
        return tensor

    def replace(
        self,
        key: str,
        dtype: str,
        shape: Sequence[int],
        pieces: Sequence[StoredWeight],
        compute: Callable[..., Iterator[torch.Tensor]],
        *also: str,
        codes: Callable[[], Codes | None] | None = None,
    ) -> None:
        """Put a weight in the place of its pieces, and of what else is stored for it (``also``)."""
        for name in (*(piece.key for piece in pieces), *also):
            self.weights.pop(name, None)
        self.weights[key] = ComputedWeight(
            *(key, dtype, tuple(shape), tuple(pieces), compute), codes=codes
        )
