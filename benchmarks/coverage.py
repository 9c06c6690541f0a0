"""Which architectures of the installed transformers are exported, and equal PyTorch.

Each is built tiny and five layers deep, with shaken random weights, in a process of its own; then
exported and run in ONNX Runtime on a padded batch, and compared with the uncut model: the logits of
each step, the mean hidden state of each text, the logits of each frame. An architecture that is in
the JSON file already is not run again.

    python benchmarks/coverage.py --mapping encoder --mapping ctc --jobs 2
    python benchmarks/coverage.py --mapping causal --only llama,bart --json /tmp/some.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from coverage_page import table
from small_inputs import LENGTHS, STEPS, image_size_of, inputs_of
from small_models import build_small

#: The mapping's name in transformers, the auto class, and the task.
MAPPINGS = {
    "causal": ("CAUSAL_LM", "AutoModelForCausalLM", "causal-lm"),
    "ctc": ("CTC", "AutoModelForCTC", "ctc"),
    "encoder": ("MASKED_LM", "AutoModel", "encoder"),
    "image-text": ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText", "image-text-to-text"),
    "speech": ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq", "speech-seq2seq"),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "seq2seq"),
    "classification": (
        "SEQUENCE_CLASSIFICATION",
        "AutoModelForSequenceClassification",
        "classification",
    ),
    "token-classification": (
        "TOKEN_CLASSIFICATION",
        "AutoModelForTokenClassification",
        "classification",
    ),
    "masked-lm": ("MASKED_LM", "AutoModelForMaskedLM", "masked-lm"),
    # What takes images is among those of images and texts.
    "sounds": ("MULTIMODAL_LM", "AutoModelForMultimodalLM", "audio-text-to-text"),
}
#: Those in which each text gives results of its own, by the face that makes them.
TEXTS = {
    "encoder": "QEFFAutoModel",
    "classification": "QEFFAutoModelForSequenceClassification",
    "token-classification": "QEFFAutoModelForTokenClassification",
    "masked-lm": "QEFFAutoModelForMaskedLM",
}
TOLERANCE = 1e-3
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def model_types(mapping: str) -> list[str]:
    """As transformers lists them; encoders are what fills in masks or encodes texts."""
    from transformers.models.auto import modeling_auto

    names = list(vars(modeling_auto)[f"MODEL_FOR_{MAPPINGS[mapping][0]}_MAPPING_NAMES"])
    if mapping == "encoder":
        names += modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        names = [name for name in dict.fromkeys(names) if name in modeling_auto.MODEL_MAPPING_NAMES]
    if mapping == "sounds":
        others = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        names = [name for name in names if name not in others]
    return names


def kind_of(mapping: str, model_type: str) -> str:
    """How an architecture is run: one that takes images or sounds stands in other mappings, too."""
    import transformers
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    sounds = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if mapping == "causal" and texts == images:
        return "image-text"
    if mapping == "causal" and texts == sounds:
        return "sounds"
    decodes = not getattr(transformers.CONFIG_MAPPING[model_type], "is_encoder_decoder", False)
    return "sounds" if mapping in ("speech", "seq2seq") and decodes else mapping


def auto_class_of(mapping: str, model_type: str) -> Any:
    """What makes models of an architecture."""
    import transformers

    auto_class = getattr(transformers, MAPPINGS[mapping][1])
    listed = transformers.CONFIG_MAPPING[model_type] in auto_class._model_mapping  # noqa: SLF001 (there is no public way)
    return auto_class if listed else transformers.AutoModelForSeq2SeqLM


def build(mapping: str, model_type: str, hooks: Any) -> tuple[Any, Any, Any]:
    """A small model, inputs, and what it makes of them."""

    def run(model: Any) -> tuple[Any, Any]:
        inputs = inputs_of(mapping, model, hooks)
        return inputs, reference(mapping, model, inputs)

    auto_class = auto_class_of(mapping, model_type)
    model, (inputs, expected) = build_small(
        model_type, auto_class, run, decoder=mapping == "causal"
    )
    return model, inputs, expected


class Logits:
    """Keeps the logits of the last position of each step."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def step(self, _phase: str, _index: int, _part: str, _in: Any, out: Any, **_more: Any) -> None:
        """Called after each run of a part."""
        if "logits" in out:
            self.steps.append(out["logits"][:, -1:])


