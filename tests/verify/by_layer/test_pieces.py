"""Pieces of the layers, verified apart, give what one verification of all gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.errors import UsageError
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer import LayerVerification, verify_layers
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

REQUEST = Request(inputs={"input_ids": np.array([[5, 6, 7, 8, 9, 10, 11]])})
OPTIONS = VerifyOptions(max_new_tokens=3)
PIECES = 3


@pytest.fixture(scope="module", params=["llama", "bart"])
def model(request: Any, make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    depth = {"decoder_layers": 5} if request.param == "bart" else {"layers": 5}
    make_model(request.param, **depth).save_pretrained(folder)
    return folder


def verified(model: Path, piece: tuple[int, int] = (1, 1)) -> LayerVerification:
    request = REQUEST if "llama" in str(model) else None
    return verify_layers(str(model), request=request, options=replace(OPTIONS, piece=piece))


def test_pieces_have_every_layer_once_with_its_own_error(model: Path) -> None:
    whole = verified(model).results[0].layers
    pieces = [
        verified(model, (number, PIECES)).results[0].layers for number in range(1, PIECES + 1)
    ]
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    layers = [layer for piece in pieces for layer in piece]
    assert [layer.name for layer in layers] == [layer.name for layer in whole]
    assert [layer.local for layer in layers] == [layer.local for layer in whole]
    assert [layer.inherited for layer in pieces[0]] == [
        layer.inherited for layer in whole[: len(pieces[0])]
    ]
    for piece in pieces[1:]:  # fed what the layer before it gives in PyTorch
        assert piece[0].inherited.max_abs == pytest.approx(piece[0].local.max_abs, rel=0.5)


def test_a_piece_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="there is no piece 4 of 3"):
        verified(model, (4, 3))
    with pytest.raises(UsageError, match=r"the \d+ layers cannot be split into 99 pieces"):
        verified(model, (1, 99))
