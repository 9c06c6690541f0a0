"""GGUF files: the weights, logits and tokens of transformers' own reader."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from qeff_proxy.load.first_layers import all_layers
from qeff_proxy.load.load_model import load_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 40, 77, 3, 61, 22, 8, 15, 90, 31]])
MIXED = (Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.BF16, Type.Q5_K, Type.Q6_K)
#: Model type, and what its file is said to be of.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
BYTES = 256


def blocks(kind: Type, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Blocks of random codes whose scales are small: package gguf writes no K-quants.

    Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.float16(0.0005).tobytes()
    at = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (size - 2,)}[kind]
    for start in at:
        data[..., start : start + 2] = np.frombuffer(scale, np.uint8)
    return data.reshape(*shape[:-1], -1)


def to_ggml(name: str, weight: torch.Tensor, config: Any, architecture: str) -> np.ndarray:
    """A weight as llama.cpp's ``convert_hf_to_gguf.py`` writes it."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if architecture.startswith("gemma") and "norm.weight" in name:
        weight = weight + 1
    return weight.contiguous().float().numpy()


def write_file(path: Path, model: Any, architecture: str, types: Iterator[Type]) -> Path:
    """Write a model with a tokenizer of bytes; matrices are of the ``types`` in turn."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"Tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    more = [f"<{index}>" for index in range(BYTES + 2, config.vocab_size)]
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "th", "the", *more])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture),
        config.num_hidden_layers,
    )
    generator = np.random.default_rng(0)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = to_ggml(name, weight, config, architecture)
        kind = next(types) if array.ndim > 1 else Type.F32
        if kind in {Type.Q4_K, Type.Q5_K, Type.Q6_K}:
            data = blocks(kind, array.shape, generator)
        else:
            data = gguf.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def files(
    request: pytest.FixtureRequest, make_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path]:
    """A model, its file in float32, and one of all types that are read."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"vocab_size": BYTES + 2, "hidden_size": 256, "intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    if request.param == "mistral":
        heads["sliding_window"] = None  # its files say that they are of another architecture
    if request.param == "phi3":
        sizes["vocab_size"] = 32064  # transformers does not read the id of its padding
    model = make_model(request.param, layers=5, **sizes, **heads)
    architecture = ARCHITECTURES[request.param]
    plain = write_file(folder / "plain.gguf", model, architecture, cycle([Type.F32]))
    return model, plain, write_file(folder / "mixed.gguf", model, architecture, cycle(MIXED))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def read_by_transformers(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    ).eval()


def test_the_weights_are_those_of_transformers(files: tuple[Any, Path, Path]) -> None:
    source, plain, mixed = files
    for file in (plain, mixed):
        oracle = read_by_transformers(file)
        expected = dict(oracle.named_parameters())
        loaded = load_model(str(file))
        assert loaded.sample is not None
        for model in (loaded.model, loaded.sample(all_layers).model):
            assert type(model) is type(oracle)
            parameters = dict(model.named_parameters())
            assert parameters.keys() == expected.keys()
            for name, weight in parameters.items():
                assert torch.equal(weight, expected[name]), name
            assert torch.equal(logits_of(model), logits_of(oracle))
        assert (logits_of(oracle) - logits_of(source)).abs().max() < 1e-5 or file == mixed
