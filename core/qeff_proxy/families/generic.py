"""The generic plugin: cuts any causal LM that supports transformers' generic accessors.

It locates the ends through ``get_input_embeddings()`` and ``get_output_embeddings()`` and uses the
base model as the body. The verified cut catches every case where these assumptions are wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qeff_proxy.arrays import dtype_name, given_tensors
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder import (
    DecoderPart,
    EmbeddingPart,
    EmbeddingStub,
    HeadPart,
    HeadStub,
)
from qeff_proxy.families.decoder_layout import DecoderLayout, probe_decoder
from qeff_proxy.families.past_inputs import past_inputs
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Absent, Site

_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@hookimpl(trylast=True)
def locate_embedding(model: PreTrainedModel) -> Site | None:
    """The module of ``get_input_embeddings()``."""
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    path = path_of(model, module)
    if path is None:
        return None
    scale = getattr(module, "embed_scale", None)
    scalar = scale.item() if isinstance(scale, torch.Tensor) and not scale.is_meta else scale
    return Site(path, scale=float(scalar) if isinstance(scalar, int | float) else None)


@hookimpl(trylast=True)
def locate_lm_head(model: PreTrainedModel) -> Site | Absent | None:
    """The module of ``get_output_embeddings()``, and the operations that follow it."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, which the generic plugin does "
            "not cut",
            f"No installed plugin claims model type {model.config.model_type!r}. Its encoder alone "
            "is exported with --model-task embedding (in Python, by QEFFAutoModel).",
        )
    module = model.get_output_embeddings()
    path = path_of(model, module)
    if path is None or module is None:
        return None
    decoder_path = decoder_path_of(model)
    if decoder_path is None:
        return Site(path)
    part, hidden_size = _head_part(model, decoder_path, path)
    return Site(path, follows=operations_after(part, path, hidden_size))


@hookimpl(trylast=True)
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """Cut a causal LM whose base model takes ``inputs_embeds``."""
    if isinstance(embedding, Absent) or isinstance(lm_head, Absent):
        return None
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal LM",
            "Its encoder alone is exported with --model-task embedding (in Python: QEFFAutoModel); "
            "the head needs a plugin of its own.",
        )
    decoder_path = decoder_path_of(model)
    if decoder_path is None:
        return None
    decoder = model.get_submodule(decoder_path)
    table = model.get_submodule(embedding.module)
    width = int(table.weight.shape[1])
    vocabulary, head_width = _head_size(model, lm_head.module)
    dtype = model.dtype
    layout = probe_decoder(decoder, width, dtype)
    if layout.runs_again:
        _check_prompt(model)
    if kind == "split":
        parts = _split_parts(model, decoder_path, table, layout, lm_head.module)
    else:
        whole = model
        out = vocabulary
        if kind == "stub":
            out = head_width
            stubs = {
                embedding.module: EmbeddingStub(width, dtype),
                lm_head.module: HeadStub(),
            }
            whole = replace_modules(model, stubs)
        parts = (_whole_part(whole, decoder_path, layout, dtype, out),)
    settings = {"embedding_rows": int(table.weight.shape[0]), "hidden_size": width}
    return Proxy(kind, "causal-lm", parts, settings)


@hookimpl(trylast=True)
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """The user's token ids, or those of the tokenizer, padded on the left."""
    if request.inputs is not None:
        return given_tensors(request.inputs)
    refuse_others(request, "prompts")
    if processor is None or not request.prompts:
        return None
    from qeff_proxy.families.tokenize import tokenize

    return tokenize(processor, request.prompts)


@hookimpl(trylast=True)
def decode(processor: Any, outputs: Mapping[str, Any]) -> Any | None:
    """The texts of ``generated_ids``, without special tokens."""
    if processor is None or "generated_ids" not in outputs:
        return None
    return processor.batch_decode(list(outputs["generated_ids"]), skip_special_tokens=True)


def _check_prompt(model: PreTrainedModel) -> None:
    """Refuse a model without a cache that generates behind tokens of its own, such as a mask."""
    ids = torch.ones(1, 4, dtype=torch.int64, device=model.device)
    given = model.prepare_inputs_for_generation(ids, use_cache=False)["input_ids"]
    if given.shape != ids.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__} puts {given.shape[1] - ids.shape[1]} of its own tokens behind "
            "a prompt at each step, which no flow does",
            "A plugin with a flow of its own can.",
        )


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The dotted path of a module in a model; ``None`` where it is not in it."""
    if module is None:
        return None
    paths: dict[int, str] = {id(other): path for path, other in model.named_modules() if path}
    return paths.get(id(module))


def decoder_path_of(model: PreTrainedModel) -> str | None:
    """The path of the decoder inside the model; ``None`` where it has none."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    if decoder is None or decoder is model or decoder is head:
        decoder = model.base_model
    # Some name a module as their decoder or base model that has the head in it.
    while decoder is model or any(one is head for one in decoder.modules()):
        inner = (one for one in decoder.children() if isinstance(one, PreTrainedModel))
        decoder = next(inner, None)
        if decoder is None:
            return None
    return path_of(model, decoder)


