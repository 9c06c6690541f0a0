"""``qeff-proxy demo``: the whole flow, on a checkpoint that comes with the program."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.output import (
    add_json_option,
    format_bytes,
    print_json,
    print_text,
    stage_display,
)

if TYPE_CHECKING:
    import argparse

    from rich.table import Table

    from qeff_proxy.artifact import Export
    from qeff_proxy.generation import PerfMetrics
    from qeff_proxy.parity import Parity
    from qeff_proxy.run import RunResult

__all__ = ["configure", "run"]

_CHECKPOINT = "tiny-gpt2"
_PROMPT = "Anna went to the market"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", help="a causal LM's folder or hub id (default: one that comes with the program)"
    )
    parser.add_argument("--prompt", default=_PROMPT, help=f"default: {_PROMPT!r}")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Load, cut, export, compile, run, dump and compare; 1 if a token differs."""
    if args.model is not None:
        return _run_on(args, args.model, args.model)
    with as_file(files("qeff_proxy") / "checkpoints" / _CHECKPOINT) as folder:
        return _run_on(args, str(folder), _CHECKPOINT)


def _run_on(args: argparse.Namespace, source: str, name: str) -> int:
    with stage_display("demo", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.compile import compile_export
        from qeff_proxy.dump import read_dump
        from qeff_proxy.export import export_model
        from qeff_proxy.load import load_model, load_processor
        from qeff_proxy.parity import parity_of_dump
        from qeff_proxy.plugins import Plugins
        from qeff_proxy.request import Request
        from qeff_proxy.run import run_compiled

        loaded = load_model(source)
        hooks = Plugins.discover().hooks_for(loaded.model_type)
        export = export_model(loaded, hooks, progress=progress)
        compiled = compile_export(export, progress=progress)
        progress("generating")
        result = run_compiled(
            compiled,
            hooks,
            Request(prompts=(args.prompt,)),
            processor=load_processor(export.processor_folder),
            settings={"max_new_tokens": args.max_new_tokens, "do_sample": False},
            write_io=True,
        )
        assert result.io_folder is not None  # noqa: S101 (write_io gives one)
        progress("comparing with PyTorch")
        parity = parity_of_dump(loaded.model, read_dump(result.io_folder))
    if args.json:
        print_json(_report(args, export, result, parity))
    else:
        print_text(_parts_table(name, export))
        print_text(_result_table(export, parity, result.outputs["perf_metrics"]))
        print_text(f"export: {_short(export.folder)}")
        print_text(f"dump:   {_short(result.io_folder)}")
        print_text("")
        print_text(f"{args.prompt}{result.decoded[0]}")
    return 0 if parity.passed else 1


def _report(
    args: argparse.Namespace, export: Export, result: RunResult, parity: Parity
) -> dict[str, Any]:
    return {
        "export": str(export.folder),
        "cut": export.cut,
        "files": export.files,
        "parity": parity.to_json(),
        "perf_metrics": result.outputs["perf_metrics"].to_json(),
        "io_folder": str(result.io_folder),
        "prompt": args.prompt,
        "text": result.decoded[0],
    }


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


def _result_table(export: Export, parity: Parity, perf: PerfMetrics) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    sites = export.cut["sites"]
    cut = ", ".join(
        f"{name} at {site['module']}" for name, site in sites.items() if "module" in site
    )
    table.add_row("cut out", escape(cut))
    table.add_row(
        "cut verified", f"largest difference {export.cut['verified']['max_difference']:.2g}"
    )
    table.add_row(
        "parity with PyTorch",
        f"{parity.equal_tokens} of {parity.steps} tokens equal, largest logit difference "
        f"{parity.max_difference:.1e} of {parity.largest_logit:.1f}",
    )
    table.add_row(
        "speed",
        f"first token after {perf.prefill_time:.3f} s, then {perf.decode_perf:.0f} tokens/s",
    )
    return table


def _short(path: Path | None) -> str:
    """The path, from the user's home folder where it is below it."""
    if path is None:
        return ""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
