"""Inputs of small models: padded batches of tokens, images and sounds of noise."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import numpy as np
from small_models import FIRST_SPECIAL

__all__ = ["LENGTHS", "STEPS", "image_size_of", "inputs_of"]

STEPS = (7, 3, 1, 1)
#: Some models with states do not go on from them with several positions as they do with one.
STEPS_OF_STATES = (10, 1, 1)
LENGTHS = {"encoder": (9, 6, 4), "input_values": (8_000, 5_300), "input_features": (120, 77)}


def inputs_of(mapping: str, model: Any, hooks: Any) -> list[dict[str, Any]]:
    """The inputs of each step, or of each row without its padding."""
    generator = np.random.default_rng(5)
    if mapping == "ctc":
        name = model.main_input_name
        site = hooks.locate_lm_head(model, model.config)
        width = hooks.build_proxy(model, None, site, "split").parts[0].inputs[0].shape[2:]
        shapes = [(1, length, *width) for length in LENGTHS[name]]
        return [{name: generator.standard_normal(shape, np.float32)} for shape in shapes]
    if mapping == "image-text":
        return [with_sounds(model, generator, image_prompt(model, generator))]
    if mapping == "sounds" and hasattr(model.config, "audio_length_per_tok"):  # for each token
        frames = 30 * model.config.audio_length_per_tok
        noise = generator.standard_normal((2, model.config.audio_config.num_mel_bins, frames))
        ids = generator.integers(3, FIRST_SPECIAL, (2, 6))
        mask = np.ones_like(ids)
        mask[1, :2] = 0
        sounds = {"input_features": noise.astype(np.float32)}
        return [{"input_ids": ids, "attention_mask": mask, **sounds}]
    if mapping == "sounds":
        return [with_sounds(model, generator, {}, required=True)]
    if mapping == "speech":
        return [sound(model, generator)]
    if mapping in ("encoder", "classification", "token-classification", "masked-lm"):
        rows = [generator.integers(3, FIRST_SPECIAL, (1, n)) for n in LENGTHS["encoder"]]
        return [{"input_ids": ids} for ids in rows]
    if mapping == "seq2seq":
        feeds = {
            "input_ids": generator.integers(3, FIRST_SPECIAL, (2, 11)),
            "attention_mask": np.ones((2, 11), np.int64),
            "decoder_input_ids": generator.integers(3, FIRST_SPECIAL, (2, sum(STEPS))),
        }
        feeds["input_ids"][1, 7:], feeds["attention_mask"][1, 7:] = 0, 0
        return [feeds]
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionLayer

    layers = DynamicCache(config=model.config).layers
    has_states = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    steps = STEPS_OF_STATES if has_states else STEPS
    ids = generator.integers(3, FIRST_SPECIAL, (2, sum(steps)))
    padding = np.ones_like(ids)
    padding[1, :3] = 0
    ends = np.cumsum(steps)
    return [
        {"input_ids": ids[:, end - length : end], "attention_mask": padding[:, :end]}
        for length, end in zip(steps, ends, strict=True)
    ]


def image_size_of(model: Any) -> int | None:
    """A small side in pixels, for towers that take images of any size."""
    names = ("vision_config", "vq_config", "vision_model", "audio_config")
    parts = [getattr(model.config, name, None) for name in names]
    return None if any(getattr(part, "image_size", None) for part in parts) else 32


def image_tensors(model: Any) -> tuple[dict[str, Any], int]:
    """The tensors of two images of noise and the tokens of each; none if no form fits the tower."""
    import torch
    from qeff_proxy.errors import UnsupportedModelError
    from qeff_proxy_vision.one_image import candidates, feature_arguments, features_owner

    width = model.get_input_embeddings().weight.shape[-1]
    torch.manual_seed(1)
    size = image_size_of(model)
    both = size and (size, size)
    try:
        arguments = feature_arguments(model) or ["none"]
        plain = candidates(model, ["pixel_values"], both)
        for image in chain(candidates(model, arguments, both), plain):
            tensors = image.batch(2)
            if image.pixels.min() >= 0:  # from 0 to 1
                tensors["pixel_values"] = torch.rand(tensors["pixel_values"].shape).to(model.dtype)
            try:
                with torch.no_grad():
                    outputs = features_owner(model).get_image_features(**tensors)
            except Exception:  # noqa: BLE001 (the form of another model)
                continue
            pooled = getattr(outputs, "pooler_output", outputs)
            features = getattr(outputs, "last_hidden_state", None) if pooled is None else pooled
            if features is None:  # those of several layers alone
                features = outputs.deepstack_features[0][1]
            rows = [features] if isinstance(features, torch.Tensor) else features
            return tensors, sum(row.numel() for row in rows) // width // 2
    except UnsupportedModelError:
        pass
    return {}, 0


def image_prompt(model: Any, generator: Any) -> dict[str, Any]:
    """A batch of two prompts, one of them padded, with an image each where the model takes one."""
    from qeff_proxy_vision.one_image import image_token

    tensors, count = image_tensors(model)
    token = image_token(model.config) or 0
    texts = [generator.integers(3, FIRST_SPECIAL, n).tolist() for n in (4, 6, 2, 3)]
    prompts = [texts[0] + [token] * count + texts[1], texts[2] + [token] * count + texts[3]]
    length = max(map(len, prompts))
    ids = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    arrays = {"input_ids": ids, "attention_mask": mask}
    takes = inspect.signature(model.forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in takes and count:
            arrays[name] = (ids == token).astype(np.int64)
    return arrays | {name: value.numpy() for name, value in tensors.items()}


def with_sounds(
    model: Any, generator: Any, prompts: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    """The prompts, or a batch of two, with a sound behind each, where the model takes sounds."""
    import torch
    from qeff_proxy.errors import UnsupportedModelError
    from qeff_proxy_vision import musicflamingo, qwen2_audio
    from qeff_proxy_vision.one_image import image_token
    from qeff_proxy_vision.sounds import find_tower, sound_getter, sound_token

    own = {"musicflamingo": musicflamingo, "qwen2_audio": qwen2_audio}.get(model.config.model_type)
    get = sound_getter(model) if own is None else own.features_of
    token = sound_token(model.config)
    paths = [path for path, _ in model.named_modules() if path.endswith("language_model")]
    width = model.get_input_embeddings().weight.shape[-1]
    torch.manual_seed(1)
    try:
        if get is None or token is None:
            raise UnsupportedModelError("it says nothing of sounds")
        tower = find_tower(model, get, next(iter(paths), "model"), width, None)
    except UnsupportedModelError:
        if required:
            raise ValueError("no sounds are known for it") from None
        return prompts
    if not prompts:
        ids = generator.integers(3, FIRST_SPECIAL, (2, 6))
        prompts = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    rows = []
    for row, count in enumerate(tower.counts):
        text = prompts["input_ids"][row][prompts["attention_mask"][row] == 1][row:]
        rows.append([*text, *[token] * count, *generator.integers(3, FIRST_SPECIAL, 4)])
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    is_image = (ids == image_token(model.config)).astype(np.int64)
    types = {name: is_image for name in prompts if name.endswith("token_type_ids")}
    sounds = {name: tensor.numpy() for name, tensor in tower.sounds.items()}
    return {**prompts, "input_ids": ids, "attention_mask": mask, **types, **sounds}


def sound(model: Any, generator: Any) -> dict[str, Any]:
    """A sound, of Whisper two, in the form that the model's encoder takes it."""
    config = model.config
    if "input_values" in (model.main_input_name, model.get_encoder().main_input_name):
        return {"input_values": generator.standard_normal((1, 8_000), np.float32)}
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels")
    parts = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))]
    bins = [getattr(part, name, None) for part in parts for name in names]
    bins = next((size for size in bins if isinstance(size, int)), 80)
    if hasattr(config, "composer_vocab_size"):  # checkpoints name them
        tokens = {f"composer{n + 1}": 100 + n for n in range(config.composer_vocab_size)}
        model.generation_config.composer_to_feature_token = tokens
        bins = config.d_model
    frames = getattr(config, "max_source_positions", None)
    if config.model_type == "whisper":
        return {"input_features": generator.standard_normal((2, bins, 2 * frames), np.float32)}
    return {"input_features": generator.standard_normal((1, 120, bins), np.float32)}
