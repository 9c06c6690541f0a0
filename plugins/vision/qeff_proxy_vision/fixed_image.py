"""The vision part of a model whose tower is made for one image of a fixed geometry.

Towers for images of any size calculate indices, lengths and masks from the grid or the size of each
image, in loops that cannot be traced. Here the geometry is a constant of the graph: the part takes
``pixel_values`` of one image, and the host runs it once for each image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from qeff_proxy.common.private_names import find
from qeff_proxy.families.past_inputs import OperationCounter
from qeff_proxy.layers.replace_modules import replace_modules
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

__all__ = ["FEATURES", "FixedImagePart", "count_operations", "rows_of"]

#: The output with an image's feature rows.
FEATURES = "image_features"
#: To calculate with constants while a module is traced. Else: the trace fails with an error.
_MODES = {"disabled": "torch.utils._python_dispatch:_disable_current_modes"}
_SQUEEZES = (torch.squeeze, torch.Tensor.squeeze)
#: What ``list(tensor)`` calls.
_LISTED = (torch.Tensor.unbind, torch.Tensor.__len__)
_EQUALS = (torch.eq, torch.Tensor.eq, torch.Tensor.__eq__)


def _image_features(model: Any, **tensors: torch.Tensor) -> Any:
    return model.get_image_features(**tensors, return_dict=True)


class FixedImagePart(nn.Module):
    """``pixel_values`` of one image to its feature rows.

    Args:
        model: Has ``get_image_features``.
        text_path: Dotted path of its language model, which is left out.
        geometry: The other arguments of ``get_image_features``.
        blanks: It compares pixels with zero to find images that are padding; there are none.
        projector: Path of a module that it leaves to its caller to apply, if it does.
        get: Makes features: ``get(model, **tensors)``.
        features: The name of the output.

    Attributes:
        tiled: It is called on any number of tiles, each of which has as many rows; set afterwards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text_path: str,
        geometry: Mapping[str, torch.Tensor],
        *,
        blanks: bool = False,
        projector: str | None = None,
        get: Callable[..., Any] = _image_features,
        features: str = FEATURES,
    ) -> None:
        super().__init__()
        own = {path: _with_own_forward(one) for path, one in model.named_modules() if _packs(one)}
        own |= {path: _with_pairs(one) for path, one in model.named_modules() if _complex_in(one)}
        own = {path: one for path, one in own.items() if not path.startswith(f"{text_path}.")}
        self.model = replace_modules(model, {text_path: nn.Identity(), **own})
        self.geometry = dict(geometry)  # no buffers, which a trace would make inputs
        self.blanks = blanks
        self.projector = projector
        self.get = get
        self.features = features
        self.tiled = False

    def forward(self, **pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pixels of one image, or of tiles, to features.

        Args:
            pixels: ``pixel_values``, and what else the model takes of pixels.

        Returns:
            ``image_features [rows, hidden]``; where the tower gives features for layers of the
            language model, too, as many rows of ``image_features.<layer>``, which are added before
            that layer. Of tiles (``tiled``) they are ``[batch, rows, hidden]``.
        """
        tracing = torch.compiler.is_compiling()
        with _ConstantsStayReal(blanks=self.blanks) if tracing else nullcontext():
            outputs = self.get(self.model, **pixels, **self.geometry)
            if self.projector is not None:
                hidden = outputs.last_hidden_state
                projector = self.model.get_submodule(self.projector)
                outputs = {"pooler_output": projector(hidden.reshape(-1, hidden.shape[-1]))}
            pooled = outputs.get("pooler_output")
            if pooled is None:  # there is nothing to pool, such as of patches without a tower
                pooled = outputs["last_hidden_state"]
            features = {self.features: rows_of(pooled)}
            for index, rows in enumerate(outputs.get("deepstack_features") or ()):
                features[f"{FEATURES}.{index + 1}"] = rows_of(rows)  # before the next layer
        if self.tiled:
            tiles = next(iter(pixels.values())).shape[0]
            features = {n: one.view(tiles, -1, one.shape[1]) for n, one in features.items()}
        return features


def _packs(module: nn.Module) -> bool:
    """Whether this is the attention of a tower, on the patches of all images or windows."""
    return "cu_seqlens" in inspect.signature(module.forward).parameters and hasattr(
        module, "scaling"
    )


def _with_own_forward(module: nn.Module) -> nn.Module:
    """A copy that keeps its ``forward`` while transformers' exporter replaces that of its class.

    The replacement is for several segments of one length, and leaves out the norms of queries and
    keys (GLM-OCR's). Here there is one image, and its lengths are constants. The replacement serves
    where a tower has windows that are all of one length: it has one attention for all of them.
    """
    clone = replace_modules(module, {})
    own = type(module).forward
    signature = inspect.signature(own)
    has_windows = getattr(getattr(module, "config", None), "window_size", None) is not None

    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        ends = signature.bind(self, *args, **named).arguments["cu_seqlens"].tolist()
        lengths = {end - start for start, end in pairwise(ends)}
        replaced = has_windows and len(lengths) == 1 < len(ends) - 1
        return (type(self).forward if replaced else own)(self, *args, **named)

    vars(clone)["forward"] = MethodType(forward, clone)
    return clone


def _complex_in(module: nn.Module) -> list[str]:
    return [name for name, one in module.named_buffers(recurse=False) if one.is_complex()]


def _with_pairs(module: nn.Module) -> nn.Module:
    """A copy with pairs in place of complex numbers (Llama 4's), which no file of weights holds."""
    clone = replace_modules(module, {})
    views: dict[str, Any] = {}
    for name in _complex_in(module):
        number = clone._buffers.pop(name)  # noqa: SLF001 (a copy's, and no public way to take it)
        assert number is not None  # noqa: S101 (it is complex)
        clone.register_buffer(f"{name}_pairs", torch.view_as_real(number))
        views[name] = property(partial(_seen_as_complex, f"{name}_pairs"))
    clone.__class__ = type(type(module).__name__, (type(module),), views)
    return clone


def _seen_as_complex(pairs: str, module: Any) -> torch.Tensor:
    return torch.view_as_complex(getattr(module, pairs))


def rows_of(features: Any) -> torch.Tensor:
    """Features of one or several images, in whatever shape, as ``[rows, hidden]``."""
    if isinstance(features, torch.Tensor):
        return features if features.dim() == 2 else features.reshape(-1, features.shape[-1])
    return torch.cat([rows_of(one) for one in features])


def count_operations(
    module: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """A module's outputs, and how many operations made them."""
    with torch.no_grad(), OperationCounter() as counter:
        outputs = module(**tensors)
    return outputs, counter.count


class _ConstantsStayReal(TorchFunctionMode):
    """Calculate at once whatever depends on constants only, while a module is traced.

    A tracer knows shapes and dtypes of tensors, but not the numbers in them, so that a loop over
    the grid of an image cannot be traced. Tensors that depend neither on the inputs nor on weights
    keep their numbers here, and enter the graph as constants.
    """

    def __init__(self, *, blanks: bool) -> None:
        super().__init__()
        self.blanks = blanks
        self.private = find(_MODES)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SQUEEZES and _does_nothing(args, kwargs):
            return args[0].view(args[0].shape)  # ONNX's operator refuses what PyTorch ignores
        if func in _LISTED and _is_open(args, kwargs):
            if func is torch.Tensor.__len__:
                raise TypeError("the number of tiles is open")
            return (args[0],)  # not one for each tile, which a trace would count
        if self.blanks and func in _EQUALS and args[0].dim() == 4 and args[1:] == (0.0,):
            args = (torch.ones(args[0].shape), 0.0)
        values = list(_leaves([args, kwargs]))
        if getattr(func, "__name__", "").startswith("empty"):
            return func(*args, **kwargs)  # to be filled, perhaps with what is traced
        if self.private is None or any(_is_traced(value) for value in values):
            # What experts count their tokens in is a constant, which a trace does not write into.
            counts = func is torch.Tensor.scatter_add_ and not _is_traced(args[0])
            return (torch.Tensor.scatter_add if counts else func)(*args, **kwargs)
        with self.private.disabled():
            return func(*args, **kwargs)


def _does_nothing(args: Any, kwargs: Any) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return isinstance(dim, int) and args[0].shape[dim] != 1


def _is_open(args: Any, kwargs: Any) -> bool:
    """Whether the axis that a tensor is divided along is of any size."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return isinstance(args[0].shape[dim], torch.SymInt)


def _is_traced(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return type(value) is not torch.Tensor
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
