"""Greedy search has a loop of its own, which must give what transformers' gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.families.model_cache import LIBRARY_CACHE_NAME
from qeff_proxy.flows.causal_engine import CausalEngine
from qeff_proxy.flows.generation.generate import ProxyForCausalLM
from qeff_proxy.flows.generation.step_cache import StepCache
from qeff_proxy.load.load_model import load_config
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


class Transformers(ProxyForCausalLM):
    """The same model with transformers' loop."""

    _sample = GenerationMixin._sample


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.heard.append((tokens.dtype, tokens.tolist()))

    def end(self) -> None:
        self.heard.append("end")


@pytest.fixture(scope="module")
def models(demo_export: Path) -> Iterator[list[Any]]:
    export = read_export(demo_export)
    config = load_config(export.processor_folder)
    with open_sessions(compile_export(export)) as sessions:
        engine = CausalEngine(export.parts, sessions)
        yield [one(config, engine) for one in (ProxyForCausalLM, Transformers)]


def searched(model: Any, **settings: Any) -> Any:
    return model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        do_sample=False,
        pad_token_id=3,
        **{LIBRARY_CACHE_NAME: StepCache(), "max_new_tokens": 20, "eos_token_id": None, **settings},
    ).numpy()


def first_tokens(models: list[Any]) -> list[list[int]]:
    return searched(models[1])[:, IDS.shape[1] :].tolist()


def test_rows_that_have_ended_are_padded_until_all_have(models: list[Any]) -> None:
    one, other = first_tokens(models)
    last = next(token for token in one[2:] if token not in other[:12])
    found = [searched(model, eos_token_id=[last, other[12]]) for model in models]
    np.testing.assert_array_equal(*found)
    assert (found[0] == 3).any()
    assert found[0].shape[1] < IDS.shape[1] + 20


def test_processors_see_all_ids_and_may_write_into_the_scores(models: list[Any]) -> None:
    favourite = first_tokens(models)[0][0]
    seen: list[list[Any]] = [[], []]

    def forbid(ids: torch.Tensor, scores: torch.Tensor, into: list[Any]) -> torch.Tensor:
        into.append(ids.tolist())
        scores[:, favourite] = -float("inf")
        return scores

    found = [
        searched(
            model,
            logits_processor=LogitsProcessorList([lambda i, s, into=into: forbid(i, s, into)]),
        )
        for model, into in zip(models, seen, strict=True)
    ]
    np.testing.assert_array_equal(*found)
    assert favourite not in found[0][:, IDS.shape[1] :]
    assert seen[0] == seen[1]


def test_criteria_of_a_users_own_are_called(models: list[Any]) -> None:
    def long_enough(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 9)

    criteria = StoppingCriteriaList([long_enough])
    found = [searched(model, stopping_criteria=criteria) for model in models]
    np.testing.assert_array_equal(*found)
    assert found[0].shape[1] == 9


def test_a_streamer_hears_the_same(models: list[Any]) -> None:
    heard = []
    for model in models:
        listener = Listener()
        model.generate(
            input_ids=IDS[1:],
            do_sample=False,
            max_new_tokens=6,
            streamer=listener,
            **{LIBRARY_CACHE_NAME: StepCache()},
        )
        heard.append(listener.heard)
    assert heard[0] == heard[1]
    assert len(heard[0]) == 8  # the prompt, six tokens, the end


def test_transformers_loop_is_not_run(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers finds the method by its name; this says when it no longer does."""
    monkeypatch.setattr(GenerationMixin, "_sample", None)
    assert searched(models[0], max_new_tokens=3).shape[1] == IDS.shape[1] + 3
