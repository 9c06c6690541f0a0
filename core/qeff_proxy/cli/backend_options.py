"""The options of backends: shapes, cores, ``-O``, inputs to calibrate on, and a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import UsageError


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """Backend, shapes, cores."""
    parser.add_argument("--backend", default="onnxruntime", help="default: onnxruntime")
    add_shape_options(parser)
    add_calibration_option(parser)
    add_recipe_option(parser)
    add_backend_option(parser, "NAME=VALUE", "an option of this backend")


def add_backend_option(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """``-O``."""
    parser.add_argument(
        "-O",
        "--backend-option",
        action="append",
        default=[],
        metavar=metavar,
        help=f"{what}; may be given again",
    )


def add_calibration_option(parser: argparse.ArgumentParser) -> None:
    """``--calibrate``: inputs for a backend that quantizes."""
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="PATH",
        help="inputs to calibrate a quantized precision on: prompts, one a line; an image or a "
        "sound, or a folder of them; a dump, or a folder of dumps",
    )


def add_recipe_option(parser: argparse.ArgumentParser) -> None:
    """``--recipe``: what stays wide."""
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="modules that stay wide where the rest is in a lower precision; qeff-proxy recipe "
        "writes one",
    )


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Shapes and cores, common to all backends."""
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--prefill-seq-len", type=int, metavar="N", help="run prompts in chunks of N tokens"
    )
    parser.add_argument("--ctx-len", type=int, metavar="N", help="most positions in all")
    parser.add_argument(
        "--seq-len",
        type=_lengths,
        metavar="N,N,…",
        help="lengths to pad the inputs of a single pass to, each to the next longer one",
    )
    parser.add_argument("--num-cores", type=int, metavar="N", help="cores to use")


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def with_recipe_of(args: argparse.Namespace, name: str, options: CompileOptions) -> CompileOptions:
    """The options, with the recipe that the backend obeys."""
    if args.recipe is None:
        return options
    from qeff_proxy.backends.recipe import with_recipe

    return with_recipe(name, options, args.recipe.expanduser())


def compile_options_of(
    args: argparse.Namespace, backend_options: Sequence[str] = ()
) -> CompileOptions:
    """Shapes, cores and the options of one backend, ``NAME=VALUE`` each."""
    return CompileOptions(
        batch_size=args.batch_size,
        prefill_seq_len=args.prefill_seq_len,
        ctx_len=args.ctx_len,
        seq_len=args.seq_len,
        num_cores=args.num_cores,
        backend=dict(parse_option(text) for text in backend_options),
    )


def parse_option(text: str, option: str = "-O") -> tuple[str, Any]:
    """Split ``name=value``; true, false and whole numbers are converted."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{option} {text} is not NAME=VALUE")
    if value.lower() in {"true", "false"}:
        return name, value.lower() == "true"
    try:
        return name, int(value)
    except ValueError:
        return name, value


def options_by_backend(
    args: argparse.Namespace, backends: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """The options that ``-O BACKEND.NAME=VALUE`` gives to each of some backends, and the recipe.

    Raises:
        UsageError: One is misspelled or another backend's; or one cannot obey the recipe.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in args.backend_option:
        backend, dot, option = text.partition(".")
        if not dot or "=" in backend:
            raise UsageError(f"-O {text} is not BACKEND.NAME=VALUE")
        name, value = parse_option(option)
        options.setdefault(backend, {})[name] = value
    from qeff_proxy.verify.options import BEST

    named = set(backends)
    unused = sorted(set(options) - named)
    if unused and BEST not in named:
        raise UsageError(f"-O names {unused[0]}, which is not verified")
    for name in named if getattr(args, "recipe", None) is not None else ():
        given = replace(compile_options_of(args), backend=options.get(name, {}))
        options[name] = dict(with_recipe_of(args, name, given).backend)
    return options
