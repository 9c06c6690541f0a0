"""A thread is kept quiet; other threads, and the process afterwards, are as before."""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from qeff_proxy.common.gc_threshold import collecting_rarely
from qeff_proxy.common.quiet import quiet_loading, quiet_logs, quiet_tracers
from transformers.utils import logging as transformers_logging

NAMES = ("torch.onnx.exporter", "transformers.modeling", "onnxscript.optimizer", "onnx_ir")
#: Loggers that hand nothing on to one another.
ROOTS = ("torch", "torch.onnx", "transformers", "onnxscript", "onnx_ir")
CONTEXTS = (quiet_loading, quiet_tracers, collecting_rarely)


class Records(logging.Handler):
    """Keeps what it handles."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    """What the libraries' loggers say."""
    records = Records()
    loggers = [logging.getLogger(name) for name in ROOTS]
    for logger in loggers:
        logger.addHandler(records)
    yield records.messages
    for logger in loggers:
        logger.removeHandler(records)


def state() -> dict[str, Any]:
    loggers = [logging.getLogger(name) for name in ("", "torch", "transformers", *NAMES)]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    return {
        "levels": [logger.level for logger in loggers],
        "filters": [list(one.filters) for one in (*loggers, *handlers, logging.lastResort)],
        "warnings": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "collector": gc.get_threshold(),
        "export": torch.onnx.export,
    }


def speak(text: str) -> None:
    for name in NAMES:
        logging.getLogger(name).warning("%s", text)


def test_notes_are_dropped_and_errors_are_not(heard: list[str]) -> None:
    with quiet_tracers():
        speak("a note")
        logging.getLogger("torch.onnx").error("an error")
        logging.getLogger("torch.other").warning("of another logger")
        logging.getLogger("transformers_other").warning("of another library")
    assert heard == ["an error", "of another logger"]


def test_a_level_may_be_chosen(heard: list[str]) -> None:
    with quiet_logs("onnx_ir", level=logging.WARNING):
        speak("a note")
    assert len(heard) == len(NAMES)


def test_another_thread_is_heard(heard: list[str]) -> None:
    with quiet_tracers(), quiet_loading(), ThreadPoolExecutor(1) as pool:
        speak("of this thread")
        pool.submit(speak, "of another").result()
    assert heard == ["of another"] * len(NAMES)


def test_warnings_are_dropped_in_this_thread_alone() -> None:
    def warn() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("something", DeprecationWarning, stacklevel=1)
        return [str(one.message) for one in caught]

    warnings.simplefilter("always")
    with quiet_tracers(), ThreadPoolExecutor(1) as pool:
        assert warn() == []
        assert pool.submit(warn).result() == ["something"]
    assert warn() == ["something"]


def test_progress_bars_are_left_out_in_this_thread_alone() -> None:
    def is_shown() -> bool:
        bar = transformers_logging.tqdm([1], leave=False)
        with bar:
            return not getattr(bar, "disable", True)

    with quiet_loading(), ThreadPoolExecutor(1) as pool:
        assert not is_shown()
        assert pool.submit(is_shown).result()
    assert is_shown()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("context", CONTEXTS)
def test_threads_may_finish_in_any_order(context: Any, order: tuple[int, ...]) -> None:
    before = state()
    leave = [threading.Event() for _ in range(3)]

    def work(number: int, entered: threading.Event) -> None:
        with ExitStack() as stack:
            stack.enter_context(context())
            entered.set()
            assert leave[number].wait(10)

    with ThreadPoolExecutor(3) as pool:
        jobs = []
        for number in range(3):
            entered = threading.Event()
            jobs.append(pool.submit(work, number, entered))
            assert entered.wait(10)
        for number in order:
            leave[number].set()
            jobs[number].result()
    assert state() == before
