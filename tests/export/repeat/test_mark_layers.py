"""One layer of each kind is traced wherever layers are called; what cannot be repeated is not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from qeff_proxy.export.repeat.mark_layers import NotRepeatable
from qeff_proxy.export.trace.trace_part import TracedPart, trace_part, trace_sample
from qeff_proxy.layers.taps import TappedPart
from qeff_proxy.parts import Part, TensorSpec
from torch import nn

WIDTH = 8


class Block(nn.Module):
    """A layer: what it does after its projection is told to it."""

    def __init__(self, then: Callable[..., Any] = lambda hidden, *_: hidden) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.then = then

    def forward(self, hidden: torch.Tensor, *more: Any) -> Any:
        return self.then(torch.tanh(self.mlp(hidden)) + hidden, *more)


class Stack(nn.Module):
    """Layers one after the other; how they are called is told to it."""

    def __init__(self, layers: list[nn.Module], run: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.run(self.layers, hidden)}


def in_turn(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def part_of(module: nn.Module) -> Part:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    axes = ("batch", "sequence", WIDTH)
    given, made = TensorSpec("hidden", "float32", axes), TensorSpec("out", "float32", axes)
    return Part("body", module.eval(), (given,), (made,), "body")


def traced(part: Part, *, repeat: bool = True) -> TracedPart:
    tensors = [*part.module.named_buffers(), *part.module.named_parameters()]
    return trace_part(part, {id(tensor): name for name, tensor in tensors}, repeat=repeat)


def run(found: TracedPart, hidden: np.ndarray, folder: Path) -> list[np.ndarray]:
    for name, value in found.model.graph.initializers.items():
        if name in found.weights:
            value.const_value = ir.tensor(found.weights[name].detach().numpy(), name=name)
    ir.save(found.model, folder / "graph.onnx")
    session = onnxruntime.InferenceSession(
        folder / "graph.onnx", providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"hidden": hidden}))


def check(part: Part, found: TracedPart, folder: Path) -> None:
    """The graph gives what the module gives, at another length than it was traced at."""
    hidden = np.random.default_rng(0).standard_normal((3, 4, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = part.module(torch.from_numpy(hidden))
    actual = run(found, hidden, folder)
    for name, values in zip(expected, actual, strict=True):
        np.testing.assert_allclose(values, expected[name].numpy(), 1e-5, 2e-6, err_msg=name)


def operators(found: TracedPart) -> Counter[str]:
    return Counter(node.op_type for node in found.model.graph)


def test_clones_are_what_a_plain_trace_gives(tmp_path: Path) -> None:
    part = part_of(Stack([Block() for _ in range(5)], in_turn))
    found = traced(part)
    assert (found.layers, found.reason) == (1, None)
    plain = traced(part, repeat=False)
    assert operators(found) == operators(plain)
    assert set(found.weights) == set(plain.weights)
    assert len(found.weights) == 10
    check(part, found, tmp_path)
    assert "forward" not in vars(part.module.layers[0])  # nothing is left in the module


def test_results_of_any_layer_may_be_used(tmp_path: Path) -> None:
    def pick(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        states = [hidden]
        for layer in layers:
            states.append(layer(states[-1]))
        return states[-2] + 2 * states[0] + 3 * states[3]

    part = part_of(Stack([Block() for _ in range(6)], pick))
    found = traced(part)
    assert found.layers == 1
    # The last layer reaches no output.
    assert set(found.weights) == {
        f"layers.{n}.mlp.{w}" for n in range(5) for w in ("weight", "bias")
    }
    check(part, found, tmp_path)


def test_layers_called_with_other_shapes_are_traced(tmp_path: Path) -> None:
    def shrink(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        short = hidden[:, :1]
        for layer in layers[:3]:
            hidden = layer(hidden)
        for layer in layers[3:]:
            short = layer(short)
        return hidden + short

    part = part_of(Stack([Block() for _ in range(6)], shrink))
    found = traced(part)
    assert found.layers == 2
    check(part, found, tmp_path)


def test_what_all_layers_are_given_is_made_once(tmp_path: Path) -> None:
    def with_mask(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        mask = (hidden.sum(-1, keepdim=True) > 0).to(hidden.dtype)
        for layer in layers:
            hidden = layer(hidden, mask)
        return hidden

    def masked(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return hidden * (1 - mask)

    part = part_of(Stack([Block(masked) for _ in range(4)], with_mask))
    for block in part.module.layers:
        block.then = masked
    found = traced(part)
    assert found.layers == 1
    assert operators(found) == operators(traced(part, repeat=False))
    assert operators(found)["Sub"] == 1
    check(part, found, tmp_path)


def test_a_layer_that_runs_twice(tmp_path: Path) -> None:
    def twice(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        return in_turn(layers, in_turn(layers, hidden))

    part = part_of(Stack([Block() for _ in range(3)], twice))
    found = traced(part)
    assert found.layers == 1
    assert operators(found)["Tanh"] == 6
    check(part, found, tmp_path)


def test_taps_within_layers(tmp_path: Path) -> None:
    part = part_of(Stack([Block() for _ in range(4)], in_turn))
    taps = ("layers", "mlp")
    tapped = TappedPart(part.module, tuple(part.module.layers), taps)
    tapped.forward = lambda hidden: {  # type: ignore[method-assign]
        **TappedPart.forward(tapped, hidden=hidden)
    }
    axes = ("batch", "sequence", WIDTH)
    names = [f"hidden_states.{n}{end}" for n in range(4) for end in (".mlp", "")]
    outputs = (*part.outputs, *(TensorSpec(name, "float32", axes) for name in names))
    part = replace(part, module=tapped, outputs=outputs)
    found = traced(part)
    assert found.layers == 1
    assert [value.name for value in found.model.graph.outputs] == ["out", *names]
    check(part, found, tmp_path)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda hidden, given: given.add_(hidden), "layers.0 writes into its inputs"),
        (lambda hidden, given: given + SEEN["other"] + hidden, "which is not its input"),
        (
            lambda hidden, _given: SEEN.setdefault("kept", []).append(hidden) or hidden,
            "is used outside of it",
        ),
    ],
    ids=["writes", "reads", "hands out"],
)
def test_what_arguments_do_not_show_is_not_repeated(
    then: Callable[..., Any], reason: str, tmp_path: Path
) -> None:
    def run_all(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        SEEN.clear()
        SEEN["other"] = hidden.cos()
        for layer in layers:
            hidden = layer(hidden, hidden.sin())
        return hidden + sum(SEEN.get("kept", [hidden]))

    part = part_of(Stack([Block(then) for _ in range(4)], run_all))
    for block in part.module.layers:
        block.then = then
    found = traced(part)
    assert found.layers == 0
    assert reason in (found.reason or "")
    check(part, found, tmp_path)


#: What layers of these tests see beside their arguments.
SEEN: dict[str, Any] = {}


def test_a_weight_that_is_tied_in_one_layer_alone(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(hidden)))

    stack = Stack([Two() for _ in range(4)], in_turn)
    stack.layers[0].two.weight = stack.layers[0].one.weight
    part = part_of(stack)
    found = traced(part)
    assert found.reason is not None
    check(part, found, tmp_path)


def test_a_layer_that_changes_a_collection_it_is_given(tmp_path: Path) -> None:
    def change(hidden: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = hidden + kept["last"]
        kept["last"] = hidden
        return hidden

    def run_all(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        kept = {"last": hidden.sin()}
        for layer in layers:
            hidden = layer(hidden, kept)
        return hidden + kept["last"]

    part = part_of(Stack([Block(change) for _ in range(4)], run_all))
    found = traced(part)
    assert "changes the collections" in (found.reason or "")
    check(part, found, tmp_path)


def sampled(run: Callable[..., torch.Tensor]) -> tuple[Part, Part, dict[int, str]]:
    """A part of six layers of which two are there, that of these two, and the weights' names."""
    part = part_of(Stack([Block() for _ in range(6)], run))
    there = list(part.module.layers)[:2]
    names = {id(tensor): name for name, tensor in part.module.named_parameters()}
    absent = [copy.deepcopy(layer).to("meta") for layer in list(part.module.layers)[2:]]
    whole = Stack([*there, *absent], run).eval()
    names |= {id(tensor): name for name, tensor in whole.named_parameters()}
    return replace(part, module=whole), replace(part, module=Stack(there, run).eval()), names


