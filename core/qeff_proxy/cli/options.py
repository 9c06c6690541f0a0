"""Arguments that several commands share, and the objects they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.manifest_schema import MANIFEST, Export
from qeff_proxy.backends.compile_export import Compiled
from qeff_proxy.cli.backend_options import compile_options_of, parse_option, with_recipe_of
from qeff_proxy.cli.output import add_json_option, stage_display
from qeff_proxy.common.file_errors import check_writable
from qeff_proxy.errors import UsageError
from qeff_proxy.load.adapter_inputs import NOTED
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.tasks import CUT_OPTIONS, TASKS
from qeff_proxy.parts import INNER_TAPS, PROXIES, TAPS, WEIGHTS, Kind
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request

_DEFAULT_DTYPE = "float32"


def kind_of(args: argparse.Namespace) -> Kind:
    """The kind of proxy that ``--proxy`` names."""
    return PROXIES[args.proxy or "split"]


def _check_agrees(args: argparse.Namespace, export: Export) -> None:
    """Refuse arguments that contradict the export that MODEL names."""
    taps = ",".join(export.settings.get("taps", ()))
    asked = {
        "--dtype": (args.dtype, export.dtype),
        "--proxy": (args.proxy and PROXIES[args.proxy], export.kind),
        "--weights": (args.weights, export.made_by.get("weights", "copy")),
        "--opset": (args.opset, export.made_by.get("opset")),
        "--taps": (getattr(args, "taps", None), taps),
        "--output": (args.output, None),
        "--adapter-as-input": (args.adapter_as_input or None, NOTED in export.cut or None),
        "--model-task": (
            args.model_task,
            next((n for n, t in TASKS.items() if export.flow in t.flows), None),
        ),
        "-C": (", ".join(args.cut_option) or None, None),
    }
    for option, (value, actual) in asked.items():
        if value is not None and value != actual:
            raise UsageError(
                f"{option} {value} contradicts {args.model}, which is an export already"
                + (f" ({actual})" if actual else ""),
                "Name the checkpoint to export it anew.",
            )


def add_model_options(
    parser: argparse.ArgumentParser, *, exports: bool, several: bool = False
) -> None:
    """MODEL, or several, and how to load and cut it."""
    what = "a checkpoint's folder or hub id"
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="+" if several else None,
        help=f"{what}, or an export's folder" if exports else what,
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of weights and activations (default: float32)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[@WEIGHT]",
        help="merge a LoRA adapter (a folder or hub id) into the weights, times WEIGHT; may be "
        "given again; of an export that takes adapters as inputs, the one to run with",
    )
    parser.add_argument(
        "--adapter-as-input",
        action="store_true",
        help="do not merge: the graphs take adapters like the given ones as inputs, and run with "
        "the first of them",
    )
    parser.add_argument(
        "--model-task",
        choices=sorted(TASKS),
        metavar="TASK",
        help="what the model is for, where its config.json says something else, such as embedding "
        f"for the encoder of a masked LM: {', '.join(sorted(TASKS))}",
    )
    if exports:
        parser.add_argument(
            "--proxy",
            choices=sorted(PROXIES),
            help="split: embedding, body and LM head as graphs of their own (default); stub: one "
            "graph with weightless ends; none: the whole model as one graph",
        )
        parser.add_argument(
            "--weights",
            choices=WEIGHTS,
            help="of the export: copied (default); reference: link the checkpoint's files instead "
            "(ONNX Runtime reads such files, onnx.load refuses them); keep: write the codes and "
            "scales of a quantized checkpoint, not the floats they stand for",
        )
        parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the export")
        parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset")
        parser.add_argument(
            "--force", action="store_true", help="export again, even if the export is up to date"
        )
        parser.add_argument(
            "--no-wait",
            action="store_true",
            help="fail if another run writes or compiles the same export",
        )
        parser.add_argument(
            "--taps",
            metavar="WHAT",
            help=f"add outputs of each layer: {', '.join((*TAPS, *INNER_TAPS))}, or a glob of its "
            "modules such as 'self_attn.*'; several with commas",
        )
    parser.add_argument(
        "-C",
        "--cut-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an option of the cut: {', '.join(CUT_OPTIONS)}; may be given again",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code of the checkpoint"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights, which can run code"
    )
    add_json_option(parser)


def add_dump_options(group: argparse._ArgumentGroup) -> None:
    """Where a dump goes, and which steps and tensors it has."""
    group.add_argument("--io-dir", type=Path, metavar="DIR", help="where to")
    group.add_argument("--io-steps", default="all", help="all, first, last, every:N or A:B")
    group.add_argument("--io-tensors", action="append", metavar="GLOB", help="which tensors")


def _cut_options(args: argparse.Namespace) -> dict[str, Any]:
    options = dict(parse_option(text, "-C") for text in args.cut_option)
    for name in options:
        if name not in CUT_OPTIONS:
            raise UsageError(
                f"-C {name} is no option of a cut", f"Known: {', '.join(CUT_OPTIONS)}."
            )
    return options


def loaded_of(args: argparse.Namespace) -> tuple[LoadedModel, Hooks]:
    """The checkpoint that ``MODEL`` names, and the hooks of its model type."""
    options = _cut_options(args)
    from qeff_proxy.load.load_model import flow_of, load_model, with_options
    from qeff_proxy.plugins.manager import Plugins

    loaded = load_model(
        args.model,
        task=args.model_task,
        dtype=args.dtype or _DEFAULT_DTYPE,
        trust_remote_code=args.trust_remote_code,
        allow_pickle=args.allow_pickle,
        adapters=args.adapter,
        adapter_as_input=args.adapter_as_input,
    )
    hooks = Plugins.discover().hooks_for(loaded.model_type, task=flow_of(loaded))
    return with_options(loaded, options), hooks


def existing_export_of(args: argparse.Namespace) -> Export | None:
    """The export in the folder ``MODEL``, read without importing its family; else ``None``."""
    from qeff_proxy.artifact.export_folder import find_export
    from qeff_proxy.load.checkpoint_files import folder_named

    export = find_export(folder_named(args.model))
    if export is None:
        return None
    _check_agrees(args, export)
    if not args.adapter:
        return export
    from qeff_proxy.load.adapter_inputs import with_adapter

    return with_adapter(export, args.adapter)


def known_export_of(args: argparse.Namespace) -> Export | None:
    """The export that ``MODEL`` names, or the cached export of the checkpoint it names.

    Imports neither PyTorch nor transformers.
    """
    export = existing_export_of(args)
    others = args.force or args.taps or args.model_task or getattr(args, "num_layers", None)
    if export is not None or others:
        return export
    from qeff_proxy.export.cache_key import find_known_export

    return find_known_export(
        args.model,
        kind_of(args),
        dtype=args.dtype or _DEFAULT_DTYPE,
        options=_cut_options(args),
        output=args.output,
        opset=args.opset,
        weights=args.weights or "copy",
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        adapters=args.adapter,
        adapter_as_input=args.adapter_as_input,
    )


def _hooks_of(export: Export) -> Hooks:
    from qeff_proxy.plugins.manager import Plugins

    return Plugins.discover().hooks_for(export.model["model_type"], task=export.flow)


def export_of(
    args: argparse.Namespace, *, with_processor: bool = False, prompts: Request | None = None
) -> tuple[Export, Hooks]:
    """The export that ``MODEL`` names, or that of the checkpoint it names, exported where needed.

    ``with_processor`` refuses a checkpoint without tokenizer before the work begins, and what it
    cannot make of ``prompts``; a recipe that does not fit the backend's options is refused then,
    too.
    """
    if getattr(args, "recipe", None) is not None:
        with_recipe_of(args, args.backend, compile_options_of(args, args.backend_option))
    export = existing_export_of(args)
    if export is not None:
        return export, _hooks_of(export)
    from qeff_proxy.artifact.export_folder import check_export_place

    check_export_place(args.model, args.output)
    loaded, hooks = loaded_of(args)
    if with_processor and loaded.folder is not None:
        from qeff_proxy.load.load_model import flow_of
        from qeff_proxy.load.load_processor import load_processor

        processor = load_processor(loaded.folder, trust_remote_code=args.trust_remote_code)
        recognizers = {task.flows[0] for task in TASKS.values() if task.extra == "audio"}
        if prompts is not None and flow_of(loaded) not in recognizers:  # these take paths
            hooks.preprocess(processor=processor, request=prompts)
    with stage_display("exporting", quiet=args.json) as progress:
        from qeff_proxy.export.export_model import export_model

        export = export_model(
            loaded,
            hooks,
            kind_of(args),
            output=args.output,
            opset=args.opset,
            taps=args.taps or (),
            num_layers=getattr(args, "num_layers", None),
            weights=args.weights or "copy",
            force=args.force,
            wait=not args.no_wait,
            progress=progress,
        )
    return export, hooks


def check_place(args: argparse.Namespace) -> None:
    """Refuse a folder of exports that cannot be written to, before anything is loaded."""
    from qeff_proxy.artifact.export_folder import cache_home
    from qeff_proxy.load.checkpoint_files import folder_named

    folder = folder_named(args.model)
    is_export = (folder / MANIFEST).is_file()
    check_writable(folder if is_export else args.output or cache_home())


def compiled_of(args: argparse.Namespace, export: Export, *, force: bool = False) -> Compiled:
    """Compile the export with the options in the arguments."""
    from qeff_proxy.backends.compile_export import compile_export

    options = with_recipe_of(args, args.backend, compile_options_of(args, args.backend_option))
    with stage_display("compiling", quiet=args.json) as progress:
        if args.calibrate is not None:
            from qeff_proxy.run.calibration import with_calibration

            options = with_calibration(
                export,
                _hooks_of(export),
                args.backend,
                options,
                args.calibrate.expanduser(),
                trust_remote_code=args.trust_remote_code,
                progress=progress,
            )
        wait = not args.no_wait
        return compile_export(
            export, args.backend, options, force=force, wait=wait, progress=progress
        )
