"""``qeff-proxy demo``: the whole flow, on checkpoints that come with the program and plugins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.output import (
    add_json_option,
    format_bytes,
    print_json,
    print_text,
    report_error,
    stage_display,
)
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import ProxyError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.demo.demos import Demo
    from qeff_proxy.flows.generation.generate import PerfMetrics
    from qeff_proxy.plugins.entry_points import PackageEntry
    from qeff_proxy.plugins.manager import Plugins
    from qeff_proxy.run.run_compiled import RunResult
    from qeff_proxy.verify.results import BackendResult

_CHECKPOINT = "tiny-gpt2"
_PROMPT = "Anna went to the market"
_NEW_TOKENS = 64
_UNEXPECTED = 70  # as for the whole command
_EPILOG = """\
Exit status: 0 when every demo ran and agreed with PyTorch in every token and tensor, 1 when one did
not. When a demo cannot run, the others still do, and the status is that of its error.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a demo (default: all that are installed)"
    )
    parser.add_argument("--list", action="store_true", help="list the demos and run none")
    text = parser.add_argument_group("of the demo 'text'")
    text.add_argument(
        "--model", help="a causal LM's folder or hub id (default: one that comes with the program)"
    )
    text.add_argument("--prompt", help=f"default: {_PROMPT!r}")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default: {_NEW_TOKENS}")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demos in turn; each loads, cuts, exports, compiles, runs and compares."""
    from qeff_proxy.artifact.export_folder import cache_home
    from qeff_proxy.common.file_errors import check_writable
    from qeff_proxy.demo.demos import choose, find_demos
    from qeff_proxy.plugins.manager import Plugins

    plugins = Plugins.discover()
    entries = choose(find_demos(plugins.selection), _names(args))
    if args.list:
        _print_list(entries, as_json=args.json)
        return 0
    check_writable(cache_home())
    reports: dict[str, Any] = {}
    worst = 0
    for entry in entries:
        code, reports[entry.name] = _report_of(args, entry, plugins)
        worst = worst or code
    if args.json:
        print_json({"passed": worst == 0, "demos": reports})
    return worst


def _names(args: argparse.Namespace) -> list[str]:
    from qeff_proxy.demo.demos import BUILTIN_DEMO

    options = {
        "--model": args.model,
        "--prompt": args.prompt,
        "--max-new-tokens": args.max_new_tokens,
    }
    used = [option for option, value in options.items() if value is not None]
    if used and args.names and BUILTIN_DEMO not in args.names:
        raise UsageError(
            f"{used[0]} is of the demo {BUILTIN_DEMO!r}, which is not among those to run",
            f"Name it too: qeff-proxy demo {BUILTIN_DEMO} {' '.join(args.names)}.",
        )
    return args.names or ([BUILTIN_DEMO] if used else [])


def _report_of(
    args: argparse.Namespace, entry: PackageEntry, plugins: Plugins
) -> tuple[int, dict[str, Any]]:
    """Run one demo, and return its exit code and report; an error is printed, not raised."""
    from qeff_proxy.demo.demos import load

    try:
        if not entry.value:
            with as_file(files("qeff_proxy") / "checkpoints" / _CHECKPOINT) as folder:
                return _run_demo(args, entry.name, _text_demo(args, folder), plugins)
        return _run_demo(args, entry.name, load(entry), plugins)
    except ProxyError as error:
        if args.debug:
            raise
        code, message = error.exit_code, str(error)
    except Exception as error:
        if args.debug:
            raise
        code = _UNEXPECTED
        message = f"unexpected {type(error).__name__}: {error}. Run with --debug for the traceback."
    report_error(f"demo {entry.name} of package {entry.distribution}: {message}")
    return code, {"package": entry.distribution, "error": message}


def _text_demo(args: argparse.Namespace, folder: Path) -> Demo:
    from qeff_proxy.demo.demos import Demo
    from qeff_proxy.request import Request

    prompt = _PROMPT if args.prompt is None else args.prompt
    tokens = _NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    return Demo(
        checkpoint=args.model or folder,
        request=Request(prompts=(prompt,)),
        given=prompt,
        shown=lambda result: f"{prompt}{result.decoded[0]}",
        max_new_tokens=tokens,
    )