def test_layers_that_are_not_there_are_put_in(tmp_path: Path) -> None:
    def with_mask(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            hidden = layer(hidden * 2)
        return hidden.cos()

    whole, part, names = sampled(with_mask)
    with pytest.raises(NotRepeatable, match="has an input that no other layer has"):
        trace_sample(whole, part, names)  # something is done between layers
    whole, part, names = sampled(lambda layers, hidden: in_turn(layers, hidden).cos())
    found, shorter = trace_sample(whole, part, names)
    assert (found.layers, shorter.layers) == (1, 1)
    assert operators(found)["Tanh"] == 6
    assert set(found.weights) == {
        f"layers.{number}.mlp.{weight}" for number in range(6) for weight in ("weight", "bias")
    }
    check(part, shorter, tmp_path)
    full = part_of(Stack([Block() for _ in range(6)], whole.module.run))
    given = dict(full.module.named_parameters())
    check(full, replace(found, weights={name: given[name] for name in found.weights}), tmp_path)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda layers, hidden: tapped_before_the_last(layers, hidden), "used beside the layers"),
        (
            lambda layers, hidden: each_with_its_own(layers, hidden),
            "has an input that no other layer has",
        ),
        (lambda layers, hidden: in_turn(layers[::-1], hidden), "cannot be run without"),
    ],
    ids=["results before the last", "an argument of its own", "another order"],
)
def test_layers_that_cannot_be_put_in(run: Callable[..., torch.Tensor], reason: str) -> None:
    whole, part, names = sampled(run)
    with pytest.raises(NotRepeatable, match=reason):
        trace_sample(whole, part, names)


def tapped_before_the_last(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
    states = [hidden]
    for layer in layers:
        states.append(layer(states[-1]))
    return states[-1] + states[-2]


def each_with_its_own(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
    for number, layer in enumerate(layers):
        hidden = layer(hidden, hidden.new_full((1,), float(number)))
    return hidden
