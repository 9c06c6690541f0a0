"""``qeff-proxy generate MODEL INPUT …``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.cli.backend_options import add_compile_options
from qeff_proxy.cli.inputs import add_media_options, hint_of_image, parse_rows
from qeff_proxy.cli.options import add_dump_options, add_model_options, compiled_of, export_of
from qeff_proxy.cli.output import print_json, print_text
from qeff_proxy.common.file_errors import check_writable
from qeff_proxy.errors import UsageError
from qeff_proxy.request import Request, is_media
from qeff_proxy.run.run_compiled import RunResult

#: Input names of speech models: features, or samples.
_SOUND_INPUTS = {"input_features", "input_values"}
#: How many numbers of a vector are printed; ``--json`` has all.
_SHOWN = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_options(parser, exports=True)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a text to continue or to embed; for a speech model a sound file",
    )
    add_media_options(parser)
    parser.add_argument(
        "--ids",
        action="store_true",
        help="each INPUT is a list of token ids such as 464,3290; no tokenizer is needed",
    )
    search = parser.add_argument_group("generation")
    search.add_argument("--max-new-tokens", type=int, metavar="N")
    search.add_argument(
        "--stream", action="store_true", help="print text while it is generated (one INPUT)"
    )
    search.add_argument("--num-beams", type=int, metavar="N")
    search.add_argument(
        "--sample", action="store_true", help="sample instead of taking the likeliest token"
    )
    search.add_argument("--temperature", type=float, metavar="T")
    search.add_argument("--top-k", type=int, metavar="K")
    search.add_argument("--top-p", type=float, metavar="P")
    search.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    search.add_argument("--stop", action="append", metavar="TEXT", help="stop after this text")
    speech = parser.add_argument_group("speech, where the model supports it")
    speech.add_argument("--language", metavar="NAME", help="of the speech, such as en")
    speech.add_argument("--task", choices=("transcribe", "translate"))
    speech.add_argument("--timestamps", action="store_true", help="print when each piece was said")
    dump = parser.add_argument_group("dump")
    dump.add_argument("--write-io", action="store_true", help="dump every tensor of every step")
    add_dump_options(dump)
    dump.add_argument(
        "--kv", choices=("delta", "full"), default="delta", help="cache rows added, or all"
    )
    add_compile_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the model, and print its output, with timings where it generates."""
    _check(args)
    rows = parse_rows(args.inputs) if args.ids else []
    settings = _settings(args)
    from qeff_proxy.dump import DumpOptions
    from qeff_proxy.run.run_compiled import generates, run_compiled

    beams = args.num_beams or 1
    io_options = DumpOptions(
        args.io_steps, tuple(args.io_tensors or ("*",)), "full" if beams > 1 else args.kv
    )
    export, hooks = export_of(args, with_processor=not rows, prompts=_prompts(args))
    if (args.write_io or _asks_for_dump(args)) and args.io_dir is None:
        check_writable(export.folder)
    if generates(export):
        settings["do_sample"] = args.sample
    elif settings or args.sample or args.stream:
        raise UsageError(
            f"{export.model['source']} generates no tokens one by one",
            "Leave out the options of generation.",
        )
    compiled = compiled_of(args, export)
    from qeff_proxy.load.load_processor import load_processor

    processor = None
    if not rows:
        processor = load_processor(
            export.processor_folder, trust_remote_code=args.trust_remote_code
        )
    request = _request(args, rows, export, settings)
    if not rows:
        hint_of_image(export, args.image)
    # Generated text continues a prompt of text alone; an encoder's output stands alone.
    encodes = any(part.name == "encoder" for part in export.parts)
    continues = not request.audio and not request.images and not encodes
    if args.stream:
        from transformers import TextStreamer

        tokenizer = getattr(processor, "tokenizer", processor)
        settings["streamer"] = TextStreamer(
            tokenizer, skip_prompt=not continues, skip_special_tokens=True
        )
    result = run_compiled(
        compiled,
        hooks,
        request,
        processor=processor,
        settings=settings,
        write_io=args.write_io or _asks_for_dump(args),
        io_folder=args.io_dir,
        io_options=io_options,
    )
    _report(args, result, continues=continues)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, before anything heavy is imported."""
    for option in ("stream", "audio", "image"):
        if getattr(args, option) and args.ids:
            raise UsageError(f"--{option} and --ids exclude each other")
    if args.stream and len(args.inputs) > 1:
        raise UsageError("--stream takes one INPUT")
    if args.stream and args.json:
        raise UsageError("--stream and --json exclude each other")


def _request(
    args: argparse.Namespace, rows: list[list[int]], export: Export, settings: dict[str, Any]
) -> Request:
    names = {spec.name for part in export.parts for spec in part.inputs}
    beside_text = any(part.name == "audio" for part in export.parts)
    if rows and names & _SOUND_INPUTS and not beside_text:
        raise UsageError(
            f"{export.model['source']} takes sound, not token ids",
            "Give a sound file: qeff-proxy generate MODEL speech.wav.",
        )
    if rows:
        return Request(inputs={"input_ids": rows})
    inputs, images, sounds = tuple(args.inputs), tuple(args.image), tuple(args.audio)
    if beside_text:  # a sound may be alone, too
        if sounds or not all(map(is_media, inputs)):
            return Request(prompts=inputs, audio=sounds, images=images)
        return Request(audio=inputs, images=images)
    if names & _SOUND_INPUTS:
        return Request(audio=(*inputs, *sounds), images=images, options=settings)
    return Request(prompts=inputs, audio=sounds, images=images)


def _prompts(args: argparse.Namespace) -> Request | None:
    """What is given, of which it is known before an export that it is prompts."""
    if args.ids or any(map(is_media, args.inputs)):
        return None
    return Request(tuple(args.inputs), tuple(args.audio), tuple(args.image))


def _asks_for_dump(args: argparse.Namespace) -> bool:
    return args.io_dir is not None or args.io_steps != "all" or bool(args.io_tensors)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of transformers' ``generate``, without those that were not given."""
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop_strings": args.stop,
        "language": args.language,
        "task": args.task,
        "return_timestamps": args.timestamps or None,
        "seed": args.seed,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    sampling = {"temperature", "top_k", "top_p"} & set(settings)
    if sampling and not args.sample:
        raise UsageError(f"--{min(sampling).replace('_', '-')} needs --sample")
    return settings


