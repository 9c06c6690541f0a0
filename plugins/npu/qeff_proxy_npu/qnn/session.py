"""Sessions on HTP or in its emulator, in a process of their own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from qeff_proxy.arrays import Array
from qeff_proxy.backends.onnxruntime.open_graph import open_graph, run_graph
from qeff_proxy.common.file_errors import opening
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.session.axes import Sizes
from qeff_proxy.session.part_like import PartLike

from qeff_proxy_npu.fixed_shapes.session import StaticSession
from qeff_proxy_npu.qnn.options import LOWEST_MASK, QnnOptions
from qeff_proxy_npu.qnn.process import CrashError, Worker

__all__ = ["QnnSession"]


class QnnSession(StaticSession):
    """A part on HTP or in its emulator.

    Args:
        part: The part that it runs.
        options: Of the compilation.
        chosen: The backend's own options.
        ensure: Compiles a specialization if that was not done yet; returns its JSON file.
        log: The log of the process.
        versions: The versions that binaries must have been made with.
    """

    def __init__(
        self,
        part: PartLike,
        options: CompileOptions,
        chosen: QnnOptions,
        ensure: Callable[[Sizes], Path],
        log: Path,
        versions: Mapping[str, str],
    ) -> None:
        super().__init__(part, options, self._open_binary, LOWEST_MASK)
        self._chosen = chosen
        self._ensure = ensure
        self._log = log
        self._versions = dict(versions)
        self._worker: Worker | None = None

    def release(self) -> None:
        """End the process."""
        super().release()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _open_binary(self, sizes: Sizes) -> _Binary:
        path = self._ensure(sizes)
        record = json.loads(path.read_text("utf-8"))
        if record["versions"] != self._versions:
            made_with, installed = (
                ", ".join(f"{name} {value}" for name, value in versions.items())
                for versions in (record["versions"], self._versions)
            )
            raise BackendError(
                f"{path.with_suffix('.onnx')} was made with {made_with}, and "
                f"{installed} is installed",
                "Compile again.",
            )
        if self._worker is None:
            self._worker = Worker(self._log, self._chosen.timeout, self._chosen.memory_mb)
        with opening(path.parent):
            return _Binary(self._worker, path, self.part, self._chosen, record)


class _Binary:
    """One context binary, open in the process, and the graph that the host computes for it."""

    def __init__(
        self,
        worker: Worker,
        path: Path,
        part: PartLike,
        chosen: QnnOptions,
        record: Mapping[str, Any],
    ) -> None:
        self._worker = worker
        self._key = path.stem
        self._part = part
        self._inputs: list[str] = record["inputs"]
        self._lowest_mask: float = record["lowest_mask"]
        host = path.with_suffix(".host.onnx")
        self._host = open_graph(host) if host.is_file() else None
        worker.ask(
            "open",
            key=self._key,
            context=str(path.with_suffix(".onnx")),
            provider=chosen.provider(),
            settings={"session.disable_cpu_ep_fallback": "1"} if chosen.strict else {},
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run it once, on arrays of exactly its sizes."""
        known = dict(feeds)
        if self._host is not None:
            known.update(run_graph(self._host, known))
        if self._lowest_mask > LOWEST_MASK:
            for mask in self._part.masks:
                known[mask.name] = np.maximum(known[mask.name], np.float32(self._lowest_mask))
        return self._worker.ask(
            "run",
            {name: known[name] for name in self._inputs},
            key=self._key,
            outputs=[spec.name for spec in self._part.outputs],
        )

    def close(self) -> None:
        """Close it in the process, unless that is gone, which must not hide why."""
        with contextlib.suppress(CrashError):
            self._worker.ask("close", key=self._key)
