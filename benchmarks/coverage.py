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
import copy
import inspect
import json
import multiprocessing
import platform
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, VOCABULARY = 5, 256
#: What configs call a size, by what is a small one.
SMALL: dict[int, str] = {
    LAYERS: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers",
    VOCABULARY: "vocab_size",
    64: "hidden_size n_embd d_model dim embedding_size emb_dim word_embed_proj_dim "
    "output_hidden_size true_hidden_size intra_bottleneck_size lru_width proj_hidden_size",
    96: "intermediate_size ffn_dim n_inner d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads n_routed_experts "
    "decoder_attention_heads attention_heads num_local_experts num_experts linear_num_value_heads "
    "linear_num_heads mamba_n_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token "
    "linear_num_key_heads",
    16: "head_dim v_head_dim qk_nope_head_dim d_kv kv_lora_rank query_pre_attn_scalar state_size "
    "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_d_state",
    8: "qk_rope_head_dim rotary_dim sliding_window attention_window_size local_attention",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_expert_group n_groups expand "
    "mamba_expand",
    128: "max_position_embeddings n_positions max_seq_len max_target_positions",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
_RECURRENT = ["linear_attention", "full_attention"]
#: What the defaults of a config leave out, or have otherwise than the checkpoints.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # refused with it: it takes token ids
    "granitemoehybrid": {"layer_types": _RECURRENT * 2 + _RECURRENT[:1]},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": _RECURRENT * 2 + _RECURRENT[:1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
SETTINGS["lfm2"]["full_attn_idxs"] = None
#: Left out where a model of all of these cannot be built: first the shapes of heads, then widths.
ATTEMPTS = (
    (),
    ("head_dim", "num_key_value_heads", "num_kv_heads"),
    tuple(name for name, size in SIZES.items() if size not in (LAYERS, VOCABULARY)),
)
MOST_PARAMETERS = 2.5e8
#: The mapping's name in transformers, the auto class, and the task.
MAPPINGS = {
    "causal": ("CAUSAL_LM", "AutoModelForCausalLM", "causal-lm"),
    "ctc": ("CTC", "AutoModelForCTC", "ctc"),
    "encoder": ("MASKED_LM", "AutoModel", "encoder"),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "seq2seq"),
    "classification": (
        "SEQUENCE_CLASSIFICATION",
        "AutoModelForSequenceClassification",
        "classification",
    ),
}
STEPS = (7, 3, 1, 1)
#: Some models with states do not go on from them with several positions as they do with one.
STEPS_OF_STATES = (10, 1, 1)
LENGTHS = {"encoder": (9, 6, 4), "input_values": (8_000, 5_300), "input_features": (120, 77)}
TOLERANCE = 1e-3


def model_types(mapping: str) -> list[str]:
    """As transformers lists them; encoders are what fills in masks or encodes texts."""
    from transformers.models.auto import modeling_auto

    names = list(vars(modeling_auto)[f"MODEL_FOR_{MAPPINGS[mapping][0]}_MAPPING_NAMES"])
    if mapping == "encoder":
        names += modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        names = [name for name in dict.fromkeys(names) if name in modeling_auto.MODEL_MAPPING_NAMES]
    return names


