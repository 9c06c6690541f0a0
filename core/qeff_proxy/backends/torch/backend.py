"""The ``torch`` backend: a part's own module, run eagerly. It is the reference.

It runs the export's own weights: the model is built from the config beside the parts and filled
from the weights files.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.common.messages import first_line
from qeff_proxy.common.private_names import build_model
from qeff_proxy.common.shared_change import one_model_at_a_time
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.load.weight_sources import StoredWeight
from qeff_proxy.parts import Kind, Part, Proxy
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.session.adapter_slots import add_slots
from qeff_proxy.session.session import Session
from qeff_proxy.session.torch_session import TorchSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The weights files that an export writes; all others are linked files of a checkpoint.
_WRITTEN = {"body.safetensors", "vocabulary.safetensors"}
#: While a part runs, transformers' functions that make masks are exchanged, for all threads.
_ONE_AT_A_TIME = threading.Lock()


class TorchBackend(Backend):
    """Runs the parts with PyTorch."""

    def __init__(self) -> None:
        self._proxy: Proxy | None = None
        self._hooks: Hooks | None = None

    def use_hooks(self, hooks: Hooks) -> None:
        """Cut the model with these hooks instead of those of the installed plugins."""
        self._hooks = hooks

    def versions(self) -> dict[str, str]:
        """PyTorch's version."""
        return {"torch": str(torch.__version__)}

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Nothing to do: PyTorch runs the model's code."""

    def open(
        self,
        export: Export,
        part: ExportedPart,
        options: CompileOptions,  # noqa: ARG002 (there are none)
        folder: Path,  # noqa: ARG002 (nothing was compiled)
    ) -> ExportedPartSession:
        """A session on the part of a model built from the export's config and weights."""
        if self._proxy is None:
            self._proxy = proxy_of_export(export, self._hooks)
        return ExportedPartSession(self._proxy.part(part.name), part)


class ExportedPartSession(Session):
    """Runs a part of an export, and refuses what the exported graph would refuse.

    Args:
        part: The live part.
        exported: Its counterpart in the export, which may have fewer inputs.
    """

    def __init__(self, part: Part, exported: ExportedPart) -> None:
        super().__init__(exported)
        self._live = TorchSession(part)

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """Run the live part once."""
        try:
            with _ONE_AT_A_TIME:
                return self._live.compute(feeds, sizes)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise BackendError(
                f"PyTorch failed on the {self.name} part: {first_line(error)}"
            ) from error

    def release(self) -> None:
        """Let go of the live part."""
        self._live.close()


def model_of_export(export: Export) -> PreTrainedModel:
    """Build the model of an export from its config and its own weights.

    Raises:
        BackendError: Its architecture is unknown, or the model lacks some of the weights.
    """
    from safetensors.torch import load_file

    from qeff_proxy.load.adapter_inputs import shapes_in
    from qeff_proxy.load.load_model import load_config
    from qeff_proxy.load.quantized.kept_codes import dequantize_kept
    from qeff_proxy.load.transformers_model import architecture_class

    name = export.model["architecture"]
    config = load_config(export.processor_folder)
    architecture = architecture_class(name, config)
    if architecture is None:
        raise BackendError(
            f"{name} is an unknown architecture, so the torch backend cannot build it",
            "Use another backend.",
        )
    weights: dict[str, torch.Tensor] = {}
    if set(export.files) <= _WRITTEN:
        for file in export.files:
            weights.update(load_file(export.folder / file))
    else:
        weights = _weights_of_graphs(export)
    model = build_model(architecture, config, getattr(torch, export.dtype))
    model.tie_weights()
    add_slots(model, shapes_in(export))
    weights = dequantize_kept(weights, getattr(torch, export.dtype))
    unknown = _fill(model, weights, tuple(f"{part.name}." for part in export.parts))
    if unknown:
        raise BackendError(
            f"{name} built from {export.processor_folder} has no place for {unknown[0]}",
            "Export the model again.",
        )
    return cast("PreTrainedModel", model.eval())


def _weights_of_graphs(export: Export) -> dict[str, torch.Tensor]:
    """The tensors that the graphs of an export take from its files, by the graphs' names.

    The files of a checkpoint, which an export may link, have names of their own, tensors that the
    export changed (merged adapters, another dtype), and tensors that it does not use.
    """
    import onnx

    places = {file: read_header(export.folder / file) for file in export.files}
    weights = {}
    for part in export.parts:
        graph = onnx.load(export.folder / part.file, load_external_data=False).graph
        for tensor in graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if not where:
                continue
            lies = int(where.get("offset", 0)), int(where["length"])
            stored = places[where["location"]].items()
            key, place = next((k, p) for k, p in stored if (p.offset, p.length) == lies)
            path = export.folder / where["location"]
            weights[tensor.name] = StoredWeight(path, key, place).read()
    return weights


def _fill(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], parts: tuple[str, ...]
) -> list[str]:
    """Put ``weights`` into the model's tensors; return the names that it does not have."""
    places: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    places.update(model.named_buffers(remove_duplicate=False))
    for name, tensor in weights.items():
        if name in places:
            places[name].data = tensor
    # Constants that the trace lifted out of the code are named after their part: no module has
    # them.
    return [name for name in weights if name not in places and not name.startswith(parts)]


@one_model_at_a_time
def proxy_of_export(export: Export, hooks: Hooks | None = None) -> Proxy:
    """The parts of an export with PyTorch's modules, made from its config and its own weights.

    Args:
        export: The export.
        hooks: Of its model type; by default those of the installed plugins.

    Raises:
        BackendError: The model cannot be built (`model_of_export`).
    """
    from qeff_proxy.cut.locate_sites import locate_sites
    from qeff_proxy.layers.taps import tap_proxy
    from qeff_proxy.plugins.manager import Plugins

    model = model_of_export(export)
    if hooks is None:
        hooks = Plugins.discover().hooks_for(export.model["model_type"], task=export.flow)
    sites = locate_sites(model, hooks)
    proxy = hooks.build_proxy(
        model=model,
        embedding=sites["embedding"],
        lm_head=sites["lm_head"],
        kind=cast("Kind", export.kind),
        options=export.settings,
    )
    return tap_proxy(proxy, export.settings.get("taps", ()))
