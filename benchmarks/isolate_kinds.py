"""Faults of many kinds, in all kinds of models: is the operator named, and no healthy one accused?

Small models with random weights; a backend changes one node of layer 3 (2 where that has a state),
as `tests/isolate/operator_faults.py` does. A row tells what was named, and the error of the model's
outputs before and after that operator is exact.

    python benchmarks/isolate_kinds.py
    python benchmarks/isolate_kinds.py --model whisper
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "isolate")]

from operator_faults import (  # noqa: E402
    REQUEST,
    Fault,
    attribute,
    coarse,
    install_fault,
    instead,
    late,
    overflow,
    stale,
    then,
    untransposed,
)
from qeff_proxy.isolate import describe_fault, isolate_fault  # noqa: E402
from qeff_proxy.request import Request  # noqa: E402
from qeff_proxy.testing.tiny import random_weights  # noqa: E402
from qeff_proxy.verify.options import VerifyOptions  # noqa: E402
from test_capsules import bert, llava, whisper  # noqa: E402
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC  # noqa: E402

from conftest import small_model  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 64}
KINDS = {"layer_types": ["conv", "full_attention"] * 3, "full_attn_idxs": None}


def decoder(kind: str, layers: int = 6, **changes: Any) -> Callable[[], Any]:
    """A decoder and its request."""
    return lambda: (small_model(kind, layers=layers, **changes), REQUEST)


def recognizer() -> tuple[PreTrainedModel, Request]:
    """A CTC recognizer and a sound."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    convolutions = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(
        vocab_size=32, num_hidden_layers=5, **sizes, **convolutions, **positions
    )
    sound = np.random.default_rng(0).normal(size=(1, 800)).astype(np.float32)
    return Wav2Vec2ForCTC(config), Request(inputs={"input_values": sound})


