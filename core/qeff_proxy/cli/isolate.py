"""``qeff-proxy isolate MODEL --backend B``."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.backend_options import (
    add_backend_option,
    add_shape_options,
    compile_options_of,
    options_by_backend,
)
from qeff_proxy.cli.inputs import add_input_options, request_of
from qeff_proxy.cli.options import add_model_options, check_place, kind_of, loaded_of
from qeff_proxy.cli.output import print_json, print_text, stage_display
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from qeff_proxy.isolate.results import Fault
    from qeff_proxy.isolate.run_capsule import Rerun

_EPILOG = """\
The model is verified layer by layer. In the first layer that is out of line by its own error,
groups of operators run on the backend and all others exactly, until the smallest group is left that
causes the error. The proof is the error of the model's last outputs with those operators exact.
--capsule writes them to a file with their inputs and a script: qeff-proxy isolate FILE.zip runs it.
--against compares two exports of one model (other opset, exporter, weights) without a backend, or
with --export two dumps: the operators between the device's values.
Exit status: 0 when there is no fault, 130 when interrupted, else 1.
"""


#: Options of a checkpoint's export, and of compiling it for a backend.
_EXPORT = ("taps", "dtype", "proxy", "output", "opset", "force", "cut_option")
_COMPILATION = ("backend_option",)
_INPUTS = ("prompt", "prompt_file", "ids", "audio", "image")
_SHAPES = ("seq_len", "prefill_seq_len", "ctx_len")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    add_model_options(parser, exports=True)
    parser.add_argument("--backend", action="append", metavar="NAME", help="default: onnxruntime")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="MODEL is an export, and the operator is named in which this other one differs; or "
        "MODEL is a dump, and this is the dump of a device that was fed from it",
    )
    parser.add_argument(
        "--export", type=Path, metavar="EXPORT", help="of two dumps: the export that they are of"
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="look into this layer, such as 3 or 'body layer 3' (default: the first out of line)",
    )
    parser.add_argument(
        "--capsule", type=Path, metavar="FILE.zip", help="write the cause to a file that runs alone"
    )
    parser.add_argument(
        "--anonymous", action="store_true", help="with random weights in the capsule"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with the operators around the cause"
    )
    inputs = add_input_options(parser)
    inputs.add_argument("--max-new-tokens", type=int, default=8, metavar="N", help="default: 8")
    add_shape_options(parser)
    add_backend_option(parser, "BACKEND.NAME=VALUE", "an option of the backend")


def run(args: argparse.Namespace) -> int:
    """Find the fault, print it, and return 0 when there is none, else 1."""
    if len(args.backend or ()) > 1:
        raise UsageError("isolate looks at one backend", "Run it once for each --backend.")
    if args.against is not None and args.backend:
        raise UsageError("--against needs no backend: both exports run on the CPU", "Leave it out.")
    args.backend = (args.backend or ["onnxruntime"])[0]
    if args.anonymous and args.capsule is None:
        raise UsageError("--anonymous is for --capsule, which is not given")
    path = Path(args.model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        return _run_capsule(args, path)
    if path.suffix == ".zip" and not path.exists():
        raise ArtifactError(f"there is no file {path}", "Check the path; --capsule writes one.")
    if args.html is not None:
        check_report_place(args.html)
        if args.capsule is not None and args.html.resolve() == args.capsule.resolve():
            raise UsageError("--html and --capsule name one file", "Name two.")
    if args.export is not None:
        fault = _between_dumps(args, path)
    else:
        fault = _between(args, path) if args.against is not None else _on_backend(args)
    from qeff_proxy.isolate.report import write_fault_report
    from qeff_proxy.isolate.results import describe_fault

    if args.html is not None:
        write_fault_report(fault, args.html)
    if args.json:
        print_json(fault.to_json())
    else:
        for line in describe_fault(fault):
            print_text(line)
        if args.html is not None:
            print_text(f"report: {args.html}")
    if fault.interrupted:
        return 130
    return 0 if fault.passed else 1


def _between(args: argparse.Namespace, path: Path) -> Fault:
    """The first difference of two exports."""
    from qeff_proxy.dump.format import MANIFEST

    if dumps := [
        str(one) for one in (path, args.against) if (one.expanduser() / MANIFEST).is_file()
    ]:
        raise UsageError(
            f"{' and '.join(dumps)} {'is a dump' if len(dumps) == 1 else 'are dumps'}",
            "Name the export that two dumps are of with --export EXPORT, or two exports.",
        )
    _refuse(args, ("layer", "anonymous", *_EXPORT, *_COMPILATION), "--against takes no --{}")
    request = request_of(args)
    with stage_display("isolating", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.artifact.export_folder import read_export
        from qeff_proxy.isolate.between_exports import isolate_between
        from qeff_proxy.verify.options import VerifyOptions

        return isolate_between(
            read_export(path),
            read_export(args.against.expanduser()),
            request,
            VerifyOptions(max_new_tokens=args.max_new_tokens, compile=compile_options_of(args)),
            capsule=args.capsule,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )


def _between_dumps(args: argparse.Namespace, path: Path) -> Fault:
    """The first value of a device's dump that does not follow from those before it."""
    if args.against is None:
        raise UsageError(
            "--export is for two dumps: isolate REFERENCE --against DEVICE --export EXPORT"
        )
    own = ("layer", "anonymous", *_INPUTS, *_SHAPES, *_EXPORT, *_COMPILATION)
    _refuse(args, own, "two dumps take no --{}")
    with stage_display("isolating", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.artifact.export_folder import read_export
        from qeff_proxy.dump import read_dump
        from qeff_proxy.isolate.between_dumps import isolate_dumps

        dumps = read_dump(path), read_dump(args.against.expanduser())
        export = read_export(args.export.expanduser())
        return isolate_dumps(*dumps, export, capsule=args.capsule, progress=progress)


def _on_backend(args: argparse.Namespace) -> Fault:
    """The operator that is at fault on a backend."""
    from qeff_proxy.artifact.manifest_schema import MANIFEST

    if (Path(args.model).expanduser() / MANIFEST).is_file():
        raise UsageError(
            f"{args.model} is an export",
            "Name the checkpoint that it is of, or another export with --against.",
        )
    request = request_of(args)
    by_backend = options_by_backend(args, [args.backend])
    check_place(args)
    with stage_display("isolating", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.isolate.isolate_fault import isolate_fault
        from qeff_proxy.verify.options import VerifyOptions

        options = VerifyOptions(
            kind=kind_of(args),
            output=args.output,
            opset=args.opset,
            force=args.force,
            wait=not args.no_wait,
            max_new_tokens=args.max_new_tokens,
            compile=compile_options_of(args),
            backends=by_backend,
        )
        return isolate_fault(
            loaded_of(args)[0],
            args.backend,
            request,
            options,
            layer=args.layer,
            capsule=args.capsule,
            anonymous=args.anonymous,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )


def _refuse(args: argparse.Namespace, names: Iterable[str], problem: str) -> None:
    """Refuse options that have no effect here.

    Raises:
        UsageError: One was given; ``problem`` says why it is wrong.
    """
    for name in names:
        if getattr(args, name, None) not in (None, False, []):
            raise UsageError(problem.format(name.replace("_", "-")), "Leave it out.")


def _run_capsule(args: argparse.Namespace, path: Path) -> int:
    """Run a capsule, and return 0 where its fault does not show, else 1."""
    own = ("layer", "against", "export", "capsule", "html", *_INPUTS, *_SHAPES, *_EXPORT)
    _refuse(args, own, "a capsule has its own graph and input: it takes no --{}")
    if path.suffix != ".zip" and not zipfile.is_zipfile(path):
        raise UsageError(
            f"{path} is neither a folder nor a capsule",
            "Name a checkpoint's folder or hub id, or a file of --capsule.",
        )
    from dataclasses import replace

    from qeff_proxy.isolate.run_capsule import run_capsule

    options = options_by_backend(args, [args.backend]).get(args.backend, {})
    compiled_for = replace(compile_options_of(args), backend=options)
    rerun = run_capsule(path, args.backend, compiled_for)
    if args.json:
        print_json(rerun.to_json())
    else:
        for line in _describe(rerun):
            print_text(line)
    return 1 if rerun.shows else 0


def _describe(rerun: Rerun) -> list[str]:
    from qeff_proxy.common.messages import printable
    from qeff_proxy.isolate.results import format_share

    facts = {name: printable(str(value)) for name, value in rerun.facts.items()}
    operators = rerun.facts.get("operators") or ["?"]
    verdict = "The fault shows here." if rerun.shows else "The fault does not show here."
    return [
        f"{printable(str(operators[0]))}{' …' if len(operators) > 1 else ''} of "
        f"{facts.get('where', '?')}, {facts.get('step', '?')}: {facts.get('source', '?')}",
        f"Error over the peak: {facts.get('backend', '?')} gave {format_share(rerun.recorded)}, "
        f"{rerun.backend} gives {format_share(rerun.error)}.",
        verdict,
    ]
