"""Small models of every kind, exported once with taps for all tests of fixed shapes and of HTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.session.axes import size_of

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart

WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
CTC = {
    **WIDTHS,
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "vocab_size": 200,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
TOWER = {**WIDTHS, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
LLAMA = {
    **WIDTHS,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 4096,
}


LONG_GPT2 = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 1,
    "n_positions": 2048,
    "vocab_size": 131,
}


def _llava() -> transformers.PreTrainedModel:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **TOWER, "projection_dim": 32},
            text_config={"model_type": "llama", **LLAMA},
            image_token_id=98,
            image_seq_length=16,
        )
    )


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "long-gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**LONG_GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**WIDTHS, num_hidden_layers=1, vocab_size=99)
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**CTC)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**WHISPER)
    ),
    "llava": _llava,
}
DEMO = Path(str(__import__("qeff_proxy").__file__)).parent / "checkpoints" / "tiny-gpt2"


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all processes of a run, so that each export is made once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "npu-home"


@pytest.fixture(scope="session")
def make_export(shared_home: Path) -> Callable[[str], Export]:
    """The tapped export of a small model, by name; tests must not change it."""
    made: dict[str, Export] = {}

    def make(name: str) -> Export:
        if name not in made:
            shared_home.mkdir(exist_ok=True)
            with FileLock(shared_home / f"{name}.lock"):
                made[name] = _export(name, shared_home / name)
        return made[name]

    return make


def _export(name: str, folder: Path) -> Export:
    if name == "gpt2":  # where the commands look for it, too
        loaded = load_model(str(DEMO))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QEFF_HOME", str(folder.parent))
            return export_model(loaded, Plugins.discover().hooks_for("gpt2"), taps="layers")
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # No norm is one, no bias zero, and attention looks at some positions more.
            parameter.add_(noise * (0.1 if parameter.dim() == 1 else 0.05))
    loaded = wrap_model(model.eval())
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    return export_model(loaded, hooks, output=folder, taps="layers")


def random_feeds(part: ExportedPart, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Inputs of these sizes, the positions behind the past, nothing hidden but the future."""
    generator = np.random.default_rng(seed)
    masks = {mask.name: mask for mask in part.masks}
    feeds: dict[str, Any] = {}
    for spec in part.inputs:
        shape = [size_of(axis, sizes) for axis in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if spec.name in masks:
            ones = np.ones((shape[0], shape[3]), np.int64)
            feeds[spec.name] = build_mask(masks[spec.name], ones, shape[2], dtype)
        elif spec.name == "position_ids":
            positions = np.arange(shape[1]) + sizes["past"]
            feeds[spec.name] = np.tile(positions, (shape[0], 1)).astype(dtype)
        elif dtype.kind == "i":
            feeds[spec.name] = generator.integers(0, 2, shape).astype(dtype)
        else:
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


@pytest.fixture
def feeds_of() -> Callable[..., dict[str, Array]]:
    """`random_feeds` as a fixture."""
    return random_feeds