def generated(model: Any, hooks: Any, feeds: dict[str, Any], folder: Path) -> list[Any]:
    """The logits of each step of a greedy generation by the exported graphs."""
    import torch
    from qeff_proxy.backends.compile_export import compile_export, open_sessions
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.flows.flow import Job, load_flow
    from qeff_proxy.load.load_model import with_options, wrap_model

    size = image_size_of(model) if "pixel_values" in feeds else None
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    if "input_ids" not in feeds and model.config.model_type != "whisper":
        (sounds,) = tensors.values()
        tensors["lengths"] = torch.full((len(sounds),), sounds.shape[1])
    loaded = with_options(wrap_model(model), {} if size is None else {"image_size": size})
    export = export_model(loaded, hooks, output=folder)
    logits = Logits()
    with open_sessions(compiled := compile_export(export)) as sessions:
        job = Job(
            export=export,
            sessions=sessions,
            options=compiled.options,
            config=model.config,
            tensors=tensors,
            folder=folder,
            settings=GREEDY,
            recorder=logits,
        )
        load_flow(export.flow).run(job)
    return logits.steps[-GREEDY["max_new_tokens"] :]


def rows_alone(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """What a causal model makes of all steps at once, of each row without its padding."""
    import torch

    ids = np.concatenate([feeds["input_ids"] for feeds in inputs], 1)
    rows = []
    for row, padding in zip(ids, inputs[-1]["attention_mask"], strict=True):
        begin = len(row) - padding.sum()
        with torch.no_grad():
            logits = model(torch.from_numpy(row[None, begin:]), use_cache=False).logits.numpy()
        rows.append(np.pad(logits, ((0, 0), (begin, 0), (0, 0))))
    return [np.concatenate(rows)]


def reference(mapping: str, model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """What the uncut model makes of each, with its own cache and masks."""
    import torch
    from qeff_proxy.families.model_cache import cache_argument, cache_of, has_cache
    from qeff_proxy.flows.causal_engine import position_ids_of

    if mapping in ("image-text", "speech", "sounds"):
        tensors = {name: torch.from_numpy(value) for name, value in inputs[0].items()}
        if mapping == "speech" and "input_values" in tensors:  # as their processors give
            tensors["attention_mask"] = torch.ones_like(tensors["input_values"], dtype=torch.int64)
        out = model.generate(**tensors, **GREEDY, output_logits=True, return_dict_in_generate=True)
        return [step.float().numpy()[:, None] for step in out.logits]
    if mapping == "encoder" and model.config.is_encoder_decoder:
        model = model.get_encoder()
    takes = inspect.signature(model.forward).parameters
    results: list[Any] = []
    more: dict[str, Any] = {"use_cache": True} if mapping == "causal" else {}
    if mapping == "seq2seq":
        more["use_cache"] = False  # with one, FSMT's decoder sees later tokens of the same pass
    grows = "cache_params" not in takes  # those take the mask of the new positions
    for feeds in inputs:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        if mapping == "causal" and "position_ids" in takes:
            positions = position_ids_of(feeds["attention_mask"], feeds["input_ids"].shape[1])
            tensors["position_ids"] = torch.from_numpy(positions)
        if mapping == "causal" and not grows:
            new = tensors["input_ids"].shape[1]
            tensors["attention_mask"] = tensors["attention_mask"][:, -new:]
        with torch.no_grad():
            out = model(**tensors, **more)
        if mapping == "causal" and has_cache(out):
            more[cache_argument(model.forward)] = cache_of(out)
        elif mapping == "causal":
            return rows_alone(model, inputs)
        result = out[0].mean(1)[None] if mapping == "encoder" else out.logits
        results.append(result.reshape(1, 1, -1) if mapping == "classification" else result)
    return [result.numpy() for result in results]


def exported(mapping: str, model: Any, hooks: Any, inputs: Any, folder: Path) -> list[Any]:
    """What the exported graphs make of each; texts run as a padded batch."""
    import qeff_proxy
    from qeff_proxy.backends.compile_export import compile_export, open_sessions
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.flows.causal_engine import CausalEngine, StepId
    from qeff_proxy.flows.generation.encoder_decoder import EncoderRun
    from qeff_proxy.load.load_model import wrap_model

    if mapping == "causal":
        export = export_model(wrap_model(model), hooks, output=folder)
        results, cache = [], None
        with open_sessions(compile_export(export)) as sessions:
            engine = CausalEngine(export.parts, sessions)
            for index, (ids, padding) in enumerate(feeds.values() for feeds in inputs):
                longest = engine.longest_step or ids.shape[1]
                for new in range(ids.shape[1], 0, -longest):  # still to run
                    rest = new - min(longest, new)
                    piece = ids[:, -new : ids.shape[1] - rest]
                    seen = padding[:, : padding.shape[1] - rest]
                    logits, cache = engine.step(StepId("prefill", index), piece, seen, cache)
                    results.append(logits)
        return results
    if mapping == "seq2seq":
        export = export_model(wrap_model(model), hooks, output=folder)
        feeds = dict(inputs[0])
        ids, results, cache = feeds.pop("decoder_input_ids"), [], None
        end = [part.name for part in export.parts].index("encoder") + 1
        with open_sessions(compile_export(export)) as sessions:
            encoder = EncoderRun(export.parts[:end], sessions)
            encoder.encode({"encoder_input_ids": feeds["input_ids"]}, feeds["attention_mask"])
            engine = CausalEngine(export.parts[end:], sessions, supplier=encoder)
            for stop, length in zip(np.cumsum(STEPS), STEPS, strict=True):
                tokens, seen = ids[:, stop - length : stop], np.ones((2, stop), np.int64)
                logits, cache = engine.step(StepId("prefill", 0), tokens, seen, cache)
                results.append(logits)
        return results
    if mapping in ("image-text", "speech", "sounds"):
        return generated(model, hooks, inputs[0], folder)
    if mapping == "ctc":
        recognizer = qeff_proxy.QEFFAutoModelForCTC(model, proxy="split")
        recognizer.export(folder)
        return [recognizer.generate(inputs=feeds).logits[0][None] for feeds in inputs]
    options = {"options": {"pooling": "mean"}} if mapping == "encoder" else {}
    embedder = getattr(qeff_proxy, TEXTS[mapping])(model, proxy="split", **options)
    embedder.export(folder)
    embedder.compile(batch_size=len(inputs))
    padded = np.zeros((2, len(inputs), max(LENGTHS["encoder"])), np.int64)
    for row, feeds in enumerate(inputs):
        length = feeds["input_ids"].shape[1]
        padded[:, row, :length] = feeds["input_ids"][0], np.ones(length)
    arrays = dict(zip(("input_ids", "attention_mask"), padded, strict=True))
    result = embedder.generate(arrays)
    vectors = result.embeddings if mapping == "encoder" else result.logits
    return [vector.reshape(1, -1, vector.shape[-1]) for vector in vectors]


def refusal_of(mapping: str, model_type: str, hooks: Any) -> str | None:
    """Why an export is refused, of a model that is built without running it."""
    from qeff_proxy.errors import ProxyError
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.load.load_model import wrap_model

    auto_class = auto_class_of(mapping, model_type)
    try:
        model, _ = build_small(
            model_type, auto_class, lambda _model: None, decoder=mapping == "causal"
        )
        with tempfile.TemporaryDirectory() as folder:
            export_model(wrap_model(model), hooks, output=Path(folder) / "export")
    except ProxyError as error:  # what the model itself raises may be due to its sizes
        return None if "Error: " in error.problem else error.problem
    except Exception:  # noqa: BLE001 (it cannot be built at all)
        return None
    return None


def verdict_of(mapping: str, model_type: str) -> tuple[str, str]:
    """The verdict on one architecture, and why."""
    from qeff_proxy.errors import ProxyError
    from qeff_proxy.plugins.manager import Plugins

    mapping, verdict = kind_of(mapping, model_type), "not built"
    try:
        hooks = Plugins.discover().hooks_for(model_type, task=MAPPINGS[mapping][2])
        model, inputs, expected = build(mapping, model_type, hooks)
        verdict = "error"
        with tempfile.TemporaryDirectory() as folder:
            actual = exported(mapping, model, hooks, inputs, Path(folder) / "export")
        actual, expected = np.concatenate(actual, 1), np.concatenate(expected, 1)
        if mapping == "causal":  # without the padding in front of the second row
            real = inputs[-1]["attention_mask"].astype(bool)
            actual, expected = actual[real], expected[real]
        barred = expected <= np.finfo(np.float32).min  # tokens that the model never gives
        peak = np.abs(np.where(barred, 0, expected)).max()
        off = np.abs(actual - expected).max()
        alike = (
            np.ptp(expected.reshape(-1, expected.shape[-1]), axis=0).max() < 10 * TOLERANCE * peak
        )  # rows that prove nothing
        equal = off <= TOLERANCE * peak  # false for a NaN
        textual = mapping == "image-text" and "pixel_values" not in inputs[0]
        heard = mapping == "image-text" and {"input_features", "input_values"} & set(inputs[0])
        more = ", without images" * textual + ", with sounds" * bool(heard)
        verdict = "degenerate" if equal and alike else "equal" if equal else "differs"
    except ProxyError as error:
        return ("refused" if verdict == "error" else verdict), error.problem
    except Exception as error:  # noqa: BLE001 (any failure is a result)
        why = refusal_of(mapping, model_type, hooks) if verdict == "not built" else None
        return ("refused", why) if why else (verdict, f"{type(error).__name__}: {error}")
    return verdict, f"off by {off:.1e} of {peak:.1e}{more}"


def measure(mapping: str, model_type: str, pipe: Any) -> None:
    """Send the verdict on one architecture, and why, through a pipe."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(verdict_of(mapping, model_type))


def watch(context: Any, limit: float, item: tuple[str, str]) -> dict[str, Any]:
    """Measure one architecture in a process of its own, and stop it when its time is up."""
    start = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(*item, sender))
    process.start()
    sender.close()
    verdict, why = "time-out", f"after {limit:.0f} s"
    try:
        if receiver.poll(limit):
            verdict, why = receiver.recv()
    except EOFError:
        verdict, why = "error", "the process died"
    process.join(None if verdict != "time-out" else 0)
    process.kill()
    row = {"mapping": item[0], "model_type": item[1], "verdict": verdict}
    why = " ".join(why.split())[:200]
    return {**row, "why": why, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Measure what is asked for and not in the JSON file; write both files anew each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mapping", action="append", choices=MAPPINGS, help="default: all")
    parser.add_argument("--only", type=lambda text: set(text.split(",")), metavar="TYPE,TYPE")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--json", type=Path, default=Path("coverage.json"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json.is_file() else []
    done = {(row["mapping"], row["model_type"]) for row in rows}
    items = [
        (mapping, name)
        for mapping in args.mapping or MAPPINGS
        for name in model_types(mapping)
        if (mapping, name) not in done and (args.only is None or name in args.only)
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "qeff_proxy.export.trace.trace_part"])
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda item: watch(context, args.limit, item), items):
            rows.append(row)
            args.json.write_text(json.dumps(rows, indent=1))
            print(f"{row['model_type']}: {row['verdict']} ({row['why']})", flush=True)
    if args.markdown is not None:
        args.markdown.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
