"""Start the process of `qeff_proxy_npu.qnn.worker`, send it requests, and explain its end.

A compiler that crashes, is killed for its memory or takes too long ends only its own process. That
becomes a `BackendError` that names the cause and the log.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.errors import BackendError
from qeff_proxy.session.messages import end_process, read_message, write_message

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

__all__ = ["CrashError", "RefusalError", "Worker"]

_SIGNALS = {
    "SIGSEGV": "it crashed (segmentation fault)",
    "SIGABRT": "it gave up (abort), as it does when memory runs out",
    "SIGKILL": "it was killed, as the system does when memory runs out",
    "SIGBUS": "it crashed (bus error), as when a disk is full",
}


class CrashError(BackendError):
    """The process ended on its own."""


class RefusalError(BackendError):
    """The runtime in the process raised an error."""


class Worker:
    """A process that compiles and runs.

    Args:
        log: Its standard error is appended to this file.
        timeout: Seconds that a request may take.
        memory_mb: Most address space it may have; ``None`` for no limit.
    """

    def __init__(self, log: Path, timeout: float, memory_mb: int | None = None) -> None:
        import onnxruntime_qnn

        self.log = log
        self._timeout = timeout
        self._timed_out = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qeff_proxy_npu.qnn.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        library = {
            "name": onnxruntime_qnn.get_ep_name(),
            "path": onnxruntime_qnn.get_library_path(),
        }
        try:
            self.ask("start", memory_mb=memory_mb, library=library)
        except BaseException:
            self.close()
            raise

    def ask(
        self, do: str, arrays: Mapping[str, Array] | None = None, **header: Any
    ) -> dict[str, Array]:
        """Send a request and wait for its answer.

        Raises:
            RefusalError: The request failed.
            CrashError: The process ended, or took too long and was ended.
        """
        assert self._process.stdin is not None  # noqa: S101 (both are pipes)
        assert self._process.stdout is not None  # noqa: S101
        timer = threading.Timer(self._timeout, self._give_up)
        timer.start()
        try:
            write_message(self._process.stdin, {"do": do, **header}, arrays)
            answer, found = read_message(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise self._ended() from error
        except BaseException:  # Ctrl-C; the answer to this request must not be read as another's
            self._process.kill()
            self._process.stdout.read()  # it may have answered before it was killed
            raise
        finally:
            timer.cancel()
        if "error" in answer:
            raise RefusalError(_first_line(answer["error"]), f"Its log: {self.log}")
        return found

    def close(self) -> None:
        """End the process."""
        end_process(self._process)

    def _give_up(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _ended(self) -> CrashError:
        code = self._process.wait()
        if self._timed_out:
            cause = f"it took longer than {self._timeout:g} s and was ended"
            hint = "Raise the option timeout. "
        elif code < 0:
            name = signal.Signals(-code).name
            cause, hint = _SIGNALS.get(name, f"it was ended by {name}"), ""
        else:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = next(reversed(said), "it said nothing")
            cause, hint = f"it ended with status {code}: {last}", ""
        return CrashError(
            f"the process of the Qualcomm compiler is gone: {cause}", f"{hint}Its log: {self.log}"
        )


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)
