"""``qeff-proxy score MODEL --backend B --text FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.backend_options import (
    add_backend_option,
    add_calibration_option,
    add_recipe_option,
    add_shape_options,
    compile_options_of,
    options_by_backend,
)
from qeff_proxy.cli.options import add_model_options, existing_export_of, kind_of, loaded_of
from qeff_proxy.cli.output import print_json, print_text, stage_display
from qeff_proxy.common.messages import printable
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.score.results import BackendScore, Score

_EPILOG = """\
The text is cut into windows; PyTorch and each backend run them, and the tokens of the second half
of each window are scored. KL is the divergence of the backend's next-token distribution from
PyTorch's, in nats; flips are tokens that one of the two has first and the other has not. Of an
embedder, each line is a text: cosine of its two vectors, Spearman's correlation of the similarities
of all pairs, and whether the nearest other line is the same. For a model of sound or images each
line is a file, a tab, and what is said in it or the question about it. Intervals are of 95%.
Exit status: 0, or 1 when a backend fails or misses a --limit.
"""
#: Measure → what the table calls it, and its format.
_ROWS = {
    "reference": ("PyTorch's perplexity", "{:.4f}"),
    "candidate": ("perplexity", "{:.4f}"),
    "ratio": ("ratio", "{:.5f}"),
    "kl": ("KL, mean", "{:.2e}"),
    "median": ("KL, median", "{:.2e}"),
    "p99": ("KL, 99%", "{:.2e}"),
    "max": ("KL, largest", "{:.2e}"),
    "top1": ("same first token", "{:.3%}"),
    "top5": ("among first 5", "{:.3%}"),
    "flips": ("flips", "{:.3%}"),
    "cosine": ("cosine, mean", "{:.6f}"),
    "p01": ("cosine, 1%", "{:.6f}"),
    "least": ("cosine, least", "{:.6f}"),
    "rank": ("rank correlation", "{:.6f}"),
    "nearest": ("same nearest line", "{:.3%}"),
    "wer_reference": ("PyTorch's word errors", "{:.2%}"),
    "wer": ("word errors", "{:.2%}"),
    "wer_more": ("word errors, more", "{:+.2%}"),
    "same": ("same answers", "{:.2%}"),
    "alike": ("words before another", "{:.2%}"),
}
_SHOWN = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    add_model_options(parser, exports=True)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="default: onnxruntime; may be repeated"
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens of a window (default: 512 at most)"
    )
    parser.add_argument(
        "--windows", type=int, metavar="N", help="score no more than the first N, or lines"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer (default: 64) or a transcript"
    )
    parser.add_argument(
        "--worst", type=int, default=_SHOWN, metavar="N", help="tokens to name (default: 5)"
    )
    parser.add_argument(
        "--limit",
        default="",
        metavar="NAME:VALUE,…",
        help="exit with 1 beyond these: ratio, kl, p99, flips at most; top1, top5, cosine, p01, "
        "least, rank, nearest, same, alike at least; wer, wer_more at most",
    )
    add_shape_options(parser)
    add_calibration_option(parser)
    add_recipe_option(parser)
    add_backend_option(parser, "BACKEND.NAME=VALUE", "an option of one backend")


def run(args: argparse.Namespace) -> int:
    """Score, print, and return 0 when all backends ran and keep the limits, else 1."""
    names = args.backend or ["onnxruntime"]
    by_backend = options_by_backend(args, names)
    for option in ("window", "windows", "max_new_tokens"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} is {getattr(args, option)}", "Give a number from 1 on.")
    with stage_display("scoring", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.score import ScoreOptions, score_model
        from qeff_proxy.score.results import parse_limits
        from qeff_proxy.verify.options import VerifyOptions

        limits = parse_limits(args.limit) if args.limit else {}
        options = VerifyOptions(
            kind=kind_of(args),
            output=args.output,
            opset=args.opset,
            force=args.force,
            wait=not args.no_wait,
            compile=compile_options_of(args),
            backends=by_backend,
            calibration=args.calibrate and args.calibrate.expanduser(),
        )
        export = existing_export_of(args)
        model, hooks = (export, None) if export is not None else loaded_of(args)
        score = score_model(
            model,
            names,
            args.text.expanduser(),
            ScoreOptions(
                args.window, args.windows, args.worst, args.max_new_tokens, limits, options
            ),
            hooks=hooks,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    if args.json:
        print_json(score.to_json())
    else:
        for line in _lines(score):
            print_text(line)
    return 0 if score.passed else 1


def _lines(score: Score) -> Iterator[RenderableType]:
    """A table and the worst tokens of each backend."""
    yield f"{score.text}: {score.said} of {score.source}"
    for one in score.backends:
        yield ""
        if one.error is not None:
            yield f"{one.backend} failed: {printable(one.error)}"
            continue
        yield _table(one)
        for limit in one.missed:
            yield f"{one.backend}: {limit}"
        for worst in one.worst:
            yield printable(str(worst))


def _table(one: BackendScore) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    title = one.backend if one.precision is None else f"{one.backend} ({one.precision})"
    for column in (title, "", "95% interval"):
        table.add_column(column, justify="left" if column == title else "right")
    for name, (title, form) in _ROWS.items():
        if name not in one.measures:
            continue
        interval = [form.format(bound) for bound in one.intervals.get(name, ())]
        shown = f"{interval[0]} to {interval[1]}" if interval else ""
        table.add_row(title, form.format(one.measures[name]), shown)
    return table