MODELS = {
    "llama": decoder("llama"),
    "gpt2": decoder("gpt2"),
    "lfm2": decoder("lfm2", **KINDS),
    "falcon_h1": decoder("falcon_h1", layers=5, **MAMBA),
    "bert": bert,
    "whisper": whisper,
    "llava": llava,
    "wav2vec2": recognizer,
}
EPSILON = attribute("epsilon", 0.3)
AXIS = attribute("axis", 2)
ADDED = then(("Add", [np.float32(0.3)]))
#: Model → kind, operator, module, change, which of that type in the module.
FAULTS: dict[str, list[tuple[Any, ...]]] = {
    "llama": [
        ("epsilon", "Add", "layers.3.input_layernorm", ADDED),
        ("axis", "Softmax", "layers.3.self_attn", AXIS),
        ("mask", "Add", "layers.3.self_attn", instead(0), 2),
        ("rotary", "Neg", "layers.3.self_attn", instead(0)),
        ("wrong rounding", "Sigmoid", "layers.3.mlp", coarse(2)),
        ("stale cache row", "Concat", "layers.3.self_attn", stale(), 2),
        ("off-by-one position", "Concat", "layers.3.self_attn", late(), 3),
        ("transposed weight", "MatMul", "layers.3.self_attn.q_proj", untransposed),
        ("overflow", "Mul", "layers.3.mlp", overflow(), 1),
    ],
    "gpt2": [
        ("epsilon", "LayerNormalization", "h.3.ln_2", EPSILON),
        ("axis", "Softmax", "h.3.attn", AXIS),
        ("mask", "Add", "h.3.attn", instead(0)),
        ("wrong rounding", "Tanh", "h.3.mlp", coarse(2)),
        ("stale cache row", "Concat", "h.3.attn", stale()),
        ("off-by-one position", "Concat", "h.3.attn", late(), 1),
    ],
    "lfm2": [  # layer 2 is a convolution with a state
        ("stale state", "Slice", "layers.2.conv", stale(3)),
        ("off-by-one position", "Concat", "layers.2.conv", late(3)),
        ("wrong rounding", "Conv", "layers.2.conv", coarse(3)),
        ("epsilon", "Add", "layers.2.operator_norm", ADDED),
        ("rotary", "Neg", "layers.3.self_attn", instead(0)),
    ],
    "falcon_h1": [  # each layer has a recurrence with a state, and attention
        ("wrong rounding of the state", "Add", "layers.3.mamba", coarse(4), 1),
        ("wrong rounding of the step", "Softplus", "layers.3.mamba", coarse(3)),
        ("dropped bias", "Add", "layers.3.mamba", instead(0)),
    ],
    "bert": [
        ("epsilon", "LayerNormalization", "layer.3.output", EPSILON),
        ("axis", "Softmax", "layer.3.attention", AXIS),
        ("dropped bias", "Add", "layer.3.attention.self.query", instead(0)),
        ("transposed weight", "MatMul", "layer.3.attention.self.key", untransposed),
        ("overflow", "Gelu", "layer.3.intermediate", overflow()),
    ],
    "whisper": [
        ("epsilon", "LayerNormalization", "encoder.layers.3", EPSILON),
        ("axis", "Softmax", "encoder.layers.3", AXIS),
        ("dropped bias", "Add", "encoder.layers.3.fc1", instead(0)),
        ("wrong rounding", "Gelu", "encoder.layers.3", coarse(2)),
        ("stale cache row", "Concat", "decoder.layers.3.self_attn", stale()),
        ("off-by-one position", "Concat", "decoder.layers.3.self_attn", late(), 1),
        ("axis of cross-attention", "Softmax", "decoder.layers.3.encoder_attn", AXIS),
        ("dropped bias", "Add", "decoder.layers.3.fc2", instead(0)),
    ],
    "llava": [
        ("epsilon", "LayerNormalization", "tower.encoder.layers.3.layer_norm1", EPSILON),
        ("axis", "Softmax", "tower.encoder.layers.3", AXIS),
        ("dropped bias", "Add", "tower.encoder.layers.3.mlp.fc1", instead(0)),
        ("transposed weight", "MatMul", "tower.encoder.layers.3.self_attn.v_proj", untransposed),
        ("wrong rounding", "Sigmoid", "tower.encoder.layers.3", coarse(2)),
        ("mask", "Add", "decoder.layers.3.self_attn", instead(0), 2),
    ],
    "wav2vec2": [
        ("epsilon", "LayerNormalization", "encoder.layers.3", EPSILON),
        ("axis", "Softmax", "encoder.layers.3", AXIS),
        ("dropped bias", "Add", "encoder.layers.3.attention.out_proj", instead(0)),
        ("overflow", "Gelu", "encoder.layers.3", overflow()),
    ],
}


def isolate(checkpoint: Path, request: Request, edit: Fault | None) -> Any:
    """Find a fault that a backend has."""
    with pytest.MonkeyPatch.context() as patch:
        install_fault(patch, edit if edit is not None else lambda _model: None)
        return isolate_fault(
            str(checkpoint), request=request, options=VerifyOptions(max_new_tokens=2)
        )


def main() -> None:
    """Put the faults in, one at a time, and print what was named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--kind", help="only this kind of fault")
    args = parser.parse_args()
    count = named = accused = 0
    for model in args.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made, request = MODELS[model]()
            checkpoint = Path(folder) / model
            random_weights(made.eval(), 0).save_pretrained(checkpoint)
            healthy = isolate(checkpoint, request, None)
            accused += not healthy.healthy
            if not healthy.healthy:
                print(json.dumps({"model": model, "accused": describe_fault(healthy)}))
            chosen = [one for one in FAULTS[model] if args.kind in (None, one[0])]
            for kind, operator, module, change, *nth in chosen:
                edit = Fault(operator, module, change, *nth)
                fault = isolate(checkpoint, request, edit)
                found = [[o.node for o in cause.operators] for cause in fault.causes]
                row = {"model": model, "kind": kind, "named": found == [[edit.name]]}
                row |= {"node": edit.name, "where": fault.where if fault.part else None}
                sides = [fault.before, fault.after]
                row["sqnr"] = [None if one is None else round(one.sqnr, 1) for one in sides]
                if not row["named"]:
                    row["said"] = describe_fault(fault)
                print(json.dumps(row), flush=True)
                count, named = count + 1, named + row["named"]
    print(json.dumps({"faults": count, "named": named, "healthy models accused": accused}))


if __name__ == "__main__":
    main()
