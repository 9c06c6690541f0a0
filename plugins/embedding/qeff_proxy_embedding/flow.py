"""The ``encoder`` flow: each batch of texts runs through the parts once.

The caller's padding is removed; rows are sorted by length, batched, and padded on the right to the
longest row of the batch or to the nearest compiled length. Padding does not change results: to
verify the cut, a padded batch is compared with the uncut model run on each row alone. A model whose
results padding changes runs rows of one length together, without any.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, numpy_dtype, to_array, to_tensor
from qeff_proxy.errors import UsageError
from qeff_proxy.families.rotary import rotary_limits
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.flows.causal_engine import Recorder
from qeff_proxy.flows.causal_lm import shrunk_windows
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.parts import Proxy
from qeff_proxy.request import refuse_unused
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedConfig, PreTrainedModel

from qeff_proxy_embedding.part import EncoderPart
from qeff_proxy_embedding.pooling import pooling_of_options
from qeff_proxy_embedding.probe import Probe, encoder_of, probe_model

__all__ = ["EncoderFlow", "Row", "rows_of", "run_rows", "tensors_of"]

_LENGTHS = (13, 9, 4)  # tokens of the rows used to verify a cut
_PADDED = 16  # the length they are padded to
_WINDOW = 3  # a sliding window shorter than these rows, so that it has an effect
_ROTARY_LIMIT = 10  # rotary factors change between these lengths


@dataclass(frozen=True)
class Row:
    """One text: its token ids and token types, ``[tokens]`` int64, without padding."""

    ids: Array
    types: Array


class EncoderFlow:
    """A single pass per batch."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare a padded batch, run through the parts, with the model run on each row alone.

        Where padding changes the model's results, each row runs through the parts alone, too.

        Raises:
            CutError: The results differ, or the parts cannot be run.
        """
        rows = _random_rows(model, proxy.settings.get("masking"))
        pads = proxy.settings["pads"]
        with shrunk_windows(model, _WINDOW, _ROTARY_LIMIT):
            expected = [self.reference(model, proxy, row) for row in rows]
            masks = {mask.kind: mask for mask in self.probe(model).masks}
            parts = [
                replace(part, masks=tuple(masks.get(mask.kind, mask) for mask in part.masks))
                for part in proxy.parts
            ]
            sessions = {part.name: TorchSession(part) for part in parts}
            with parts_must_run(model, sites):
                actual = []
                group = partial(_padding_group, model.config, pads)
                for number, same in groupby(rows, key=lambda row: group(len(row.ids))):
                    batch = list(same)
                    longest = len(batch[0].ids)
                    length = _PADDED if group(_PADDED) == number else longest
                    actual += _unpadded(run_rows(parts, sessions, batch, length), batch)
        counts = np.concatenate([np.atleast_2d(row) for row in expected])
        return check_equal(
            model, sites, counts, np.concatenate([np.atleast_2d(one) for one in actual])
        )

    def probe(self, model: PreTrainedModel) -> Probe:
        """What the model says of its masks."""
        return probe_model(model)

    def reference(self, model: PreTrainedModel, proxy: Proxy, row: Row) -> Array:
        """The uncut model's output for one row alone."""
        return _reference(model, proxy, row)

    def run(self, job: Job) -> dict[str, Any]:
        """Embed.

        Returns:
            ``sentence_embedding [texts, width]`` float32, or ``last_hidden_state``, a list of
            ``[tokens, hidden]`` float32 arrays.

        Raises:
            UsageError: A text is empty or too long, or the export is a stub.
        """
        if job.export.kind == "stub":
            raise UsageError(
                "a stub's outputs mean nothing, so no vectors can be had from it",
                "Export with proxy='split' to embed.",
            )
        inputs = {spec.name for part in job.export.parts for spec in part.inputs}
        # Zeros change nothing where there is one type only; tokenizers give them all the same.
        zero = "token_type_ids" in job.tensors and not job.tensors["token_type_ids"].any()
        types = ["token_type_ids"] if zero or "token_type_ids" in inputs else []
        refuse_unused(job.tensors, ["input_ids", "attention_mask", *types])
        rows = rows_of(job.tensors)
        lengths = job.options.seq_len
        limit = min(job.export.settings["max_length"] or 2**31, max(lengths or (2**31,)))
        _check_lengths(rows, limit)
        _check_ids(rows, job.export.settings.get("embedding_rows"))
        _check_counted(rows, job.export.settings)
        results: list[Any] = [None] * len(rows)
        done = 0
        tell = job.settings.get("progress") or (lambda _done, _all: None)
        for step, chosen in enumerate(_batches(job, rows)):
            batch = [rows[index] for index in chosen]
            longest = max(len(row.ids) for row in batch)
            padded = min(length for length in lengths or (longest,) if length >= longest)
            _check_padding(job, longest, padded)
            _check_positions(padded, job.export.settings.get("positions"))
            output = run_rows(job.export.parts, job.sessions, batch, padded, job.recorder, step)
            for index, result in zip(chosen, _unpadded(output, batch), strict=True):
                results[index] = result
            done += len(batch)
            tell(done, len(rows))
        if results[0].ndim == 1:
            return {"sentence_embedding": np.stack(results)}
        return {"last_hidden_state": results}

    def amount(self, job: Job) -> tuple[float, str]:
        """The number of texts."""
        return float(len(job.tensors["input_ids"])), "texts"

    def run_model(self, model: PreTrainedModel, job: Job) -> object:
        """Run the uncut model on the same batches, padded to the longest, and pool."""
        settings = job.export.settings
        pooling = pooling_of_options(settings, None, settings["hidden_size"])
        model = encoder_of(model)
        taken = inspect.signature(model.forward).parameters
        rows = rows_of(job.tensors)
        results = []
        for chosen in _batches(job, rows):
            arrays = _filled(
                [rows[index] for index in chosen], max(len(rows[i].ids) for i in chosen)
            )
            tensors = {name: to_tensor(value) for name, value in arrays.items()}
            mask = tensors["attention_mask"] = tensors.pop("padding_mask")
            hidden = model(**{name: one for name, one in tensors.items() if name in taken})[0]
            results.append(pooling(hidden, mask))
        return results


