"""Print the speeds of ``verify``: a table, the quickest, and the command that uses it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.verify.timing import Speed, Timing

#: Options of ``verify`` that change what runs, and that ``generate`` has too.
_SHARED = (
    ("proxy", "--proxy"),
    ("dtype", "--dtype"),
    ("batch_size", "--batch-size"),
    ("prefill_seq_len", "--prefill-seq-len"),
    ("ctx_len", "--ctx-len"),
    ("num_cores", "--num-cores"),
)


def command_for(args: argparse.Namespace, backend: str) -> str:
    """The ``generate`` command that runs the model as it was measured on one backend."""
    words = ["qeff-proxy", "generate", args.model, "INPUT", "--backend", backend]
    for name, option in _SHARED:
        value = getattr(args, name)
        if value is not None and (name, value) != ("batch_size", 1):
            words += [option, str(value)]
    if args.seq_len:
        words += ["--seq-len", ",".join(map(str, args.seq_len))]
    for option in args.cut_option:
        words += ["-C", option]
    for option in args.backend_option:
        whose, _, rest = option.partition(".")
        if whose == backend:
            words += ["-O", rest]
    for flag in ("trust_remote_code", "allow_pickle"):
        if getattr(args, flag):
            words.append(f"--{flag.replace('_', '-')}")
    return shlex.join(words)


def speed_lines(speed: Speed, args: argparse.Namespace) -> Iterator[RenderableType]:
    """The table and the lines below it."""
    from rich.table import Table
    from rich.text import Text

    if speed.timings:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("speed", no_wrap=True)
        for heading in (f"{speed.unit} a second", "slowest turn", "quickest", "over PyTorch"):
            table.add_column(heading, justify="right", no_wrap=True)
        rows = [*speed.timings, *([speed.reference] if speed.reference is not None else [])]
        for timing in sorted(rows, key=lambda row: row.median):
            table.add_row(*_row(speed, timing))
        yield table
        yield ""
    yield from (Text(line) for line in _remarks(speed, args))


def _row(speed: Speed, timing: Timing) -> list[str]:
    over = speed.over_reference(timing)
    return [
        timing.name,
        _number(speed.rate(timing)),
        _number(speed.amount / max(timing.seconds)),
        _number(speed.amount / min(timing.seconds)),
        "" if over is None or timing is speed.reference else f"{over:.2f}",
    ]


def _remarks(speed: Speed, args: argparse.Namespace) -> Iterator[str]:
    best = speed.best
    if best is None:
        yield "Quickest: none; no backend that can be chosen passed."
    else:
        over = speed.over_reference(best)
        beside = "" if over is None else f", {over:.2f} times as fast as PyTorch"
        yield f"Quickest: {best.name}{beside}. Use it with"
        yield f"    {command_for(args, best.name)}"
        if speed.near:
            yield f"As good as equally quick, within 5% of it: {', '.join(speed.near)}."
        if over is not None and over < 1:
            yield "PyTorch's own model is quicker than any of them on this input."
        if speed.noisy:
            yield (
                f"Turns differ by {speed.spread:.0%}: the machine has other work, so small "
                "differences mean nothing. Measure again, or take more --turns."
            )
    yield from (f"{note[0].upper()}{note[1:]}." for note in speed.notes)
    for name, why in speed.left_out.items():
        yield f"Left out: {name}: {why.rstrip('.')}."


def _number(value: float) -> str:
    """Three figures or more, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
