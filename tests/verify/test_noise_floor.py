"""The noise floor: what rounding alone does to a model, and the limits that follow from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.backends.torch.backend import TorchBackend
from qeff_proxy.cli.verify import _rendered
from qeff_proxy.compare import NoiseFloor, Tolerance, Tolerances
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.rounding import BITS, RoundedModule, round_to
from qeff_proxy.verify.verify_model import verify_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.one_home

REQUEST = Request(prompts=("Anna went to the market",))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def decibels(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    noise = (reference - candidate).square().sum() / reference.square().sum()
    return -10 * math.log10(noise)


@pytest.mark.parametrize("precision", BITS)
def test_rounding_is_that_of_the_dtype(precision: str) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, 1.0, 1e4, -3.14])])
    expected = values.to(getattr(torch, precision)).float()
    assert torch.equal(round_to(values, BITS[precision]), expected)


def test_large_tensors_are_rounded_in_pieces() -> None:
    values = torch.rand(700, 1001).t() + 0.1
    assert torch.equal(round_to(values, 11), values.half().float())
    assert torch.equal(round_to(values[:, None], 11)[:, 0], values.half().float())


def test_what_is_near_the_end_of_float32_is_kept() -> None:
    masked = torch.tensor([torch.finfo(torch.float32).min, -math.inf, 70_001.0])
    rounded = round_to(masked, 11)
    assert torch.equal(rounded[:2], masked[:2])
    assert rounded[2] == 70_016.0  # float16 itself overflows there


class Embedded(nn.Module):
    """A model's last hidden states, from embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.model(inputs_embeds=embeds).last_hidden_state}


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_noise_is_that_of_the_model_in_that_dtype(precision: str, family: str) -> None:
    """transformers' own model, cast to the dtype, has the same errors within 3 dB."""
    if family == "llama":
        config = LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=131)
        model = random_weights(LlamaForCausalLM(config), 0).model
    else:
        model = random_weights(BertModel(BertConfig(**SIZES, num_hidden_layers=6)), 0)
    model.eval()
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = Embedded(model)(embeds)["hidden"]
        rounded = RoundedModule(Embedded(model), BITS[precision])(embeds=embeds)["hidden"]
        again = Embedded(model)(embeds)["hidden"]
        dtype = getattr(torch, precision)
        cast = Embedded(model.to(dtype))(embeds.to(dtype))["hidden"].float()
    assert torch.equal(exact, again)  # the model itself is unchanged
    assert abs(decibels(exact, rounded) - decibels(exact, cast)) < 3


