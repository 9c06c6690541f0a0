"""The flows of models with scores for labels, or for tokens: one pass per batch of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from qeff_proxy.arrays import Array, to_array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.flows.flow import Job
from qeff_proxy.parts import Proxy
from qeff_proxy.request import Request
from qeff_proxy.run.example_request import text_example
from qeff_proxy.session.part_like import PartLike
from transformers import PreTrainedModel

from qeff_proxy_embedding.flow import EncoderFlow, Row, rows_of, tensors_of
from qeff_proxy_embedding.probe import Probe, probe_model

__all__ = ["ClassificationFlow", "MaskedLMFlow"]


class ClassificationFlow(EncoderFlow):
    """The ``classification`` flow: a single pass per batch, to a score for each label."""

    def probe(self, model: PreTrainedModel) -> Probe:
        """What the base model says of its masks."""
        return probe_model(model.base_model)

    def reference(self, model: PreTrainedModel, proxy: Proxy, row: Row) -> Array:
        """The uncut model's logits for one row alone."""
        with torch.no_grad():
            logits = model(**tensors_of(row, types=_takes_types(proxy.parts))).logits
        return cast("Array", to_array(logits.float())[0])

    def run(self, job: Job) -> dict[str, Any]:
        """Classify.

        Returns:
            ``logits``, ``[texts, labels]`` float32 or a list of ``[tokens, labels]``; the names of
            the ``labels``, and the config's ``problem_type``.

        Raises:
            UsageError: A text is empty or too long, or the export is a stub.
        """
        pad = job.export.settings["skipped_at_the_end"]
        if pad is not None:
            job = replace(job, tensors=_without_end(job.tensors, pad))
        (logits,) = super().run(job).values()
        names = job.config.id2label
        labels = [str(names.get(index, f"LABEL_{index}")) for index in range(logits[0].shape[-1])]
        return {"logits": logits, "labels": labels, "problem_type": job.config.problem_type}

    def run_model(self, model: PreTrainedModel, job: Job) -> object:
        """Run the uncut model on each text alone, as padding may change what it gives."""
        types = _takes_types(job.export.parts)
        rows = rows_of(job.tensors)
        return [model(**tensors_of(row, types=types)).logits for row in rows]


def _takes_types(parts: Iterable[PartLike]) -> bool:
    return any(spec.name == "token_type_ids" for part in parts for spec in part.inputs)


def _without_end(tensors: Mapping[str, torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    """The inputs with the padding tokens at the end of each row hidden."""
    ids = tensors.get("input_ids")
    if ids is None:
        return dict(tensors)
    mask = tensors.get("attention_mask", torch.ones_like(ids)).to(torch.int64)
    counted = ((ids != pad) & (mask != 0)).to(torch.int64)
    last = (torch.arange(ids.shape[1]) * counted).argmax(-1, keepdim=True)
    return {**tensors, "attention_mask": mask * (torch.arange(ids.shape[1]) <= last)}


class MaskedLMFlow(ClassificationFlow):
    """The ``masked-lm`` flow: a single pass per batch, to logits of each token."""

    def run(self, job: Job) -> dict[str, Any]:
        """Guess tokens.

        Returns:
            Lists with an array for each text: its ``input_ids [tokens]`` int64, without padding,
            and ``logits [tokens, vocabulary]`` float32.

        Raises:
            UsageError: A text is empty or too long, or the export is a stub.
        """
        (logits,) = EncoderFlow.run(self, job).values()
        return {"input_ids": [row.ids for row in rows_of(job.tensors)], "logits": logits}

    def example_request(
        self,
        export: Export,
        processor: Any,
        proxy: Callable[[], Proxy],  # noqa: ARG002
    ) -> Request:
        """A line of text with a masked token, or random token ids."""
        mask = getattr(processor, "mask_token", None)
        if mask is None:
            return text_example(export, processor)
        return Request(prompts=(f"One morning, Anna went to the {mask} and came back.",))
