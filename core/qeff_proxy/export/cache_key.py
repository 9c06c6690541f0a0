"""What tells one export from another, and the export of a checkpoint that is there already.

An export is named by a hash of its key. All of the key can be known from the checkpoint's files and
the installed packages, so that `find_known_export` imports neither PyTorch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from importlib_metadata import version

from qeff_proxy.artifact.check_target import existing_export
from qeff_proxy.artifact.export_folder import export_folder
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.code_digest import code_digest
from qeff_proxy.load.adapter_files import Adapters, find_model
from qeff_proxy.load.adapter_inputs import NOTED, as_inputs, made_with
from qeff_proxy.load.checkpoint_files import check_weights, identity_as, read_config_file
from qeff_proxy.load.load_model import identity_with
from qeff_proxy.parts import Kind
from qeff_proxy.plugins.manager import Plugins

_VERSIONS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


class _Identified(Protocol):
    """What a key needs to know of a model (`qeff_proxy.load.LoadedModel`)."""

    @property
    def identity(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class _Owner(Protocol):
    """What a key needs to know of a plugin (`qeff_proxy.plugins.hooks.Hooks`)."""

    @property
    def plugin(self) -> str: ...

    @property
    def distribution(self) -> str | None: ...

    @property
    def version(self) -> str | None: ...


def export_key(
    loaded: _Identified,
    hooks: _Owner,
    kind: Kind,
    opset: int | None,
    taps: Sequence[str] = (),
    weights: str = "copy",
) -> dict[str, Any]:
    """All that shapes an export: the same key, the same folder."""
    return {
        "identity": loaded.identity,
        "kind": kind,
        "dtype": loaded.dtype,
        "opset": opset,
        "taps": list(taps),
        "weights": weights,
        "plugin": {
            "name": hooks.plugin,
            "distribution": hooks.distribution,
            "version": hooks.version,
            "code": _plugin_digest(hooks),
        },
        "qeff-proxy": version("qeff-proxy"),
        "code": code_digest("qeff_proxy"),
        **{name: version(name) for name in _VERSIONS},
    }


@dataclass(frozen=True)
class _Checkpoint:
    identity: str
    dtype: str


def find_known_export(
    source: str,
    kind: Kind,
    *,
    dtype: str,
    options: Mapping[str, Any],
    output: Path | None = None,
    opset: int | None = None,
    weights: str = "copy",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    adapters: Adapters = (),
    adapter_as_input: bool = False,
) -> Export | None:
    """The export of a checkpoint, where it is there and was made by what is installed.

    It is the one that `qeff_proxy.export.export_model` would give. Where the model brings its own
    Python code, or does not name its class, only transformers can say what it is loaded as; then,
    as where there is no such export, ``None``.

    Args:
        source: A local folder or a hub id.
        kind: As for `qeff_proxy.export.export_model`, as are ``output``, ``opset``, ``weights``.
        dtype: As for `qeff_proxy.load.load_model`, as are those of the checkpoint.
        options: As for `qeff_proxy.load.load_model.with_options`.
        output: The export's folder, where it is not the one by its key.
        opset: Of ONNX.
        weights: How the export holds its weights.
        allow_pickle: Take a checkpoint of pickled weights.
        trust_remote_code: Fetch Python code with a checkpoint from the hub.
        adapters: As for `qeff_proxy.load.load_model`.
        adapter_as_input: As for `qeff_proxy.load.load_model`.

    Raises:
        CheckpointError: There is no such checkpoint, or its files are damaged.
        PluginError: Two packages claim its model type.
        UsageError: ``QEFF_PROXY_PLUGINS`` is wrong.
    """
    folder, merged = find_model(
        source, adapters, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    config = read_config_file(folder)
    check_weights(folder, allow_pickle=allow_pickle)
    architectures = config.get("architectures")
    if config.get("auto_map") or not isinstance(architectures, list) or not architectures:
        return None
    # As `qeff_proxy.load.transformers_model.class_named` says of a model that transformers knows.
    # An export by this name can only be of such a one.
    inputs = None
    if adapter_as_input:
        inputs = [as_inputs(merged, f"{source} ({folder})"), made_with(merged)]
        merged = ()
    places = [(adapter.folder, adapter.weight) for adapter in merged]
    own = identity_with(identity_as(folder, str(architectures[0]), places), {NOTED: inputs})
    identity = identity_with(own, options)
    owner = Plugins.discover().origin(str(config.get("model_type")))
    key = export_key(_Checkpoint(identity, dtype), owner, kind, opset, (), weights)
    return existing_export((output or export_folder(source, key)).resolve(), key)


def _plugin_digest(hooks: _Owner) -> str | None:
    """A hash of an installed plugin's code; ``None`` for one registered from Python."""
    if hooks.distribution is None:
        return None
    return code_digest(hooks.plugin.partition(":")[0].partition(".")[0])