def _batches(job: Job, rows: Sequence[Row]) -> list[list[int]]:
    """The row numbers of each batch; the shortest rows come first.

    The rows of a batch may be padded to the longest of them (`_padding_group`).
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    size = int(job.settings.get("batch_size") or job.options.batch_size)
    group = partial(_padding_group, job.config, job.export.settings.get("pads", True))
    groups = groupby(order, key=lambda index: group(len(rows[index].ids)))
    alike = [list(group) for _, group in groups]
    return [group[start : start + size] for group in alike for start in range(0, len(group), size)]


def _padding_group(config: PreTrainedConfig, pads: bool, length: int) -> int:
    """Texts of lengths with equal numbers may be padded to the same length.

    Other lengths have other results, where a model does not leave out padding, or other rotary
    factors: LongRoPE beyond the original length, dynamic NTK for each length beyond it.
    """
    if not pads:
        return length
    beyond = [rope for rope, limit in rotary_limits(config.get_text_config()) if length > limit]
    if any(rope["rope_type"] == "dynamic" for rope in beyond):
        return length
    return len(beyond)


def _check_padding(job: Job, longest: int, padded: int) -> None:
    pads = job.export.settings.get("pads", True)  # absent from older exports
    if len({_padding_group(job.config, pads, length) for length in (longest, padded)}) == 1:
        return
    what = "the rotary factors of a longer one"
    if not pads:
        what = "padding, which changes the results of this model"
    raise UsageError(
        f"the compiled seq_len {padded} gives a text of {longest} tokens {what}",
        f"Compile with a seq_len of {longest}, too, or without seq_len.",
    )


def rows_of(tensors: Mapping[str, torch.Tensor]) -> list[Row]:
    """Remove the padding.

    Args:
        tensors: ``input_ids`` and optionally ``attention_mask`` (1 for a token) and
            ``token_type_ids``, all ``[texts, sequence]``; the padding may be on either side.

    Raises:
        UsageError: Shapes do not match, a row has no token, or there is padding between tokens.
    """
    if "input_ids" not in tensors:
        raise UsageError(
            f"there are no input_ids among {', '.join(tensors) or 'the inputs'}",
            "Pass the tokenizer's output, or texts.",
        )
    if tensors["input_ids"].is_floating_point():
        raise UsageError(
            f"input_ids are {tensors['input_ids'].dtype}", "Token ids are whole numbers."
        )
    ids = to_array(tensors["input_ids"].to(torch.int64))
    if ids.ndim != 2 or 0 in ids.shape:
        raise UsageError(
            f"input_ids has shape {list(ids.shape)}", "Give [texts, sequence], neither zero."
        )
    mask = _like(tensors, "attention_mask", np.ones_like(ids)) != 0
    types = _like(tensors, "token_type_ids", np.zeros_like(ids))
    rows = []
    for index, valid in enumerate(mask):
        places = np.flatnonzero(valid)
        if len(places) == 0 or places[-1] - places[0] + 1 != len(places):
            what = "has no token" if len(places) == 0 else "has padding between its tokens"
            raise UsageError(f"row {index} of attention_mask {what}", "Pad at one end only.")
        rows.append(Row(ids[index, places], types[index, places]))
    return rows


def _like(tensors: Mapping[str, torch.Tensor], name: str, default: Array) -> Array:
    if name not in tensors:
        return default
    array = to_array(tensors[name].to(torch.int64))
    if array.shape != default.shape:
        raise UsageError(
            f"{name} has shape {list(array.shape)}, input_ids {list(default.shape)}",
            "They must be equal.",
        )
    return array


def _check_lengths(rows: Sequence[Row], limit: int) -> None:
    for index, row in enumerate(rows):
        if len(row.ids) > limit:
            raise UsageError(
                f"text {index} has {len(row.ids)} tokens, and {limit} fit",
                "Shorten it, pass truncation=True to cut it off, or compile with a larger seq_len "
                "if the model allows it.",
            )


def _check_ids(rows: Sequence[Row], table: int | None) -> None:
    """Refuse ids outside the vocabulary: a negative id would index from the end of the table."""
    for row in rows if table is not None else ():
        wrong = row.ids[(row.ids < 0) | (row.ids >= table)]
        if wrong.size:
            raise UsageError(
                f"{wrong[0]} is no token of this model",
                f"Its token ids go from 0 to {(table or 0) - 1}. Use its own tokenizer; if that "
                "has added tokens, resize the model's embedding (resize_token_embeddings).",
            )


def _check_counted(rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Refuse tokens of which a body would have to know: it gives padding a position, for one."""
    padding, masking = settings.get("padding"), settings.get("masking")
    if masking is not None and any(masking in row.ids for row in rows):
        raise UsageError(
            f"token {masking} hides a token, for which this model changes all embeddings of a text",
            "Leave it out, or export without a proxy (--proxy none): cut off from its embedding, "
            "the model cannot know of it.",
        )
    if padding is not None and any(padding in row.ids for row in rows):
        raise UsageError(
            f"token {padding} is padding to this model, and attention_mask counts it as a token",
            "Give an attention_mask with 0 for padding, or export without a proxy "
            "(--proxy none): cut off from its embedding, the model cannot number it as it does.",
        )


