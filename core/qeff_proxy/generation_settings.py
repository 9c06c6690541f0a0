"""What users may ask of transformers' generation loop when sessions run the forward pass.

The loop gets the logits of one position per step, so whatever needs those of several at once, a
second model, or a cache of another kind would quietly give other tokens: it is refused here.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from qeff_proxy.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qeff_proxy.flows import Job

__all__ = ["check_settings", "generation_config_of"]

#: Arguments of transformers' ``generate`` that need more than one step of one model gives.
_NOT_HERE = frozenset(
    {
        "assistant_early_exit",
        "assistant_model",
        "assistant_tokenizer",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "constraints",
        "continuous_batching_config",
        "custom_generate",
        "diversity_penalty",
        "dola_layers",
        "force_words_ids",
        "guidance_scale",
        "negative_prompt_ids",
        "num_beam_groups",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "past_key_values",
        "penalty_alpha",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
        "speculation_type",
        "synced_gpus",
        "token_healing",
        "use_mtp",
    }
)
#: Those with a value that asks for nothing.
_HARMLESS = {"diversity_penalty": 0.0, "guidance_scale": 1, "num_beam_groups": 1}
#: The loop multiplies the batch by it, and keeps scores of that many times the vocabulary.
_MOST_BEAMS = 1024


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be right, or that a proxy cannot follow.

    Args:
        settings: Arguments of transformers' ``generate``, and ``seed``; ``None`` asks for nothing.

    Raises:
        UsageError: Names the setting.
    """
    for name, value in settings.items():
        if name in _NOT_HERE and not _asks_for_nothing(name, value):
            raise UsageError(
                f"{name} cannot be used: a proxy gives the logits of one position a step",
                "Leave it out; greedy search, sampling and beams are there.",
            )
    if settings.get("use_cache") is False:
        raise UsageError("a proxy always uses its cache", "Leave out use_cache.")
    for name in ("num_beams", "num_return_sequences"):
        count = settings.get(name)
        if count is not None and (type(count) is not int or not 1 <= count <= _MOST_BEAMS):
            raise UsageError(
                f"{name} is {count!r}", f"It must be a whole number from 1 to {_MOST_BEAMS}."
            )
    temperature = settings.get("temperature")
    for one in temperature if isinstance(temperature, list | tuple) else (temperature,):
        if one is not None and not _is_temperature(one):
            raise UsageError(f"temperature is {one!r}", "It must be a number above 0.")
    seed = settings.get("seed")
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise UsageError(f"seed is {seed!r}", "It must be a whole number of 64 bits.")
    stops = settings.get("stop_strings")
    if stops is not None and not all(stops if isinstance(stops, list | tuple) else [stops]):
        raise UsageError("a stop string is empty", "It would stop at once; give some text.")


def _asks_for_nothing(name: str, value: Any) -> bool:
    harmless = (None, False, _HARMLESS.get(name))
    return isinstance(value, bool | int | float | None) and value in harmless


def _is_temperature(value: Any) -> bool:
    # Logits are divided by it in float32, so one that is tiny makes them infinite; 0, which speech
    # recognizers take for greedy search, is transformers' own to judge.
    number = isinstance(value, int | float) and math.isfinite(value)
    return number and (value == 0 or value >= 1e-6)


def generation_config_of(job: Job) -> GenerationConfig:
    """The generation settings of a run: the user's own config, else the checkpoint's.

    Raises:
        UsageError: What the user gave is no generation config, or asks for what cannot be done.
        CheckpointError: The checkpoint's cannot be read.
    """
    given = job.settings.get("generation_config")
    config = _of_checkpoint(job)
    if given is None:
        return config
    if not isinstance(given, GenerationConfig):
        raise UsageError(
            f"generation_config is a {type(given).__name__}", "Give transformers' GenerationConfig."
        )
    asked = {name: value for name, value in given.to_diff_dict().items() if value is not None}
    check_settings(asked)
    for name in GenerationConfig().to_dict():
        if asked.get(name) is not None and name != "transformers_version":
            setattr(config, name, asked[name])
    return config


def _of_checkpoint(job: Job) -> GenerationConfig:
    path = job.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(job.config)
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise TypeError("it is no JSON object")
        return GenerationConfig.from_dict(found)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "Take it from the checkpoint again, or export anew."
        ) from error