def _report(args: argparse.Namespace, result: RunResult, *, continues: bool) -> None:
    perf = result.outputs.get("perf_metrics")
    ids = result.outputs.get("generated_ids")
    folder = str(result.io_folder) if result.io_folder is not None else None
    classes = result.decoded if _has_labels(result.decoded) else None
    texts, segments, vectors = _decoded(result.decoded if classes is None else None)
    if args.json:
        report = {
            "inputs": list(args.inputs),
            "classes": classes,
            "generated_texts": texts,
            "segments": segments,
            "embeddings": vectors,
            "generated_ids": None if ids is None else ids.tolist(),
            "perf_metrics": None if perf is None else perf.to_json(),
        }
        report = {name: value for name, value in report.items() if value is not None}
        print_json({**report, "io_folder": folder})
        return
    if classes is not None:
        for text, found in zip(args.inputs, classes, strict=True):
            print_text(f"{text}: {_class_of(found)}")
    elif not args.stream:
        for line in _lines(args.inputs if continues else (), texts, segments, vectors, ids):
            print_text(line)
    if perf is not None and ids is not None:
        rate = f", {perf.decode_perf:.1f} tokens/s after it" if perf.decode_perf else ""
        sys.stderr.write(
            f"{ids.shape[1]} tokens per input; first after {perf.prefill_time:.3f} s{rate}\n"
        )
    if folder is not None:
        print_text(f"dump: {folder}")


def _has_labels(decoded: Any) -> bool:
    """Whether something was found about each text, or about each of its tokens."""
    first = decoded[0] if isinstance(decoded, list) and decoded else None
    return isinstance(first[0] if isinstance(first, list) and first else first, dict)


def _class_of(found: Any) -> str:
    """The likeliest label and its score; of a text whose tokens are classified, each of its."""
    if isinstance(found, list):
        return " ".join(token["label"] for token in found)
    return f"{found['label']} ({found['scores'][found['label']]:.4f})"


def _decoded(decoded: Any) -> tuple[list[str] | None, Any, list[Any] | None]:
    """Texts, timed segments and vectors; ``None`` for those the ``decode`` hook did not return."""
    if isinstance(decoded, dict):
        return decoded.get("texts"), decoded.get("segments"), None
    if decoded is None or (isinstance(decoded, list) and all(isinstance(x, str) for x in decoded)):
        return decoded, None, None
    return None, None, [vector.tolist() for vector in decoded]


def _lines(
    inputs: Sequence[str], texts: list[str] | None, segments: Any, vectors: Any, ids: Any
) -> list[str]:
    """A line for each output, after its input where there are inputs."""
    if vectors is not None:
        shown = [_shown(vector) for vector in vectors]
        return [f"{text}: {line}" for text, line in zip(inputs, shown, strict=True)]
    if segments:
        return [
            f"{piece['start']:.2f} to {piece['end']:.2f} s: {piece['text'].strip()}"
            for pieces in segments
            for piece in pieces
        ]
    # Without a tokenizer there is no text, so the ids are printed.
    outputs = texts if texts is not None else ["," + ",".join(map(str, row)) for row in ids]
    if not inputs:
        return outputs
    each = len(outputs) // len(inputs)
    return [f"{inputs[index // each]}{text}" for index, text in enumerate(outputs)]


def _shown(vector: list[Any]) -> str:
    """The first numbers of a vector; for hidden states, their shape."""
    if vector and isinstance(vector[0], list):
        return f"{len(vector)} x {len(vector[0])} hidden states"
    numbers = ", ".join(f"{number:.4f}" for number in vector[:_SHOWN])
    return f"[{numbers}{', …' if len(vector) > _SHOWN else ''}] of {len(vector)}"
