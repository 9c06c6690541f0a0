"""The host's masks reach the model that asks for them, and no other thread's."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.families.model_masks import provide_masks, record_masks
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from transformers.models.llama import modeling_llama

TOKENS = torch.arange(8).reshape(2, 4)
#: Each query attends to its own key alone.
DIAGONAL = torch.where(torch.eye(4, dtype=torch.bool), 0.0, torch.finfo(torch.float32).min)
DIAGONAL = DIAGONAL.expand(2, 1, 4, 4)


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def run_with(model: Any, mask: torch.Tensor | None) -> torch.Tensor:
    with provide_masks(model, {"causal": mask}):
        return run(model)


def test_a_model_gets_the_hosts_mask_in_one_thread_alone(model: Any, make_model: Any) -> None:
    alike = make_model("llama", seed=3)
    expected, expected_alike = run(model), run(alike)
    with provide_masks(model, {"causal": DIAGONAL}), ThreadPoolExecutor(1) as pool:
        assert (run(model) - expected).abs().max() > 1e-3
        assert torch.equal(pool.submit(run, model).result(), expected)
        assert torch.equal(pool.submit(run, alike).result(), expected_alike)
        other = pool.submit(run_with, model, None).result()  # None: every key is attended to
        assert not torch.equal(other, expected)
    assert torch.equal(run(model), expected)


def test_a_mask_nobody_provides_is_an_error(model: Any) -> None:
    with provide_masks(model, {"sliding": DIAGONAL}), pytest.raises(LookupError, match="causal"):
        run(model)


def test_two_masks_of_one_decoder_have_two_names() -> None:
    """BART's decoder also makes the mask over an encoder's output, which a causal LM lacks."""
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        decoder_layers=5,
        decoder_ffn_dim=40,
        decoder_attention_heads=4,
        max_position_embeddings=40,
    )
    model = transformers.BartForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    hooks = Plugins.discover().hooks_for("bart", task="causal-lm")
    cut = cut_model(wrap_model(model), hooks, "split")  # verified
    masks = cut.proxy.part("body").masks
    assert {(mask.kind, mask.name) for mask in masks} == {
        ("causal", "attention_mask"),
        ("bidirectional", "bidirectional_attention_mask"),
    }


def test_masks_are_recorded_beside_a_thread_that_provides_them(model: Any) -> None:
    recorded: dict[Any, Any] = {}
    with provide_masks(model, {"causal": DIAGONAL}), ThreadPoolExecutor(1) as pool:

        def record() -> torch.Tensor:
            with record_masks(model, recorded):
                return run(model)

        logits = pool.submit(record).result()
    assert list(recorded) == ["causal"]
    assert torch.equal(logits, run(model))


def test_an_inner_context_hides_an_outer_one_until_it_is_left(model: Any) -> None:
    with provide_masks(model, {"causal": DIAGONAL}):
        expected = run(model)
        assert not torch.equal(run_with(model, None), expected)
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_threads_may_finish_in_any_order(model: Any, order: tuple[int, ...]) -> None:
    before = modeling_llama.create_causal_mask
    expected = run(model)
    leave = [threading.Event() for _ in range(3)]
    masks = [DIAGONAL, None, DIAGONAL * 0.5]
    alone = [run_with(model, mask) for mask in masks]

    def work(number: int, entered: threading.Event) -> torch.Tensor:
        with provide_masks(model, {"causal": masks[number]}):
            entered.set()
            assert leave[number].wait(10)
            return run(model)

    with ThreadPoolExecutor(3) as pool:
        jobs = []
        for number in range(3):
            entered = threading.Event()
            jobs.append(pool.submit(work, number, entered))
            assert entered.wait(10)
        for number in order:
            assert torch.equal(run(model), expected)
            leave[number].set()
            assert torch.equal(jobs[number].result(), alone[number])
    assert modeling_llama.create_causal_mask is before
