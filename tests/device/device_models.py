"""Dumps with the parts, names and shapes of four kinds of model, and random values.

What the exports of tiny-gpt2, tiny-whisper, tiny-llava and a MiniLM declare, with fewer layers and
smaller sizes; no model runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.dump import DumpOptions, DumpWriter
from qeff_proxy.parts import MaskSpec, TensorSpec
from qeff_proxy.session.axes import size_of

HEADS, SIZE, HIDDEN, LAYERS = 2, 4, 8, 2
LOWEST = np.finfo(np.float32).min


def caches(prefix, axis):
    return [
        (f"{prefix}.{layer}.{kind}", "float32", ("batch", HEADS, axis, SIZE))
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]


CROSS = caches("cross_key_values", 6)
DECODER = (
    [
        ("inputs_embeds", "float32", ("batch", "query", HIDDEN)),
        ("attention_mask", "float32", ("batch", 1, "query", "past + query")),
        ("position_ids", "int64", ("batch", "query")),
        *caches("past_key_values", "past"),
    ],
    [
        ("last_hidden_state", "float32", ("batch", "query", HIDDEN)),
        *caches("present", "past + query"),
        *[(f"hidden_states.{n}", "float32", ("batch", "query", HIDDEN)) for n in range(LAYERS)],
    ],
)
EMBEDDING = (
    [("input_ids", "int64", ("batch", "query"))],
    [("inputs_embeds", "float32", ("batch", "query", HIDDEN))],
)
HEAD = (
    [("last_hidden_state", "float32", ("batch", "query", HIDDEN))],
    [("logits", "float32", ("batch", "query", 11))],
)
#: Model → part → inputs and outputs; parts named here first run in the first step only.
MODELS = {
    "gpt2": {"embedding": EMBEDDING, "body": DECODER, "lm_head": HEAD},
    "bge": {
        "embedding": (
            [("input_ids", "int64", ("batch", "sequence"))],
            [("inputs_embeds", "float32", ("batch", "sequence", HIDDEN))],
        ),
        "body": (
            [
                ("inputs_embeds", "float32", ("batch", "sequence", HIDDEN)),
                ("token_type_ids", "int64", ("batch", "sequence")),
                ("attention_mask", "float32", ("batch", 1, "sequence", "sequence")),
            ],
            [
                ("sentence_embedding", "float32", ("batch", HIDDEN)),
                ("last_hidden_state", "float32", ("batch", "sequence", HIDDEN)),
            ],
        ),
    },
    "whisper": {
        "encoder": ([("input_features", "float32", ("batch", 5, 12))], CROSS),
        "embedding": EMBEDDING,
        "body": (DECODER[0] + CROSS, DECODER[1]),
        "lm_head": HEAD,
    },
    "llava": {
        "embedding": EMBEDDING,
        "vision": (
            [("pixel_values", "float32", ("batch", 3, 6, 4))],
            [("image_features", "float32", ("batch", 9, HIDDEN))],
        ),
        "body": DECODER,
        "lm_head": HEAD,
    },
}
ONCE = {"encoder", "vision"}


def export_of(model: str, folder: Path) -> Export:
    """The export that would have run."""
    parts = tuple(
        ExportedPart(
            name,
            f"{name}.onnx",
            None,
            "0" * 64,
            *(tuple(TensorSpec(*t) for t in side) for side in sides),
            masks=tuple(MaskSpec(n, "causal") for n, _, _ in sides[0] if n == "attention_mask"),
        )
        for name, sides in MODELS[model].items()
    )
    return Export(folder, "split", "causal-lm", "float32", {}, parts, {}, {}, {}, {})


def steps_of(model: str):
    """Phase, index, new tokens, past of each step."""
    if model == "bge":
        return [("prefill", 0, 5, 0)]
    steps = [("prefill", 0, 4, 0), ("prefill", 1, 3, 4)]
    return steps + [("decode", n, 1, 7 + n) for n in range(3)]


def write_dump(
    model: str, folder: Path, *, batch: int = 1, seed: int = 0, arrays=None, **options
) -> Path:
    """Write a dump of random values, the cache growing from step to step.

    ``arrays`` gets every array, by (phase, index, part, side, name).
    """
    rng, known = np.random.default_rng(seed), {}
    with DumpWriter(folder, {"model": model}, DumpOptions(**options)) as writer:
        for phase, index, query, past in steps_of(model):
            sizes = {"batch": batch, "query": query, "past": past, "sequence": query}
            for part, (inputs, outputs) in MODELS[model].items():
                if part in ONCE and (phase, index) != ("prefill", 0):
                    continue
                sides = []
                for specs in (inputs, outputs):
                    for name, dtype, shape in specs:
                        if specs is inputs and name.startswith("cross_"):
                            continue  # the encoder's
                        size = tuple(size_of(axis, sizes) for axis in shape)
                        known[name] = value_of(rng, name, dtype, size, known)
                    sides.append({name: known[name] for name, _, _ in specs})
                has_cache = any(name.startswith("past_") for name, _, _ in inputs)
                past_length = past if has_cache else None
                writer.step(phase, index, part, *sides, past_length=past_length)
                if arrays is not None:
                    for side, tensors in zip(("in", "out"), sides, strict=True):
                        for name, array in tensors.items():
                            arrays[phase, index, part, side, name] = array.copy()
    return folder


def value_of(rng, name, dtype, shape, known):
    if name == "attention_mask":
        mask = np.full(shape, LOWEST, np.float32)
        mask[..., :1] = 0
        return mask
    if name.startswith("past_key_values."):
        before = known.get(name.replace("past_key_values", "present"))
        return np.zeros(shape, dtype) if before is None else before
    if dtype == "int64":
        return rng.integers(0, 9, shape)
    value = rng.standard_normal(shape).astype(dtype)
    before = known.get(name.replace("present", "past_key_values"))
    if name.startswith("present.") and before is not None:
        value[:, :, : before.shape[2]] = before
    return value
