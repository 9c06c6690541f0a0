"""Check the settings for transformers' generation loop when sessions run the forward pass.

The loop gets the logits of one position per step. Settings that need the logits of several, a
second model, or a cache of another kind would silently change the tokens, so they are refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from qeff_proxy.common.arguments import callables, flag, number, texts, whole_number
from qeff_proxy.common.messages import type_named
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.flows.flow import Job

#: Arguments of transformers' ``generate`` that need more than single steps of one model.
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
#: Values of these that change nothing, and are allowed.
_HARMLESS = {"diversity_penalty": 0.0, "guidance_scale": 1, "num_beam_groups": 1}
#: Settings in a checkpoint's file about the cache or the format of the output: a proxy has its own
#: cache and format, so these change no token and are ignored.
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
#: The loop multiplies the batch and the scores of the vocabulary by the number of beams.
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
#: Token ids, one or several; some checkpoints write -1 for none.
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
    """Refuse settings that are wrong, or that a proxy cannot follow.

    Args:
        settings: Arguments of transformers' ``generate``, and ``seed``; ``None`` is ignored.

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
    for value in temperature if isinstance(temperature, list | tuple) else (temperature,):
        if value is not None and not _is_temperature(value):
            raise UsageError(f"temperature is {value!r}", "It must be a number above 0.")
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
        vocabulary: The number of tokens of the model; ``None`` where it is unknown.

    Raises:
        UsageError: Names the setting.
    """
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        for token in _listed(settings.get(name)):
            whole_number(name, token, 0, None if vocabulary is None else vocabulary - 1)


def _check_type(name: str, value: Any) -> None:
    """Refuse a value of the wrong type or out of range."""
    if name in _TOKENS:
        for token in _listed(value):
            whole_number(name, token, -1)
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
    # Logits are divided by it in float32, so a tiny one makes them infinite. Speech recognizers use
    # 0 for greedy search; transformers itself checks that.
    number = isinstance(value, int | float) and math.isfinite(value)
    return number and (value == 0 or value >= 1e-6)


def generation_config_of(job: Job) -> GenerationConfig:
    """The generation settings of a run: the user's own config, else the checkpoint's.

    Raises:
        UsageError: The user's is no generation config, or has settings that are refused.
        CheckpointError: The checkpoint's cannot be read, or has settings that are refused.
    """
    user_config = job.settings.get("generation_config")
    vocabulary = getattr(job.config.get_text_config(decoder=True), "vocab_size", None)
    config = _of_checkpoint(job, vocabulary)
    check_tokens(job.settings, vocabulary)
    if user_config is not None:
        if not isinstance(user_config, GenerationConfig):
            raise UsageError(
                f"generation_config is {type_named(user_config)}",
                "Give transformers' GenerationConfig.",
            )
        asked = {
            name: value for name, value in user_config.to_diff_dict().items() if value is not None
        }
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
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise TypeError("it is no JSON object")
        with quiet_loading():  # it warns of flags without effect
            GenerationConfig.from_dict(values)  # transformers checks the ignored settings too
        values = {name: value for name, value in values.items() if name not in _CHANGE_NOTHING}
        check_settings(values)
        check_tokens(values, vocabulary)
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {error}", "Correct it, or take it from the checkpoint again."
        ) from error
