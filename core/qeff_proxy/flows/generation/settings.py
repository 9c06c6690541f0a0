"""What users may ask of transformers' generation loop when sessions run the forward pass.

The loop gets the logits of one position per step, so whatever needs those of several at once, a
second model, or a cache of another kind would quietly give other tokens: it is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from qeff_proxy.common.arguments import callables, flag, number, texts, whole_number
from qeff_proxy.common.messages import type_named
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from qeff_proxy.flows.flow import Job

__all__ = ["check_settings", "check_tokens", "generation_config_of"]

#: Arguments of transformers' ``generate`` that need more than one step of one model gives.
_NOT_HERE = frozenset(
    {
        "assistant_early_exit",
        "assistant_model",
        "assistant_tokenizer",
        "cache",
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
#: What a checkpoint's file may say of a cache or of the form of the answer: a proxy has a cache of
#: its own, and gives what it always gives, so that these change no token.
_CHANGE_NOTHING = (
    "cache_config",
    "cache_implementation",
    "compile_config",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "use_cache",
)
#: The loop multiplies the batch by it, and keeps scores of that many times the vocabulary.
_MOST_BEAMS = 1024
#: Whole numbers: the least and the most.
_WHOLE: dict[str, tuple[int, int | None]] = {
    "encoder_no_repeat_ngram_size": (0, None),
    "max_length": (1, None),
    "max_new_tokens": (1, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, _MOST_BEAMS),
    "num_return_sequences": (1, _MOST_BEAMS),
    "seed": (-(2**63), 2**64 - 1),
    "top_k": (0, None),
}
#: Token ids, one or several; -1 is how some checkpoints say that there is none.
_TOKENS = (
    "begin_suppress_tokens",
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "pad_token_id",
    "suppress_tokens",
)
_NUMBERS = {
    "length_penalty": (-math.inf, math.inf),
    "max_time": (0.0, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
}
_FLAGS = ("do_sample", "remove_invalid_values", "renormalize_logits")
_FUNCTIONS = ("logits_processor", "stopping_criteria")


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
    for name, value in settings.items():
        if value is not None:
            _check_type(name, value)
    temperature = settings.get("temperature")
    for one in temperature if isinstance(temperature, list | tuple) else (temperature,):
        if one is not None and not _is_temperature(one):
            raise UsageError(f"temperature is {one!r}", "It must be a number above 0.")
    streamer = settings.get("streamer")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise UsageError(f"streamer is {type_named(streamer)}", "Give a streamer of transformers.")
    stops = settings.get("stop_strings")
    if stops is not None and not all(texts("stop_strings", stops) or [""]):
        raise UsageError("a stop string is empty", "It would stop at once; give some text.")


def check_tokens(settings: Mapping[str, Any], vocabulary: int | None) -> None:
    """Refuse forced tokens that the model does not have.

    Args:
        settings: As in `check_settings`, or a generation config's values.
        vocabulary: How many tokens the model has; ``None``: not known.

    Raises:
        UsageError: Names the setting.
    """
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        for one in _listed(settings.get(name)):
            whole_number(name, one, 0, None if vocabulary is None else vocabulary - 1)


def _check_type(name: str, value: Any) -> None:
    """Refuse a value of another kind than the setting's."""
    if name in _TOKENS:
        for one in _listed(value):
            whole_number(name, one, -1)
    elif name in _WHOLE:
        whole_number(name, value, *_WHOLE[name])
    elif name in _NUMBERS:
        number(name, value, *_NUMBERS[name])
    elif name in _FLAGS:
        flag(name, value)
    elif name in _FUNCTIONS:
        callables(name, value)


def _listed(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):  # token ids may be a tensor
        value = value.tolist()
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


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
        CheckpointError: The checkpoint's cannot be read, or asks for what cannot be done.
    """
    given = job.settings.get("generation_config")
    vocabulary = getattr(job.config.get_text_config(decoder=True), "vocab_size", None)
    config = _of_checkpoint(job, vocabulary)
    check_tokens(job.settings, vocabulary)
    if given is not None:
        if not isinstance(given, GenerationConfig):
            raise UsageError(
                f"generation_config is {type_named(given)}",
                "Give transformers' GenerationConfig.",
            )
        asked = {name: value for name, value in given.to_diff_dict().items() if value is not None}
        check_settings(asked)
        check_tokens(asked, vocabulary)
        for name in GenerationConfig().to_dict():
            if asked.get(name) is not None and name != "transformers_version":
                setattr(config, name, asked[name])
    return config


def _of_checkpoint(job: Job, vocabulary: int | None) -> GenerationConfig:
    path = job.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(job.config)
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise TypeError("it is no JSON object")
        with quiet_loading():  # of flags that have no use beside others
            GenerationConfig.from_dict(found)  # transformers' checks, of what is left out too
        found = {name: value for name, value in found.items() if name not in _CHANGE_NOTHING}
        check_settings(found)
        check_tokens(found, vocabulary)
        return GenerationConfig.from_dict(found)
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {error}", "Correct it, or take it from the checkpoint again."
        ) from error
