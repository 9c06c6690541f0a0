"""The ``torch`` backend: a part's own module, run eagerly. It is the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qeff_proxy.arrays import to_array, to_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qeff_proxy.arrays import Array
    from qeff_proxy.parts import Part

__all__ = ["TorchSession"]


class TorchSession:
    """Runs a live part with PyTorch.

    Args:
        part: The part; its module is used as it is, on the device it is on.
    """

    def __init__(self, part: Part) -> None:
        self._module = part.module.eval()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        arguments = {name.replace(".", "__"): to_tensor(value) for name, value in feeds.items()}
        with torch.no_grad():
            outputs = self._module(**arguments)
        return {name: to_array(value) for name, value in outputs.items()}

    def close(self) -> None:
        """Nothing to release: the module belongs to the part."""
