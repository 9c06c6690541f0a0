"""``qeff-proxy compile MODEL``."""

from __future__ import annotations

import argparse

from qeff_proxy.cli.backend_options import add_compile_options
from qeff_proxy.cli.options import add_model_options, compiled_of, export_of, known_export_of
from qeff_proxy.cli.output import print_json, print_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_options(parser, exports=True)
    add_compile_options(parser)


def run(args: argparse.Namespace) -> int:
    """Compile every part; export first where needed."""
    export = known_export_of(args) or export_of(args)[0]
    compiled = compiled_of(args, export, force=args.force)
    if args.json:
        print_json(
            {
                "folder": str(compiled.folder),
                "export": str(export.folder),
                "backend": compiled.backend,
                "options": compiled.options.to_json(),
                "was_there": compiled.was_there,
            }
        )
    else:
        state = "was compiled already" if compiled.was_there else "compiled"
        recipe = "" if args.recipe is None else f", with the recipe {args.recipe}"
        print_text(f"{export.model['source']} {state} for {compiled.backend}{recipe}")
        print_text(f"{compiled.folder}")
    return 0
