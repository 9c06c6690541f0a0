"""``qeff-proxy verify MODEL --backend A --backend B …``."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.cli.backend_options import (
    add_backend_option,
    add_calibration_option,
    add_recipe_option,
    add_shape_options,
    compile_options_of,
    options_by_backend,
)
from qeff_proxy.cli.inputs import add_input_options, parse_rows, request_of
from qeff_proxy.cli.options import (
    add_dump_options,
    add_model_options,
    check_place,
    existing_export_of,
    kind_of,
    loaded_of,
)
from qeff_proxy.cli.output import print_json, print_text, report_error, stage_display
from qeff_proxy.cli.speed_table import command_for, speed_lines
from qeff_proxy.errors import ProxyError, UsageError
from qeff_proxy.load.load_model import LoadedModel

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.verify.results import BackendResult, Verification

_EPILOG = """\
PyTorch runs the same input and is the reference. Every backend is fed the tokens that PyTorch
chose, so that each step has the same inputs; "tokens" counts those it would have chosen too.
--backend best verifies all backends that can run on this machine, measures their speed and names
the quickest; --speed measures the named backends. It takes longer: the model is also exported
without layer outputs, and the backends and PyTorch run the input in turns.
--by-layer loads, compiles and runs one layer at a time: models larger than memory can be verified.
Each layer runs on the reference's inputs (local error) and on the backend's own results so far
(inherited error). The continuation is the prompt again, from its start.
Several MODELs are verified one after another, each with the same options.
Exit status: 0 when every backend passed, else 1. Limits of --tol: see qeff-proxy compare --help.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    add_model_options(parser, exports=True, several=True)
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="a backend to verify, or best for all that can run here and the name of the quickest; "
        "may be given again (default: onnxruntime)",
    )
    inputs = add_input_options(parser)
    inputs.add_argument("--max-new-tokens", type=int, default=8, metavar="N", help="default: 8")
    _add_outcome_options(parser)
    add_shape_options(parser)
    add_calibration_option(parser)
    add_recipe_option(parser)
    add_backend_option(parser, "BACKEND.NAME=VALUE", "an option of one backend")


def _add_outcome_options(parser: argparse.ArgumentParser) -> None:
    """Verdict, speed and dumps."""
    judged = parser.add_argument_group("verdict")
    judged.add_argument(
        "--tol",
        action="append",
        default=[],
        metavar="GLOB=LIMIT:VALUE,…",
        help="tolerance of the tensors that match, such as '*=peak:0.02' (repeatable)",
    )
    judged.add_argument("--html", type=Path, metavar="FILE", help="write a report per backend")
    judged.add_argument(
        "--by-layer",
        action="store_true",
        help="compare each layer alone, with one layer in memory at a time",
    )
    judged.add_argument(
        "--self",
        action="store_true",
        dest="itself",
        help="compare no PyTorch: the input alone with itself in a batch, padded, in chunks …",
    )
    judged.add_argument(
        "--continuation",
        metavar="IDS",
        help="by layer or with --self, the token ids after the prompt (default: the prompt's)",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--speed", action="store_true", help="measure the backends that pass, and PyTorch"
    )
    speed.add_argument("--turns", type=int, metavar="N", help="of each (default: 5)")
    add_dump_options(parser.add_argument_group("dumps"))


