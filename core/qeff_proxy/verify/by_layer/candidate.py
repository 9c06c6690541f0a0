"""One backend of a verification by layer: each layer compiled alone, run and compared."""

from __future__ import annotations

import copy
import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.compile_export import code_of
from qeff_proxy.backends.own_process import OwnProcess
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.file_errors import FULL, writing
from qeff_proxy.compare.tolerances import COMPUTED_IN, Tolerances
from qeff_proxy.errors import ArtifactError, ProxyError
from qeff_proxy.flows.flow import Job
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.session.session import Session
from qeff_proxy.verify.by_layer.calls import Outputs, calls_of
from qeff_proxy.verify.by_layer.floor import Floors, LayerFloor
from qeff_proxy.verify.by_layer.part_run import PartRun, Step
from qeff_proxy.verify.by_layer.results import (
    BackendLayers,
    LayerError,
    LayerResult,
    compare_alike,
    compare_layer,
    layer_name,
)
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.results import reason_of

_LOG = logging.getLogger(__name__)

#: Opens a layer of a part.
OpenLayer = Callable[[ExportedPart, LayerGraph], AbstractContextManager[Session]]
#: A backend that fails in so many layers in a row runs no more of them.
_MOST_FAILURES = 3


class Candidate:
    """One backend. A layer that fails takes the reference's outputs, and the next one goes on.

    Args:
        name: The backend's name.
        export: The export.
        options: Of the verification.
        own_process: Run the backend in a process of its own, which it may end.
    """

    def __init__(
        self, name: str, export: Export, options: VerifyOptions, *, own_process: bool = False
    ) -> None:
        self.name = name
        self._export = export
        self._options = options.compile_for(name)
        self._tolerances = options.tolerances or Tolerances()
        self._known: dict[str, Outputs] = {}
        self._run: PartRun | None = None
        self._layers: list[LayerResult] = []
        self._error: str | None = None
        self._failed_in_a_row = 0
        self._note: str | None = None
        #: What later layers take of the outputs of the layer that ran last.
        self.kept: list[Step] = []
        #: One for all layers: it may know what it learned from those before.
        self._backend: Backend | None = None
        self._process: OwnProcess | None = None
        self.precision: str | None = None
        with suppress(ProxyError):  # its first layer will say so
            self.precision = self._opened().precision(self._options)
            if own_process:
                self._process = OwnProcess(name)

    def _opened(self) -> Backend:
        """The backend, loaded once."""
        if self._backend is None:
            self._backend = load_backend(self.name)
        return self._backend

    @property
    def tolerances(self) -> Tolerances:
        """Of its precision, without noise floors."""
        return replace(self._tolerances, precision=self.precision)

    @property
    def last(self) -> LayerResult | None:
        """The result of the layer that ran last."""
        return self._layers[-1] if self._layers else None

    @property
    def failed_always(self) -> bool:
        """Whether no layer has run."""
        return all(layer.error is not None for layer in self._layers)

    def fork(self) -> Candidate:
        """A second one with the same results so far, which goes on by itself."""
        other = copy.copy(self)
        run = self._run.fork() if self._run is not None else None
        vars(other).update(_layers=list(self._layers), _known=dict(self._known), _run=run)
        return other

    def versions(self) -> dict[str, str]:
        """Versions of its compiler and runtime."""
        return dict(self._opened().versions())

    def settings(self) -> object:
        """What its results depend on, besides the export and the input."""
        if self._backend is None:
            return self.name
        options = self._options.to_json()
        found = dict(self._backend.fingerprint(self._options))
        return self.name, dict(self._backend.versions()), code_of(self._backend), options, found

    def begin(self, part: ExportedPart, job: Job) -> None:
        """Begin a part, with the outputs of the parts before it as this backend computed them."""
        if self._run is not None:
            self._known[self._run.part.name] = self._run.outputs()
        if self._failed_in_a_row < _MOST_FAILURES:
            self._run = PartRun(part, calls_of(job, part.name, self._known))

    def try_layer(
        self,
        graph: LayerGraph,
        reference: PartRun,
        expected: Sequence[Step],
        following: Sequence[LayerGraph],
        floor: LayerFloor | None,
        session_of: OpenLayer | None = None,
    ) -> None:
        """Run a layer on the reference's inputs, then on the backend's own; compare both.

        Args:
            graph: The layer.
            reference: The reference's run of the part.
            expected: The reference's outputs of the layer, in each call.
            following: The layers after it.
            floor: The noise floor of the backend's precision.
            session_of: Opens the layer, in place of `session`.

        Raises:
            ArtifactError: The layer's files cannot be written: no backend could go on.
        """
        if self._failed_in_a_row == _MOST_FAILURES:
            return
        assert self._run is not None  # noqa: S101 (see `begin`)
        part = reference.part
        try:
            with (
                writing(self._export.folder, FULL),
                (session_of or self.session)(part, graph) as session,
            ):
                local = reference.forward(graph, session.run, cache=expected)
                inherited = self._run.forward(graph, session.run)
        except ArtifactError:
            raise
        except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
            _LOG.debug("%s failed", self.name, exc_info=error)
            reason = reason_of(error)
            self._error = self._error or f"{layer_name(part.name, graph.layer)}: {reason}"
            failed = LayerError(passed=False)
            self._layers.append(LayerResult(part.name, graph.layer, failed, failed, reason))
            self._failed_in_a_row += 1
            self.kept = self._run.keep(expected, following)
            return
        self._failed_in_a_row = 0
        if self.precision in COMPUTED_IN:
            self._note = f"there is none of {self.precision}" if floor is None else floor.failure
        tolerances = self.tolerances
        wanted = reference.by_step(expected)

        def measured(outputs: Sequence[Step], floors: Floors) -> LayerError:
            limits = replace(tolerances, floors=floors)
            return compare_layer(wanted, reference.by_step(outputs), part.name, limits)

        self._layers.append(
            LayerResult(
                part.name,
                graph.layer,
                measured(local, floor.local if floor is not None else {}),
                measured(inherited, floor.inherited if floor is not None else {}),
            )
        )
        self.kept = self._run.keep(inherited, following)

    def state(self) -> dict[str, Any]:
        """The result of the layer that ran last, as JSON values; infinity is one."""
        last = [asdict(layer) for layer in self._layers[-1:]]
        return {
            "last": last,
            "error": self._error,
            "failed": self._failed_in_a_row,
            "note": self._note,
        }

    def restore(
        self, kept: Sequence[Step], state: Mapping[str, Any], following: Sequence[LayerGraph]
    ) -> None:
        """Take up a layer that an earlier run ran, instead of `try_layer`."""
        if self._failed_in_a_row < _MOST_FAILURES and self._run is not None:
            self._layers += msgspec.convert(state["last"], list[LayerResult])
            self.kept = self._run.keep(kept, following)
        self._error, self._note = state["error"], state["note"]
        self._failed_in_a_row = state["failed"]

    @contextmanager
    def session(self, part: ExportedPart, graph: LayerGraph) -> Iterator[Session]:
        """Compile a layer alone, and open it; its files are removed at the end.

        Its graph lies beside the weights file, which it points into: external data may lie nowhere
        else.
        """
        export = self._export
        with ExitStack() as stack:
            with writing(export.folder):
                file = stack.enter_context(
                    tempfile.NamedTemporaryFile(dir=export.folder, prefix=".layer-", suffix=".onnx")
                )
                fcntl.flock(file, fcntl.LOCK_EX)  # see `remove_leftovers`
                path = Path(file.name)
                ir.save(graph.model, path)
                folder = path.with_suffix(".files")
                folder.mkdir()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            layer = replace(
                part,
                file=path.name,
                sha256=sha256_of(path),
                inputs=graph.inputs,
                outputs=graph.outputs,
                masks=tuple(
                    mask for mask in part.masks if mask.name in {i.name for i in graph.inputs}
                ),
            )
            alone = replace(export, parts=(layer,))
            backend = self._opened()
            backend.check_options(self.name, self._options)
            opener = self._process or backend
            session = opener.open_once(alone, layer, self._options, folder)
            stack.callback(session.close)
            yield session

    def close(self) -> None:
        """End its process, if it has one."""
        if self._process is not None:
            self._process.close()

    def result(self) -> BackendLayers:
        """The layers that ran."""
        return BackendLayers(self.name, compare_alike(self._layers), self._error, self._note)


def remove_leftovers(folder: Path) -> None:
    """Remove the layers that killed runs left in an export; those of other runs are locked."""
    for graph in folder.glob(".layer-*.onnx"):
        with suppress(BlockingIOError, FileNotFoundError), graph.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(graph.with_suffix(".files"), ignore_errors=True)
            graph.unlink()
    for files in folder.glob(".layer-*.files"):
        if not files.with_suffix(".onnx").exists():  # a run that goes on has both, or the graph
            shutil.rmtree(files, ignore_errors=True)
