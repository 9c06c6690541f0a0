"""``qeff-proxy generate MODEL PROMPT …``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.options import add_compile_options, add_model_options, compiled_of, export_of
from qeff_proxy.cli.output import print_json, print_text
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from qeff_proxy.run import RunResult

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_options(parser, exports=True)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text to go on from")
    parser.add_argument(
        "--ids",
        action="store_true",
        help="each PROMPT is a list of token ids such as 464,3290; no tokenizer is needed",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--stream", action="store_true", help="print text as it comes (one prompt)")
    parser.add_argument("--num-beams", type=int, metavar="N")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the best")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop after this text")
    dump = parser.add_argument_group("dump")
    dump.add_argument("--write-io", action="store_true", help="dump every tensor of every step")
    dump.add_argument("--io-dir", type=Path, metavar="DIR", help="where to")
    dump.add_argument("--io-steps", default="all", help="all, first, last, every:N or A:B")
    dump.add_argument("--io-tensors", action="append", metavar="GLOB", help="which tensors")
    dump.add_argument(
        "--kv", choices=("delta", "full"), default="delta", help="cache rows added, or all"
    )
    add_compile_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, and print texts and timings."""
    _check(args)
    rows = [_parse_ids(text) for text in args.prompts] if args.ids else []
    settings = _settings(args)
    from qeff_proxy.dump import DumpOptions

    beams = args.num_beams or 1
    io_options = DumpOptions(
        args.io_steps, tuple(args.io_tensors or ("*",)), "full" if beams > 1 else args.kv
    )
    export, hooks = export_of(args, with_processor=not rows)
    compiled = compiled_of(args, export, hooks)
    from qeff_proxy.load import load_processor
    from qeff_proxy.request import Request
    from qeff_proxy.run import run_compiled

    processor = None
    if not rows:
        processor = load_processor(
            export.processor_folder, trust_remote_code=args.trust_remote_code
        )
    if args.stream:
        from transformers import TextStreamer

        settings["streamer"] = TextStreamer(processor, skip_special_tokens=True)
    result = run_compiled(
        compiled,
        hooks,
        Request(prompts=tuple(args.prompts), inputs={"input_ids": rows} if rows else None),
        processor=processor,
        settings=settings,
        write_io=args.write_io or _asks_for_dump(args),
        io_folder=args.io_dir,
        io_options=io_options,
    )
    _report(args, result)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, before anything heavy is imported."""
    if args.ids and len({text.count(",") for text in args.prompts}) > 1:
        raise UsageError("the lists of token ids differ in length", "Run them one by one.")
    if args.stream and len(args.prompts) > 1:
        raise UsageError("--stream takes one prompt")
    if args.stream and args.ids:
        raise UsageError("--stream and --ids exclude each other")
    if args.stream and args.json:
        raise UsageError("--stream and --json exclude each other")


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is no list of token ids", "Such as 464,3290.") from None
    if min(ids) < 0:
        raise UsageError(f"{text!r} has a negative token id")
    return ids


def _asks_for_dump(args: argparse.Namespace) -> bool:
    return args.io_dir is not None or args.io_steps != "all" or bool(args.io_tensors)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of transformers' ``generate``; what was not asked for is left out."""
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop_strings": args.stop,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    sampling = {"temperature", "top_k", "top_p"} & set(settings)
    if sampling and not args.sample:
        raise UsageError(f"--{min(sampling).replace('_', '-')} needs --sample")
    settings["do_sample"] = args.sample
    if args.seed is not None:
        settings["seed"] = args.seed
    return settings


def _report(args: argparse.Namespace, result: RunResult) -> None:
    perf = result.outputs["perf_metrics"]
    ids = result.outputs["generated_ids"]
    folder = str(result.io_folder) if result.io_folder is not None else None
    if args.json:
        print_json(
            {
                "prompts": list(args.prompts),
                "generated_texts": result.decoded,
                "generated_ids": ids.tolist(),
                "perf_metrics": perf.to_json(),
                "io_folder": folder,
            }
        )
        return
    if not args.stream:
        # Without a tokenizer there is no text, and the ids themselves are what was asked for.
        texts = result.decoded or ["," + ",".join(map(str, row)) for row in ids.tolist()]
        rows = len(texts) // len(args.prompts)
        for index, text in enumerate(texts):
            sys.stdout.write(f"{args.prompts[index // rows]}{text}\n")
    rate = f", {perf.decode_perf:.1f} tokens/s after it" if perf.decode_perf else ""
    sys.stderr.write(
        f"{ids.shape[1]} tokens per prompt; first after {perf.prefill_time:.3f} s{rate}\n"
    )
    if folder is not None:
        print_text(f"dump: {folder}")
