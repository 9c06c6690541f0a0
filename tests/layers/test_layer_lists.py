"""Which list of modules is *the* layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from qeff_proxy.layers.layer_lists import find_layer_list
from torch import nn


class Layer(nn.Module):
    def __init__(self, width: int, index: int | None, experts: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(experts))
        if index is not None:
            self.layer_idx = index


class Model(nn.Module):
    """A language model with a tower; the config says how deep the language model is."""

    def __init__(self, tower: int, text: int, *, indexed: bool = True, **settings: Any) -> None:
        super().__init__()
        width = int(settings.pop("tower_width", 8))
        self.tower = nn.ModuleList(Layer(width, None) for _ in range(tower))
        self.layers = nn.ModuleList(
            Layer(8, index if indexed else None, **settings) for index in range(text)
        )
        config = SimpleNamespace(num_hidden_layers=text)
        config.get_text_config = lambda decoder: config
        self.config = config


@pytest.mark.parametrize("indexed", [True, False])
def test_a_deeper_tower_is_not_taken_for_the_layers(indexed: bool) -> None:
    layers = find_layer_list(Model(8, 5, indexed=indexed))
    assert layers is not None
    assert layers.path == "layers"


@pytest.mark.parametrize("tower", [3, 5, 9])
def test_layers_that_keep_their_index_may_be_much_smaller_than_a_tower(tower: int) -> None:
    layers = find_layer_list(Model(tower, 5, tower_width=64))
    assert layers is not None
    assert layers.path == "layers"


@pytest.mark.parametrize("name", ["layer_idx", "layer_id", "layer_index"])
def test_an_index_makes_no_kind_of_its_own(name: str) -> None:
    model = Model(0, 5, indexed=False)
    for index, layer in enumerate(model.layers):
        setattr(layer, name, index)
    layers = find_layer_list(model)
    assert layers is not None
    assert layers.kinds == (0,) * 5


def test_a_short_list_within_a_layer_is_not_the_layers() -> None:
    layers = find_layer_list(Model(2, 6, experts=4), depth=4)
    assert layers is not None
    assert layers.path == "layers"


def test_without_a_depth_the_largest_list_is_taken() -> None:
    layers = find_layer_list(Model(8, 5), depth=0)
    assert layers is not None
    assert layers.path == "tower"


def test_of_an_encoder_and_a_decoder_the_larger_is_taken() -> None:
    model = Model(8, 5)
    model.config.is_encoder_decoder = True
    layers = find_layer_list(model)
    assert layers is not None
    assert layers.path == "tower"