def run(args: argparse.Namespace) -> int:
    """Verify each model, print the verdicts, and return 0 when all passed, else 1."""
    models = args.model
    if len(models) == 1:
        args.model = models[0]
        return _verify(args, print_json)
    for name in ("output", "html", "io_dir"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is for one MODEL", "Name one, or leave it out.")
    reports: list[dict[str, Any]] = []
    codes: dict[str, int] = {}
    for model in models:
        if not args.json:
            print_text(f"{'' if model == models[0] else chr(10)}{model}:")
        one = argparse.Namespace(**{**vars(args), "model": model})
        try:
            codes[model] = _verify(one, reports.append)
        except ProxyError as error:
            report_error(f"{model}: {error}")
            codes[model] = error.exit_code
            reports.append({"model": model, "passed": False, "error": str(error)})
    if args.json:
        print_json({"passed": not any(codes.values()), "models": reports})
    else:
        print_text("")
        for model, code in codes.items():
            print_text(f"{'FAILED' if code else 'PASSED'} {model}")
    return next(filter(None, codes.values()), 0)


def _verify(args: argparse.Namespace, show_json: Callable[[dict[str, Any]], None]) -> int:
    """Verify one model."""
    from qeff_proxy.compare import Tolerances

    if args.turns is not None and not args.speed and "best" not in (args.backend or ()):
        raise UsageError(
            "--turns is for measuring speed, which nobody asked for",
            "Ask with --speed, or with --backend best.",
        )
    if args.by_layer or args.itself:
        _check_alone(args)
    elif args.continuation:
        raise UsageError("--continuation is for --by-layer and --self")
    continuation = parse_rows([args.continuation])[0] if args.continuation else ()
    tolerances = Tolerances.parse(args.tol)
    request = request_of(args)
    if args.by_layer or args.io_dir is None:
        check_place(args)
    backends = args.backend or ["onnxruntime"]
    by_backend = options_by_backend(args, backends)
    with stage_display("verifying", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.dump import DumpOptions
        from qeff_proxy.verify.options import VerifyOptions
        from qeff_proxy.verify.verify_model import verify_model

        options = VerifyOptions(
            kind=kind_of(args),
            taps=args.taps,
            output=args.output,
            opset=args.opset,
            weights=args.weights or "copy",
            force=args.force,
            wait=not args.no_wait,
            max_new_tokens=args.max_new_tokens,
            continuation=continuation,
            tolerances=tolerances,
            compile=compile_options_of(args),
            backends=by_backend,
            calibration=args.calibrate and args.calibrate.expanduser(),
            io=DumpOptions(args.io_steps, tuple(args.io_tensors or ("*",))),
            io_folder=args.io_dir,
            html=args.html,
            speed=args.speed,
            turns=VerifyOptions.turns if args.turns is None else args.turns,
        )
        more = {"trust_remote_code": args.trust_remote_code, "progress": progress}
        model = _model(args)
        _choose_by_layer(args, model)
        if args.by_layer:
            from qeff_proxy.cli.layer_table import layer_lines
            from qeff_proxy.verify.by_layer import verify_layers

            layers = verify_layers(model, backends, request, options, **more)
        elif args.itself:
            from qeff_proxy.cli.self_table import self_lines
            from qeff_proxy.verify.self_check import verify_self

            agreement = verify_self(model, backends, request, options, **more)
        else:
            verification = verify_model(model, backends, request, options, **more)
    if args.by_layer:
        _print(args, layers, layer_lines, show_json)
        if layers.failure is not None and not args.json:
            raise layers.failure
        if layers.failure is not None:  # the result is printed: no second document
            report_error(str(layers.failure))
            return layers.failure.exit_code
        return 130 if layers.interrupted else 0 if layers.passed else 1
    if args.itself:
        _print(args, agreement, self_lines, show_json)
        return 0 if agreement.passed else 1
    speed = verification.speed
    if args.json:
        from qeff_proxy.compare.report_facts import today

        report = {**verification.to_json(), "date": today()}
        if speed is not None and speed.best is not None:
            report["speed"]["command"] = command_for(args, speed.best.name)
        show_json(report)
    else:
        for renderable in _rendered(verification):
            print_text(renderable)
        if args.recipe is not None:
            print_text(f"recipe: {args.recipe}")
        for renderable in speed_lines(speed, args) if speed is not None else ():
            print_text(renderable)
    return 0 if verification.passed else 1


def _print(
    args: argparse.Namespace,
    result: Any,
    lines: Callable[[Any], Iterable[Any]],
    show_json: Callable[[dict[str, Any]], None],
) -> None:
    """Print a result as JSON, or as tables and lines."""
    if args.json:
        show_json(result.to_json())
        return
    for renderable in lines(result):
        print_text(renderable)


def _choose_by_layer(args: argparse.Namespace, model: LoadedModel | Export) -> None:
    """Verify layer by layer where the memory is too small for the whole model."""
    from qeff_proxy.load.load_model import LoadedModel
    from qeff_proxy.verify.by_layer.memory import memory_lacking

    if args.by_layer or args.itself or not isinstance(model, LoadedModel):
        return
    why = memory_lacking(model)
    if why is None:
        return
    args.by_layer = True
    how = "it is verified layer by layer (--by-layer)"
    try:
        _check_alone(args)
    except UsageError as error:
        args.by_layer = False
        how = f"it would fit layer by layer, but {error}"
    warnings.warn(f"{why}; {how}", UserWarning, stacklevel=2)


def _check_alone(args: argparse.Namespace) -> None:
    """Refuse options that a verification by layer, or without a reference, has no use for."""
    mode = "by-layer" if args.by_layer else "self"
    options = ("speed", "turns", "calibrate", "io_dir", "io_steps", "io_tensors")
    for name in (*options, *(("taps", "weights", "itself") if args.by_layer else ("html",))):
        if getattr(args, name) not in (None, False, [], "all"):
            option = "self" if name == "itself" else name.replace("_", "-")
            raise UsageError(f"--{option} and --{mode} exclude each other")
    if "best" in (args.backend or ()):
        raise UsageError(f"--{mode} takes no --backend best", "Name the backends.")


def _model(args: argparse.Namespace) -> LoadedModel | Export:
    return existing_export_of(args) or loaded_of(args)[0]


def _rendered(verification: Verification) -> list[RenderableType]:
    """The table of verdicts, then the input and the details of each backend."""
    from rich.table import Table
    from rich.text import Text

    from qeff_proxy.common.messages import printable
    from qeff_proxy.compare.verdict import describe_verdict

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("backend")
    table.add_column("verdict")
    table.add_column("first divergence")
    table.add_column("worst tensor", overflow="fold")
    floors = any(result.floor is not None for result in verification.results)
    more = ("floor dB", "limit dB") if floors else ()
    for heading in ("of peak", "tokens", "SQNR dB", "cosine", *more):
        table.add_column(heading, justify="right")
    for result in verification.results:
        table.add_row(*_row(result)[: len(table.columns)])
    lines: list[RenderableType] = [table, ""]
    lines += [Text(line) for line in _described_run(verification)]
    for result in verification.results:
        if result.comparison is None:
            said = [f"ERROR: {printable(result.error)}"]
        else:
            said = describe_verdict(result.comparison)
            said += [f"In what it says: {result.scored}."] if result.scored else []
        said[0] = f"{result.backend}: {said[0]}"
        lines += [Text(line) for line in said]
    lines += ["", f"export: {verification.export}", f"dumps: {verification.reference.parent}"]
    reports = [result.report for result in verification.results if result.report is not None]
    lines += [f"report: {report}" for report in reports]
    return lines


def _described_run(verification: Verification) -> Iterator[str]:
    """The input and PyTorch's output for it, a line each."""
    from qeff_proxy.common.messages import printable
    from qeff_proxy.compare.report_facts import described_input, described_texts

    yield f"input: {printable(described_input(verification.input))}"
    if texts := described_texts(verification.decoded):
        yield f"PyTorch says: {printable(texts)}"
    for part in verification.idle:
        yield (
            f"Note: the {part} part did not run on this input, so nothing of it was compared; an "
            "image is given with --image FILE, a sound with --audio FILE."
        )
    if not verification.taps:
        yield "Note: there are no layer taps; name the checkpoint to have every layer compared."


def _row(result: BackendResult) -> list[RenderableType]:
    from rich.text import Text

    from qeff_proxy.compare.verdict import format_share

    if result.comparison is None:
        return [result.backend, Text("ERROR", "red"), "", "", "", "", "", "", "", ""]
    first = result.divergence
    where = ""
    if first is not None:
        layer = "no layer" if first.layer is None else f"layer {first.layer}"
        part = first.tensor.partition(".")[0]
        # Of a model with several stacks of layers, the body's are what "layer" means.
        named = layer if first.layer is None or part in {"body", "model"} else f"{part} {layer}"
        where = f"{named} in {first.step}"
    worst = result.worst
    cosine = result.cosine
    return [
        result.backend,
        Text("PASSED", "green") if result.passed else Text("FAILED", "red"),
        where or "none",
        str(worst.name) if worst is not None and result.worst_error else "none",
        format_share(result.worst_error),
        f"{result.equal_tokens}/{result.tokens}" if result.tokens else "",
        _decibels(result.sqnr),
        "" if cosine is None else f"{cosine:.6f}",
        *(_decibels(value) for value in (result.floor, result.limit)),
    ]


def _decibels(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"
