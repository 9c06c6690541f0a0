"""Tiny vision-language models with random weights, and prompts for them."""

from __future__ import annotations

import pytest
from qeff_proxy_vision import tiny


@pytest.fixture(scope="session")
def make_model():
    """Makes the tiny model of a family."""
    return tiny.make_model


@pytest.fixture
def prompt_for():
    """Makes a prompt for a family: `qeff_proxy_vision.tiny.make_prompt`."""
    return tiny.make_prompt