def small_settings(config: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a config that make its model small."""
    settings: dict[str, Any] = {}
    depth = getattr(config, "num_hidden_layers", None)
    for name in config.to_dict():
        value = vars(config)[name] if name in vars(config) else getattr(config, name, None)
        if hasattr(value, "to_dict"):
            settings[name] = type(value)(**small_settings(value, left_out))
        elif name in SIZES and name not in left_out and type(value) is int:
            settings[name] = SIZES[name]
        elif isinstance(value, list) and len(value) == depth and depth > LAYERS:
            kinds = list(dict.fromkeys(map(str, value)))
            few = [value[[str(v) for v in value].index(kind)] for kind in kinds]
            settings[name] = (few * LAYERS)[:LAYERS]
        elif name.endswith("token_id") and type(value) is int and value >= VOCABULARY:
            settings[name] = 1
    return settings


def build(mapping: str, model_type: str, hooks: Any) -> tuple[Any, Any, Any]:
    """A small model with shaken weights, inputs, and what it makes of them."""
    import torch
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    auto_class = getattr(transformers, MAPPINGS[mapping][1])
    for left_out in ATTEMPTS:
        try:
            settings = small_settings(config_class(), left_out)
            config = config_class(**{**settings, **SETTINGS.get(model_type, {})})
            if mapping == "causal" and hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                size = auto_class.from_config(copy.deepcopy(config)).num_parameters()
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters are too many")
            model = auto_class.from_config(config, attn_implementation="eager").eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    parameter.add_(noise * (0.1 if parameter.dim() < 2 else 0.15))
            inputs = inputs_of(mapping, model, hooks)
            return model, inputs, reference(mapping, model, inputs)
        except Exception:
            if left_out is ATTEMPTS[-1]:
                raise
    raise AssertionError("the last attempt returns or raises")


def inputs_of(mapping: str, model: Any, hooks: Any) -> list[dict[str, Any]]:
    """The inputs of each step, or of each row without its padding."""
    generator = np.random.default_rng(5)
    if mapping == "ctc":
        name = model.main_input_name
        site = hooks.locate_lm_head(model, model.config)
        width = hooks.build_proxy(model, None, site, "split").parts[0].inputs[0].shape[2:]
        shapes = [(1, length, *width) for length in LENGTHS[name]]
        return [{name: generator.standard_normal(shape, np.float32)} for shape in shapes]
    if mapping in ("encoder", "classification"):
        rows = [generator.integers(3, VOCABULARY, (1, n)) for n in LENGTHS["encoder"]]
        return [{"input_ids": ids} for ids in rows]
    if mapping == "seq2seq":
        feeds = {
            "input_ids": generator.integers(3, VOCABULARY, (2, 11)),
            "attention_mask": np.ones((2, 11), np.int64),
            "decoder_input_ids": generator.integers(3, VOCABULARY, (2, sum(STEPS))),
        }
        feeds["input_ids"][1, 7:], feeds["attention_mask"][1, 7:] = 0, 0
        return [feeds]
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionLayer

    layers = DynamicCache(config=model.config).layers
    has_states = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    steps = STEPS_OF_STATES if has_states else STEPS
    ids = generator.integers(3, VOCABULARY, (2, sum(steps)))
    padding = np.ones_like(ids)
    padding[1, :3] = 0
    ends = np.cumsum(steps)
    return [
        {"input_ids": ids[:, end - length : end], "attention_mask": padding[:, :end]}
        for length, end in zip(steps, ends, strict=True)
    ]


def reference(mapping: str, model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """What the uncut model makes of each, with its own cache and masks."""
    import torch
    from qeff_proxy.families.model_cache import cache_argument, cache_of
    from qeff_proxy.flows.causal_engine import position_ids_of

    if mapping == "encoder" and model.config.is_encoder_decoder:
        model = model.get_encoder()
    takes = inspect.signature(model.forward).parameters
    results: list[Any] = []
    more: dict[str, Any] = {"use_cache": True} if mapping == "causal" else {}
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
        if mapping == "causal":
            more[cache_argument(model.forward)] = cache_of(out)
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
    if mapping == "ctc":
        recognizer = qeff_proxy.QEFFAutoModelForCTC(model, proxy="split")
        recognizer.export(folder)
        return [recognizer.generate(inputs=feeds).logits[0][None] for feeds in inputs]
    if mapping == "classification":
        embedder = qeff_proxy.QEFFAutoModelForSequenceClassification(model, proxy="split")
    else:
        embedder = qeff_proxy.QEFFAutoModel(model, proxy="split", options={"pooling": "mean"})
    embedder.export(folder)
    embedder.compile(batch_size=len(inputs))
    padded = np.zeros((2, len(inputs), max(LENGTHS["encoder"])), np.int64)
    for row, feeds in enumerate(inputs):
        length = feeds["input_ids"].shape[1]
        padded[:, row, :length] = feeds["input_ids"][0], np.ones(length)
    arrays = dict(zip(("input_ids", "attention_mask"), padded, strict=True))
    result = embedder.generate(arrays)
    vectors = result.logits if mapping == "classification" else result.embeddings
    return list(vectors[:, None, None])


def measure(mapping: str, model_type: str, pipe: Any) -> None:
    """Send the verdict on one architecture, and why, through a pipe."""
    import torch
    from qeff_proxy.errors import ProxyError
    from qeff_proxy.plugins.manager import Plugins

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verdict = "not built"
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
        peak, off = np.abs(expected).max(), np.abs(actual - expected).max()
        alike = (
            np.ptp(expected.reshape(-1, expected.shape[-1]), axis=0).max() < 10 * TOLERANCE * peak
        )  # rows that prove nothing
        equal = off <= TOLERANCE * peak  # false for a NaN
        verdict = "degenerate" if equal and alike else "equal" if equal else "differs"
        pipe.send((verdict, f"off by {off:.1e} of {peak:.1e}"))
    except ProxyError as error:
        pipe.send(("refused" if verdict == "error" else verdict, error.problem))
    except Exception as error:  # noqa: BLE001 (any failure is a result)
        pipe.send((verdict, f"{type(error).__name__}: {error}"))


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


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a page in Markdown."""
    packages = ("transformers", "torch", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        "# Architectures, measured",
        "",
        f"`benchmarks/coverage.py` on {datetime.now(UTC):%-d %B %Y}, Python "
        f"{platform.python_version()}, {versions}: every architecture of a mapping of transformers,"
        f" {LAYERS} layers deep, with shaken random weights, run in ONNX Runtime and compared with "
        "PyTorch. *Not built*: this script makes no small model of it, so nothing is known.",
    ]
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        own = sorted((r for r in rows if r["mapping"] == mapping), key=lambda r: r["model_type"])
        counts = Counter(row["verdict"] for row in own)
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        lines += ["", f"## {mapping}: {summary}", "", "| model type | | |", "| --- | --- | --- |"]
        for row in own:
            why = row["why"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{row['model_type']}` | {row['verdict']} | {why} |")
    return "\n".join([*lines, ""])


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