def _split_parts(
    model: PreTrainedModel,
    decoder_path: str,
    table: Any,
    layout: DecoderLayout,
    head_path: str,
) -> tuple[Part, ...]:
    dtype = dtype_name(model.dtype)
    ids = TensorSpec("input_ids", "int64", ("batch", "query"))
    head, hidden_size = _head_part(model, decoder_path, head_path)
    width, vocabulary = int(table.weight.shape[1]), _head_size(model, head_path)[0]
    embeddings = TensorSpec("inputs_embeds", dtype, ("batch", "query", width))
    hidden = TensorSpec(
        "last_hidden_state", layout.hidden_dtype or dtype, ("batch", "query", hidden_size)
    )
    logits = TensorSpec("logits", dtype, ("batch", "query", vocabulary))
    body_inputs, body_outputs = (
        replace(spec, shape=("batch", layout.query, spec.shape[-1]))
        for spec in (embeddings, hidden)
    )
    body = DecoderPart(
        model.get_submodule(decoder_path), layout, "inputs_embeds", "last_hidden_state"
    )
    return (
        Part("embedding", EmbeddingPart(table), (ids,), (embeddings,), "vocabulary"),
        Part(
            "body",
            body,
            (body_inputs, *layout.host_inputs(dtype)),
            (body_outputs, *layout.cache_outputs()),
            "body",
            layout.masks,
        ),
        Part(
            "lm_head",
            head,
            (hidden,),
            (logits,),
            "vocabulary",
        ),
    )


def _whole_part(
    model: PreTrainedModel,
    decoder_path: str,
    layout: DecoderLayout,
    dtype: torch.dtype,
    width: int,
) -> Part:
    name = dtype_name(dtype)
    if layout.runs_again:
        layout = replace(layout, cache=(past_inputs("int64", 1),))
    return Part(
        "model",
        DecoderPart(model, layout, "input_ids", "logits", decoder_path),
        (TensorSpec("input_ids", "int64", ("batch", layout.query)), *layout.host_inputs(name)),
        (TensorSpec("logits", name, ("batch", layout.query, width)), *layout.cache_outputs()),
        "model",
        layout.masks,
    )


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the operations that run while `recording` is set."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recording:
            self.names.append(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def operations_after(part: HeadPart, head_path: str, hidden_size: int) -> tuple[str, ...]:
    """Names of the operations between the head's output and the logits."""
    recorder = _OperationRecorder()

    def start(*_: Any) -> None:
        recorder.recording = True

    handle = part.model.get_submodule(head_path).register_forward_hook(start)
    try:
        with torch.no_grad(), recorder:
            part(_no_hidden(part.model, hidden_size))
    finally:
        handle.remove()
    silent = {"slice", "view", "detach", "alias", "_unsafe_view", "reshape"}
    return tuple(name for name in recorder.names if name not in silent)


def _head_size(model: PreTrainedModel, head_path: str) -> tuple[int, int]:
    """The logits and the width of the head's matrix."""
    matrix: Any = model.get_submodule(head_path).weight
    return int(matrix.shape[0]), int(matrix.shape[-1])


def _head_part(model: PreTrainedModel, decoder_path: str, head_path: str) -> tuple[HeadPart, int]:
    """The head, without the decoder; if that does not run, without the module around the decoder.

    Returns:
        It, and the width of the hidden states that it takes: the table's, or where there is a
        projection before that, the config's.

    Raises:
        UnsupportedModelError: The head does not run.
    """
    _check_forward(model, decoder_path, head_path)
    outer = decoder_path.rpartition(".")[0]
    own = _head_size(model, head_path)[1]
    widths = dict.fromkeys((own, getattr(model.config.get_text_config(), "hidden_size", own)))
    problem: UnsupportedModelError | None = None
    for width, path in product(widths, filter(None, (decoder_path, outer))):
        part = HeadPart(model, path)
        try:
            check_head_runs(part, width)
        except UnsupportedModelError as error:
            problem = problem or error
        else:
            return part, width
    assert problem is not None  # noqa: S101 (the decoder has a path)
    raise problem


def _check_forward(model: PreTrainedModel, decoder_path: str, head_path: str) -> None:
    """Refuse a model that cannot run on embeddings alone: it has more before its decoder.

    Raises:
        UnsupportedModelError: Its ``forward`` needs more; names the modules it is for.
    """
    takes = inspect.signature(model.forward).parameters
    needed = [
        name for name, one in takes.items() if one.default is one.empty and one.kind in _PLAIN
    ]
    more = [name for name in needed if name not in ("input_ids", "inputs_embeds")]
    if more:
        own = {path.partition(".")[0] for path in (decoder_path, head_path)}
        others = [name for name, _ in model.named_children() if name not in own]
        raise UnsupportedModelError(
            f"{type(model).__name__} always needs {', '.join(more)}: its {', '.join(others)} come "
            "before its language model, and no plugin makes parts of them",
            "A plugin for this model type can.",
        )


def check_head_runs(part: HeadPart, hidden_size: int) -> None:
    """Run a head on one hidden state.

    Raises:
        UnsupportedModelError: It does not run.
    """
    try:
        with torch.no_grad():
            part(_no_hidden(part.model, hidden_size))
    except (  # an index beyond its table among them
        *(TypeError, AttributeError, ValueError, LookupError),
        *(NotImplementedError, RuntimeError),
    ) as error:
        raise UnsupportedModelError(
            f"the LM head of {type(part.model).__name__} cannot be run on its own: {error}",
            "A plugin for this model type can build the head in another way.",
        ) from error


def _no_hidden(model: PreTrainedModel, hidden_size: int) -> torch.Tensor:
    return torch.zeros(1, 1, hidden_size, dtype=model.dtype, device=model.device)
