"""The arguments of QEfficient by name, and what becomes of each here.

`LOAD`, `EXPORT`, `COMPILE` and `GENERATE` hold every public argument of QEfficient's classes (its
1.23, ``transformers/models/modeling_auto.py``), and what its examples pass on to transformers, to
the processor and to ``qaic-compile``. docs/qefficient.md has them as a table.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qeff_proxy.errors import UsageError


@dataclass(frozen=True)
class Keyword:
    """What becomes of an argument.

    Attributes:
        here: What happens, in a few words; the warning says so if the argument is ignored.
        action: A value that asks for something is obeyed, ignored with a warning, or refused.
        quiet: Values that ask for nothing, besides ``None``: there is no warning for them.
    """

    here: str
    action: Literal["obeyed", "ignored", "refused"] = "obeyed"
    quiet: tuple[Any, ...] = ()

    def asks(self, value: Any) -> bool:
        """Whether the value asks for something."""
        return value is not None and str(value) not in map(str, self.quiet)


def _ignored(here: str, *quiet: Any) -> Keyword:
    return Keyword(here, "ignored", quiet)


def _refused(here: str, *quiet: Any) -> Keyword:
    return Keyword(here, "refused", quiet)


#: How alike two names are that are taken for the same, misspelled.
_NEAR = 0.75
#: Arguments for the model hub.
HUB = ("revision", "cache_dir", "token")
#: Other arguments of ``from_pretrained`` that say what to load.
FILES = (*HUB, "torch_dtype", "gguf_file")
_FETCHED = Keyword("where and how a hub id is fetched; a local folder needs none")
_OF_QAIC = "it is an option of backend='qaic'"
_FLAG = "it is a flag of qaic-compile: backend='qaic', compiler_args='-…'"
_BATCH = "the rows of a batch begin and end together; batch_size is their number"
_IMAGES = "the checkpoint's processor sizes the images, and the graphs take what it makes"
_SIZE = "of ImageTextToText: the size of the images, where the graphs are made for one"
_BOTH = "every part is exported and compiled, for prefill and decode"
_CONTEXT = "the graphs have one context length: ctx_len"
_SAMPLER = "tokens are chosen on the host: give do_sample, temperature, top_k, top_p, min_p"
_ADAPTERS = "without its adapter a prompt would get the answer of the base model"
_STREAMED = "an export reads the weights it needs layer by layer, from file to file"

#: Of ``from_pretrained`` and of the classes themselves.
LOAD: dict[str, Keyword] = {
    "pretrained_model_name_or_path": Keyword("a local folder or a hub id"),
    "enable_proxy": Keyword("cuts token embedding and LM head out"),
    "trust_remote_code": Keyword("runs the checkpoint's own code"),
    "config": Keyword("fewer layers, a dtype and other values that differ from the checkpoint's"),
    "num_hidden_layers": Keyword("the first layers only"),
    "dtype": Keyword("the dtype of the weights; 'auto' is the checkpoint's; default float32"),
    "torch_dtype": Keyword("the same as dtype"),
    **dict.fromkeys(HUB, _FETCHED),
    "kv_offload": Keyword("true, the default: vision and language as graphs of their own"),
    "pooling": Keyword("of QEFFAutoModel: a name or a function"),
    "attn_implementation": _ignored("models are traced with eager attention", "eager"),
    "low_cpu_mem_usage": _ignored(_STREAMED, True),
    "layerwise": _ignored(_STREAMED, False),
    "continuous_batching": _ignored(_BATCH, False),
    "full_batch_size": _ignored(_BATCH),
    "qaic_config": _ignored(
        "it is for graphs that QEfficient makes: its samplers, draft models and blocked attention",
        {},
    ),
    "ccl_enabled": _ignored(_CONTEXT, False),
    "max_seq_len_cached": _ignored("the model's own config says how many positions it has"),
    "ignore_mismatched_sizes": _ignored("a weight of another shape is always refused", False),
    "gguf_file": Keyword("a GGUF file in the folder or repository"),
}
#: Of a class that is called on a model.
BUILD: dict[str, Keyword] = dict(LOAD)
for _name in (*FILES, "config", "dtype", "num_hidden_layers", "trust_remote_code"):
    BUILD[_name] = _ignored("the model is loaded already", False)
#: Of ``compile``.
COMPILE: dict[str, Keyword] = {
    "onnx_path": Keyword("an export, by its folder or an ONNX file in it"),
    "lang_onnx_path": Keyword("the same as onnx_path"),
    "vision_onnx_path": Keyword("the same as onnx_path"),
    "prefill_seq_len": Keyword("tokens of a prefill chunk"),
    "ctx_len": Keyword("most positions"),
    "seq_len": Keyword("lengths of inputs of a single pass"),
    "batch_size": Keyword("rows of the batch, for backends of static shapes"),
    "num_cores": Keyword("cores; threads on a CPU"),
    "compile_dir": _ignored("what is compiled lies in compiled/ of the export; see qpc_path"),
    "comp_ctx_lengths_prefill": _ignored(_CONTEXT),
    "comp_ctx_lengths_decode": _ignored(_CONTEXT),
    "full_batch_size": _ignored(_BATCH),
    "kv_cache_batch_size": _ignored(_BATCH),
    "num_devices": _ignored(_OF_QAIC, 0, 1),
    "mdp_ts_num_devices": _ignored("backend 'qaic' calls it num_devices", 1),
    "mxfp6_matmul": _ignored(_OF_QAIC, False),
    "mxint8_kv_cache": _ignored(_OF_QAIC, False),
    "aic_enable_depth_first": _ignored(_OF_QAIC, False),
    "aic_hw_version": _ignored(_OF_QAIC, "ai100"),
    "allow_mxint8_mdp_io": _ignored(_OF_QAIC, False),
    "convert_to_fp16": _ignored(_OF_QAIC, False),
    "mdp_load_partition_config": _ignored(_OF_QAIC),
    "mos": _ignored(_OF_QAIC, -1),
    "node_precision_info": _ignored(_OF_QAIC),
    "ols": _ignored(_OF_QAIC),
    "retained_state": _ignored(_OF_QAIC, False),
    "aic_num_cores": _ignored("it is num_cores here"),
    "mdp_num_partitions": _ignored(_FLAG),
    "mdp_strategy": _ignored(_FLAG),
    "mdp_compiler_dump_path": _ignored(_FLAG),
    "split_model_io": _ignored(_FLAG, False),
    "split_retained_state_io": _ignored(_FLAG, False),
    "user_tiled": _ignored(_FLAG, False),
    "enable_qnn": _ignored("backend='qnn' compiles with QNN", False),
    "qnn_config": _ignored("backend='qnn' has options of its own"),
    "num_speculative_tokens": _ignored("tokens are generated one at a time", 0),
    "encoder_ctx_len": _ignored("the encoder's length is the checkpoint's own"),
    "img_size": _ignored(_IMAGES),
    "num_patches": _ignored(_IMAGES, 1),
    "height": Keyword(_SIZE),
    "width": Keyword(_SIZE),
    "max_num_tiles": _ignored(_IMAGES),
    "num_frames": _ignored("there is no flow for videos", 1),
    "mm_processor_kwargs": _ignored(_IMAGES, {}),
    "dynamo": _ignored("torch's dynamo exporter is always used", True, False),
    "use_onnx_subfunctions": _ignored("graphs are written without ONNX functions", False),
    "offload_pt_weights": _ignored(_STREAMED, True),
    "prefill_only": _ignored(_BOTH),
    "skip_vision": _ignored(_BOTH, False),
    "skip_lang": _ignored(_BOTH, False),
    "enable_chunking": _ignored("a longer prompt runs in chunks of prefill_seq_len", True, False),
    "retain_full_kv": _ignored("the cache has the lengths that the model gives it", False),
    "layerwise": _ignored(_STREAMED, False),
    "layerwise_window_size": _ignored(_STREAMED, 1),
    "kv_cache_prefix": _ignored("the cache is called past_key_values.… and present.…"),
    "moe_prefill_packed_chunk_size": _ignored("experts are traced as transformers has them", 256),
    "qaic_config": LOAD["qaic_config"],
}
_OF_BOTH = (
    *("prefill_only", "skip_vision", "skip_lang", "enable_chunking", "retain_full_kv"),
    *("dynamo", "use_onnx_subfunctions", "layerwise", "layerwise_window_size"),
    *("kv_cache_prefix", "moe_prefill_packed_chunk_size", "offload_pt_weights", "qaic_config"),
)
#: Of ``export``.
EXPORT: dict[str, Keyword] = {
    "export_dir": Keyword("the folder of the export"),
    **{name: COMPILE[name] for name in _OF_BOTH},
    "num_cores": _ignored("an export is for any number of cores: give it to compile"),
    "prefill_seq_len": _ignored("an export is for any length: give it to compile"),
}
_OF_TEXT = {
    "tokenizer": Keyword("the checkpoint's own by default"),
    "prompts_txt_file_path": Keyword("a file with a prompt on each line"),
    "generation_len": Keyword("the number of new tokens"),
    "stream": Keyword("prints the text of one prompt as it is generated"),
    "iteration": Keyword("runs so many times, and returns the last result"),
    "device_id": _ignored("a part runs on the device of the backend that compile named"),
    "automation": _ignored("nothing is printed: see generated_texts and perf_metrics", False),
    "enable_debug_logs": _ignored("there is no runtime that has debug logs", False),
    "is_tlm": _ignored("tokens are generated one at a time", False),
    "include_sampler": _ignored(_SAMPLER, False),
    "sampling_params": _refused(_SAMPLER),
    "include_guided_decoding": _ignored("use logits_processor", False),
    "return_pdfs": _ignored("with write_io the dump has the logits", False),
    "comp_ctx_lengths_prefill": _ignored(_CONTEXT),
    "comp_ctx_lengths_decode": _ignored(_CONTEXT),
    "prompt_to_lora_id_mapping": _refused(_ADAPTERS),
    "prompt_to_adapter_mapping": _refused("it is for QEffAutoPeftModelForCausalLM, which obeys it"),
}
#: Of ``generate``.
GENERATE: dict[str, Keyword] = {
    "inputs": Keyword("the output of a tokenizer or processor"),
    "prompts": Keyword("a prompt or several"),
    "images": Keyword("for prompts: paths, URLs, bytes, PIL images or arrays"),
    "processor": Keyword("the checkpoint's own by default"),
    "streamer": Keyword("a transformers streamer"),
    "runtime_ai100": Keyword("false runs the export on backend 'torch'"),
    "write_io": Keyword("dumps every tensor"),
    **_OF_TEXT,
    "device_ids": _OF_TEXT["device_id"],
    "dtype": _ignored("results are float32", "torch.float32", "float32"),
    "image_height": _ignored(_IMAGES),
    "image_width": _ignored(_IMAGES),
    "multi_specs": _ignored(_IMAGES, False),
    "num_frames": COMPILE["num_frames"],
}
#: Of ``cloud_ai_100_exec_kv``.
EXEC: dict[str, Keyword] = {
    "qpc_path": Keyword("the folder that compile returned"),
    "prompt": Keyword("a prompt or several"),
    "write_io_dir": Keyword("the folder of the dump"),
    **_OF_TEXT,
}
#: Public names of QEfficient that this package does not have.
ELSEWHERE = {
    "QEFFCommonLoader": "qeff-proxy inspect MODEL names the class for a checkpoint",
    "QEffFluxPipeline": "there is no flow for diffusion",
    "QEffWanPipeline": "there is no flow for diffusion",
    "QEffWanImageToVideoPipeline": "there is no flow for diffusion",
    "InternProcessor": "from qeff_proxy_vision.qefficient import InternProcessor",
    "QAICInferenceSession": "generate and cloud_ai_100_exec_kv run what compile made",
    "compile": "QEFFAutoModelForCausalLM.from_pretrained(…).compile() exports and compiles",
    "export": "QEFFAutoModelForCausalLM.from_pretrained(…).export() exports",
    "transform": "a model is cut and verified as it is exported",
}


def elsewhere(module: str, name: str) -> Exception:
    """The error for a name that a module does not have; it says what to do, where that is known."""
    if name in ELSEWHERE:
        return ImportError(f"there is no {module}.{name}: {ELSEWHERE[name]}")
    return AttributeError(f"module {module!r} has no attribute {name!r}")


class Transformed:
    """QEfficient's method ``transform``: says what there is instead."""

    def transform(self, *_: Any, **__: Any) -> None:
        """Refuse to.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"there is no transform: {ELSEWHERE['transform']}", "Leave the call out.")


def without_ignored(
    arguments: Mapping[str, Any],
    known: Mapping[str, Keyword],
    method: Callable[..., Any],
    *,
    understood: Collection[str] = (),
    whose: str = "",
) -> dict[str, Any]:
    """Drop the arguments that mean nothing here, with a warning for each that asks for something.

    Args:
        arguments: What the user gave besides the parameters of the method.
        known: `LOAD`, `EXPORT`, `COMPILE` or `GENERATE`.
        method: What they are for.
        understood: Arguments that have a meaning here; these are kept.
        whose: Who ignores them, in the warning.

    Returns:
        What is obeyed or understood, and what is not known at all.

    Raises:
        UsageError: An argument is refused, or it is unknown and near to a known one.
    """
    kept = {}
    for name in sorted(arguments, key=str):
        value, keyword = arguments[name], known.get(name)
        if name in understood or keyword is None:
            near = None if name in understood else _nearest(name, method, {*known, *understood})
            if near is not None:
                raise UsageError(f"{method.__name__} has no argument {name!r}", f"Try {near!r}.")
            kept[name] = value
        elif keyword.action == "obeyed":
            kept[name] = value
        elif keyword.asks(value) and keyword.action == "refused":
            raise UsageError(f"{name} cannot be obeyed: {keyword.here}", "Leave it out.")
        elif keyword.asks(value):
            warnings.warn(
                f"{name} {whose}is ignored: {keyword.here}", UserWarning, stacklevel=users_frame()
            )
    return kept


def users_frame() -> int:
    """The ``stacklevel`` of the first caller outside of this package, for a warning."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("qeff_proxy."):
        frame, level = frame.f_back, level + 1
    return level


def _nearest(name: str, method: Callable[..., Any], known: Collection[str]) -> str | None:
    """The argument that was probably meant."""
    own = [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    names = sorted({*own, *known})
    near = difflib.get_close_matches(name, names, n=1, cutoff=_NEAR)
    near += [other for other in names if other.startswith(f"{name}_")]
    return near[0] if near else None
