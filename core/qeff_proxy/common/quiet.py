"""Keep other libraries quiet while they load or trace a model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet_loading", "quiet_tracers"]


@contextlib.contextmanager
def quiet_tracers() -> Iterator[None]:
    """Keep the tracers' progress lines and version notes off the terminal.

    They go to the ``qeff_proxy.common.quiet`` logger at debug level instead.
    """
    talkers = [
        logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnxscript", "onnx_ir")
    ]
    levels = [talker.level for talker in talkers]
    said = io.StringIO()
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
        if said.getvalue():
            logging.getLogger(__name__).debug("%s", said.getvalue())


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Leave out transformers' progress bars and load reports; what matters is checked here."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    showed_bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if showed_bars:
            transformers_logging.enable_progress_bar()
