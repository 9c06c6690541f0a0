"""Tiny vision-language models with random weights, and prompts for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qeff_proxy_vision import tiny
from torch import nn


class Changed(nn.Module):
    """A part whose outputs something is done to."""

    def __init__(self, module, change):
        super().__init__()
        self.module = module
        self.change = change

    def forward(self, **tensors):
        return {name: self.change(value) for name, value in self.module(**tensors).items()}


def change_part(proxy, name, change):
    """The proxy with something done to the outputs of a part."""
    parts = [
        replace(part, module=Changed(part.module, change)) if part.name == name else part
        for part in proxy.parts
    ]
    return replace(proxy, parts=tuple(parts))


def ignore_masks(proxy):
    """Queries see every key, but those of padding."""
    parts = [
        replace(part, masks=tuple(replace(mask, kind="bidirectional") for mask in part.masks))
        for part in proxy.parts
    ]
    return replace(proxy, parts=tuple(parts))


def shift_features(proxy):
    """Each row of image features takes the place of the next."""

    def shifted(value):
        return torch.roll(value.flatten(0, -2), 1, 0).reshape(value.shape)

    return change_part(proxy, "vision", shifted)


FAULTS = {
    "features shifted by one row": shift_features,
    "mask ignored": ignore_masks,
    "scale of the features off": lambda proxy: change_part(proxy, "vision", lambda x: x * 1.01),
    "scale of the embedding off": lambda proxy: change_part(proxy, "embedding", lambda x: x * 1.01),
    "scale of the logits off": lambda proxy: change_part(proxy, "lm_head", lambda x: x * 1.01),
}


@pytest.fixture(params=FAULTS)
def fault(request):
    """Takes a proxy and gives it with a fault in it: one fault after the other."""
    return FAULTS[request.param]


@pytest.fixture
def changed():
    """`change_part`."""
    return change_part


@pytest.fixture(scope="session")
def make_model():
    """Makes the tiny model of a family."""
    return tiny.make_model


@pytest.fixture
def prompt_for():
    """Makes a prompt for a family: `qeff_proxy_vision.tiny.make_prompt`."""
    return tiny.make_prompt