def test_positions_are_exact() -> None:
    """Rotary angles of position 5,000 in 11 bits would be off by a whole radian."""
    config = LlamaConfig(**SIZES, num_hidden_layers=1, vocab_size=131, max_position_embeddings=9999)
    model = random_weights(LlamaForCausalLM(config), 0).model.eval()
    seen: list[torch.Tensor] = []

    class Tables(nn.Module):
        def forward(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
            positions = torch.arange(5000, 5009)[None]
            seen.extend(model.rotary_emb(embeds, positions))
            return {"x": embeds}

    embeds = torch.randn(1, 9, 64)
    exact = model.rotary_emb(embeds, torch.arange(5000, 5009)[None])
    RoundedModule(Tables(), 11)(embeds=embeds)
    assert all(torch.equal(one, other) for one, other in zip(seen, exact, strict=True))


def test_a_floor_widens_limits_but_not_without_end() -> None:
    fixed = Tolerance(peak=0.03, sqnr=40.0)
    assert NoiseFloor(70.0, 0.0005).widen(fixed) == fixed
    assert NoiseFloor(57.03, 0.0041).widen(fixed) == Tolerance(peak=0.041, sqnr=37.0)
    assert NoiseFloor(3.0, 0.9).widen(fixed) == Tolerance(peak=0.3, sqnr=20.0)
    assert NoiseFloor(math.inf, 0.0).widen(fixed) == fixed
    assert NoiseFloor(-math.inf, math.inf).widen(fixed) == fixed


@pytest.mark.parametrize("count", [3, 10, 64, 1000])
def test_two_errors_of_one_size_are_apart_by_chance_and_not_refused(count: int) -> None:
    """Floor and error are drawn from one distribution, the error 10 dB larger: 1 in 1,000 fails."""
    draw = np.random.default_rng(0)
    power = np.mean(draw.standard_normal((2, 20_000, count)) ** 2, axis=2)
    floors, errors = 80 - 10 * np.log10(power[0]), 70 - 10 * np.log10(power[1])
    fixed = Tolerance(peak=0.001, sqnr=60.0)
    limits = np.array([NoiseFloor(floor, 0.0, count).widen(fixed).sqnr for floor in floors])
    assert np.mean(errors < limits) < 1e-3
    # A margin of 20 dB alone refuses healthy ones where there are three elements.
    assert (np.mean(errors < floors - 20) > 1e-3) == (count == 3)


def test_a_users_limit_wins() -> None:
    floors = {("prefill", "x"): NoiseFloor(50.0, 0.01)}
    tolerances = Tolerances((("x", Tolerance(sqnr=45.0)),), "float16", floors)
    assert tolerances.of("x", "float32", "float32", "prefill") == Tolerance(sqnr=45.0)
    tolerances = Tolerances((), "float16", floors)
    assert tolerances.of("x", "float32", "float32", "prefill").sqnr == 30.0
    assert tolerances.of("x", "float32", "float32", "decode").sqnr == 40.0


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], str]:
    """Registers PyTorch with noise of so many dB in its logits, said to compute in a precision."""

    def register(precision: str, noise: float) -> str:
        class Noisy(TorchBackend):
            def precision(self, options: Any) -> str:
                return precision

            def open(self, *args: Any) -> Any:
                session = super().open(*args)
                run, generator = session.run, np.random.default_rng(0)

                def noisy(feeds: Any) -> Any:
                    outputs = run(feeds)
                    if (value := outputs.get("logits")) is not None:
                        share = np.sqrt(np.mean(value**2)) * 10 ** (-noise / 20)
                        added = share * generator.standard_normal(value.shape)
                        outputs["logits"] = value + added.astype(value.dtype)
                    return outputs

                session.run = noisy
                return session

        module = ModuleType("noisy_backend")
        module.Noisy = Noisy  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(BUILTIN_BACKENDS, "noisy", "noisy_backend:Noisy")
        return "noisy"

    return register


def test_a_backend_is_judged_by_the_floor(
    demo_export: Any, backend: Callable[[str, float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits have noise of 39 dB, which the fixed limit of 40 would refuse."""
    monkeypatch.setattr("qeff_proxy.compare.tolerances.FLOOR_MARGIN", 30.0)
    name = backend("float16", 39.0)
    options = VerifyOptions(max_new_tokens=2)
    verification = verify_model(demo_export, [name], REQUEST, options)
    (result,) = verification.results
    assert result.passed, [t.why for t in result.comparison.tensors if t.why]
    assert 50 < result.floor < 70
    assert result.limit == pytest.approx(min(40, result.floor - 30), abs=0.1)
    assert result.sqnr < 40
    shown = result.to_json()
    assert (shown["floor_sqnr"], shown["limit_sqnr"]) == (result.floor, result.limit)
    assert [c.header for c in _rendered(verification)[0].columns][-2:] == ["floor dB", "limit dB"]
    (tensor, *_) = result.comparison.to_json()["tensors"][-1:]
    assert tensor["floor"]["sqnr"] > 50
    name = backend("float16", 20.0)
    (result,) = verify_model(demo_export, [name], REQUEST, options).results
    assert not result.passed
    assert "; PyTorch in that precision: " in result.comparison.tensors[-1].why


def test_a_precision_that_cannot_be_simulated_has_fixed_limits(
    demo_export: Any, backend: Callable[[str, float], str]
) -> None:
    name = backend("a16w8", 60.0)
    (result,) = verify_model(demo_export, [name], REQUEST, VerifyOptions(max_new_tokens=1)).results
    assert result.passed
    (note,) = result.comparison.notes
    assert note == (
        "the limits are fixed, not relative to a noise floor: PyTorch cannot compute in a16w8"
    )
    assert result.floor is None
    assert result.limit == 25.0