def _check_positions(length: int, positions: int | None) -> None:
    if positions is not None and length > positions:
        raise UsageError(
            f"the compiled seq_len {length} is longer than the {positions} positions of this model",
            f"Compile with a seq_len of at most {positions}.",
        )


def run_rows(
    parts: Sequence[PartLike],
    sessions: Mapping[str, Session],
    rows: Sequence[Row],
    length: int,
    recorder: Recorder | None = None,
    step: int = 0,
) -> Array:
    """Run one batch, padded to ``length``, through all parts.

    Returns:
        The last part's output: ``[batch, width]`` or ``[batch, length, hidden]``.
    """
    known = _filled(rows, length)
    padding = known["padding_mask"]
    outputs: dict[str, Array] = {}
    for part in parts:
        masks = {mask.name: mask for mask in part.masks}
        feeds = {
            spec.name: build_mask(masks[spec.name], padding, length, numpy_dtype(spec.dtype))
            if spec.name in masks
            else known[spec.name]
            for spec in part.inputs
        }
        outputs = sessions[part.name].run(feeds)
        if recorder is not None:
            recorder.step("prefill", step, part.name, feeds, outputs, past_length=0)
        known.update(outputs)
    return next(iter(outputs.values()))


def _filled(rows: Sequence[Row], length: int) -> dict[str, Array]:
    """Ids, token types and padding mask, padded on the right: ``[batch, length]`` each."""
    names = ("input_ids", "token_type_ids", "padding_mask")
    known: dict[str, Array] = {name: np.zeros((len(rows), length), np.int64) for name in names}
    for index, row in enumerate(rows):
        known["padding_mask"][index, : len(row.ids)] = 1
        known["input_ids"][index, : len(row.ids)] = row.ids
        known["token_type_ids"][index, : len(row.ids)] = row.types
    return known


def _unpadded(output: Array, rows: Sequence[Row]) -> list[Array]:
    """One float32 array per row: its vector, or the hidden states of its tokens."""
    floats = output.astype(np.float32)
    if floats.ndim == 2:
        return list(floats)
    return [floats[index, : len(row.ids)] for index, row in enumerate(rows)]


def _random_rows(model: PreTrainedModel, masking: int | None, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    table = encoder_of(model).get_input_embeddings()
    pad = getattr(table, "padding_idx", None)
    allowed = np.array([row for row in range(table.weight.shape[0]) if row not in (pad, masking)])
    kinds = int(getattr(model.config, "type_vocab_size", 0) or 1)
    return [
        Row(generator.choice(allowed, length), generator.integers(0, kinds, length))
        for length in _LENGTHS
    ]


def _reference(model: PreTrainedModel, proxy: Proxy, row: Row) -> Array:
    """The uncut model's pooled output for one row alone."""
    part = proxy.parts[-1].module
    assert isinstance(part, EncoderPart)  # noqa: S101 (the families of this package build no other)
    arguments = _arguments(part, row)
    with torch.no_grad():
        hidden = encoder_of(model)(**arguments)[0]
        seen = torch.ones_like(arguments["input_ids"])
        vector: Array = to_array(part.pooling(hidden, seen, part.dense).float())[0]
    return vector


def _arguments(part: Any, row: Row) -> dict[str, torch.Tensor]:
    """The arguments of the uncut model for one row alone."""
    return tensors_of(row, types=part.takes_token_types)


def tensors_of(row: Row, *, types: bool) -> dict[str, torch.Tensor]:
    """``input_ids`` of one row, and its token types where they are asked for: ``[1, tokens]``."""
    ids = {"input_ids": to_tensor(row.ids[None])}
    return {**ids, "token_type_ids": to_tensor(row.types[None])} if types else ids
