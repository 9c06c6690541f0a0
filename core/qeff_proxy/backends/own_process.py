"""Run a backend in a process of its own: one that ends its process ends no other.

`OwnProcess` opens parts as a backend does. The process is ``python -m
qeff_proxy.backends.own_process``; what libraries print there goes to standard error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import NO_ADAPTER, Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.json_schema import read_as
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, ProxyError
from qeff_proxy.session.messages import end_process, read_message, write_message
from qeff_proxy.session.session import Session

__all__ = ["OwnProcess"]


class OwnProcess:
    """A backend in a process of its own, which is started when it is needed, and anew if it ends.

    Args:
        name: The backend's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._keys = count()

    def open_once(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """See `qeff_proxy.backends.backend.Backend.open_once`.

        Raises:
            BackendError: The backend refuses the part, or ends its process.
        """
        key = next(self._keys)
        document = {**replace(export, parts=(part,)).to_json(), "folder": str(export.folder)}
        asked = {"export": document, "options": options.to_json(), "folder": str(folder)}
        self.ask({"do": "open", "key": key, "backend": self._name, **asked})
        return _Remote(part, self, key)

    def ask(
        self, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Send a request and wait for its answer.

        Raises:
            BackendError: It failed, or the process ended.
        """
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 (pipes)
        try:
            write_message(process.stdin, header, arrays)
            answer, found = read_message(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = process.wait()
            self.close()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise BackendError(f"{self._name} ended its process ({how})") from error
        except BaseException:  # Ctrl-C: no answer must be read as that of another request
            process.kill()
            self.close()
            raise
        if "error" in answer:
            raise BackendError(answer["error"])
        return found

    def forget(self, key: int) -> None:
        """Close what was opened, if its process is still there."""
        if self._process is not None:
            self.ask({"do": "close", "key": key})

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            end_process(process)


class _Remote(Session):
    """A part that is open in the process."""

    def __init__(self, part: ExportedPart, process: OwnProcess, key: int) -> None:
        super().__init__(part)
        self._process = process
        self._key = key

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        """See `Session.compute`."""
        return self._process.ask({"do": "run", "key": self._key}, feeds)

    def release(self) -> None:
        """See `Session.release`."""
        self._process.forget(self._key)


def _started() -> subprocess.Popen[bytes]:
    """The process; it imports from where this one does."""
    path = os.pathsep.join(place for place in sys.path if place)
    return subprocess.Popen(
        # A backend may warn of a graph that the user never asked for.
        [sys.executable, "-P", "-W", "ignore", "-m", "qeff_proxy.backends.own_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


class _Server:
    """Answers requests, one after another."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._sessions: dict[int, Session] = {}

    def answer(self, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Serve a request."""
        key = header["key"]
        if header["do"] == "run":
            return self._sessions[key].run(arrays)
        if header["do"] == "close":
            self._sessions.pop(key).close()
            return {}
        # One for all parts: it may know what it learned from those before.
        self._backend = self._backend or load_backend(header["backend"])
        export = {name: one for name, one in header["export"].items() if name != "schema"}
        read = read_as(Export, {**NO_ADAPTER, **export})
        options = {**header["options"], "seq_len": _tuple(header["options"]["seq_len"])}
        self._sessions[key] = self._backend.open_once(
            read, read.parts[0], CompileOptions(**options), Path(header["folder"])
        )
        return {}


def _tuple(lengths: list[int] | None) -> tuple[int, ...] | None:
    return tuple(lengths) if lengths is not None else None


def main() -> None:
    """Answer requests until there are no more."""
    # Ctrl-C is for the process that asks: it ends this one, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    server = _Server()
    with suppress(EOFError):
        while True:
            header, arrays = read_message(sys.stdin.buffer)
            try:
                outputs = server.answer(header, arrays)
            except ProxyError as error:
                write_message(answers, {"error": str(error)})
            except Exception as error:  # noqa: BLE001 (a backend's; its words are the answer)
                said = str(error).strip().partition("\n")[0]
                write_message(answers, {"error": f"{type(error).__name__}: {said}"})
            else:
                write_message(answers, {}, outputs)
    # Libraries that crash while they are unloaded must not look like a crash of the work.
    os._exit(0)


if __name__ == "__main__":
    main()