def _run_demo(
    args: argparse.Namespace, name: str, demo: Demo, plugins: Plugins
) -> tuple[int, dict[str, Any]]:
    with stage_display(f"demo {name}", quiet=args.json) as progress:
        export, result, run = _verified(demo, plugins, progress)
    perf = run.outputs.get("perf_metrics")
    logits = [tensor.worst for tensor in result.final if tensor.worst is not None]
    parity = {
        "max_difference": max(stats.max_abs for stats in logits),
        "largest_logit": max(stats.peak for stats in logits),
        "equal_tokens": result.equal_tokens,
        "steps": result.tokens,
        "passed": result.passed and result.equal_tokens == result.tokens > 0,
    }
    text = demo.shown(run)
    if not args.json:
        print_text(_parts_table(f"{name}: {Path(demo.checkpoint).name}", export))
        print_text(_result_table(export, parity, perf))
        print_text(f"export: {_short(export.folder)}")
        print_text(f"dump:   {_short(run.io_folder)}")
        print_text(f"\n{text}\n")
        sys.stdout.flush()  # the next demo takes seconds
    report = {
        "export": str(export.folder),
        "cut": export.cut,
        "files": export.files,
        "parity": parity,
        "perf_metrics": perf.to_json() if perf is not None else None,
        "io_folder": str(run.io_folder),
        "given": demo.given,
        "text": text,
    }
    return 0 if parity["passed"] else 1, report


def _verified(
    demo: Demo, plugins: Plugins, progress: Callable[[str], None]
) -> tuple[Export, BackendResult, RunResult]:
    """Export the checkpoint and verify it on ONNX Runtime; a failure there is raised."""
    progress("loading libraries")
    from qeff_proxy.artifact.export_folder import read_export
    from qeff_proxy.load.load_model import load_model
    from qeff_proxy.verify.options import VerifyOptions
    from qeff_proxy.verify.verify_model import verify_model

    loaded = load_model(str(demo.checkpoint))
    verification = verify_model(
        loaded,
        ["onnxruntime"],
        demo.request,
        VerifyOptions(taps=(), max_new_tokens=demo.max_new_tokens),
        hooks=plugins.hooks_for(loaded.model_type),
        progress=progress,
    )
    (result,) = verification.results
    if result.failure is not None:
        raise result.failure
    assert result.run is not None  # noqa: S101 (there is one without a failure)
    return read_export(verification.export), result, result.run


def _print_list(entries: list[PackageEntry], *, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print_json([{"name": entry.name, "package": entry.distribution} for entry in entries])
        return
    table = Table("demo", "package")
    for entry in entries:
        table.add_row(entry.name, entry.distribution)
    print_text(table)


def _parts_table(name: str, export: Export) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: {export.model['architecture']} as a split proxy")
    for column in ("part", "takes", "gives", "weights"):
        table.add_column(column)
    owners: dict[str, str] = {}
    for part in export.parts:
        if part.weights is None:
            weights = "none"
        elif part.weights in owners:
            weights = f"in {part.weights}, as {owners[part.weights]}"
        else:
            owners[part.weights] = part.name
            weights = f"{format_bytes(export.files[part.weights])} in {part.weights}"
        table.add_row(part.name, part.inputs[0].name, part.outputs[0].name, weights)
    return table


def _result_table(export: Export, parity: dict[str, Any], perf: PerfMetrics | None) -> Table:
    from rich.table import Table

    table = Table(show_header=False)
    sites = export.cut["sites"]
    cut = ", ".join(
        f"{name} at {site['module']}" for name, site in sites.items() if "module" in site
    )
    table.add_row("cut out", cut)
    table.add_row(
        "cut verified", f"largest difference {export.cut['verified']['max_difference']:.2g}"
    )
    table.add_row(
        "parity with PyTorch",
        f"{parity['equal_tokens']} of {counted(parity['steps'], 'token')} equal, "
        f"largest logit difference {parity['max_difference']:.1e} of "
        f"{parity['largest_logit']:.1f}",
    )
    if perf is not None:
        table.add_row(
            "speed",
            f"first token after {perf.prefill_time:.3f} s, then {perf.decode_perf:.0f} tokens/s",
        )
    return table


def _short(path: Path | None) -> str:
    """The path, with ``~`` for the user's home folder."""
    if path is None:
        return ""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
