"""``verify`` on HTP for what takes sound and images: every layer of every part, near PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from qeff_proxy.request import Request
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from qeff_proxy_audio.sound import EXAMPLE, load_sound

pytestmark = pytest.mark.one_home


@pytest.mark.parametrize(
    ("name", "parts"),
    [("whisper", {"encoder", "body"}), ("wav2vec2", {"body"}), ("llava", {"vision", "body"})],
)
def test_verify_passes_layer_by_layer(
    name: str, parts: set[str], make_export: Callable[..., Any]
) -> None:
    # A tenth of a second is enough: this recognizer has a frame each 20 samples.
    speech = load_sound(EXAMPLE, 16_000)[None, 8_000:9_600]
    request = Request(inputs={"input_values": speech}) if name == "wav2vec2" else None
    options = VerifyOptions(max_new_tokens=2)
    found = verify_model(make_export(name), ["qnn"], request, options)
    (result,) = found.results
    assert result.comparison is not None, result.error
    layers = [one for one in result.comparison.tensors if "hidden_states." in str(one.name)]
    assert {one.name.part for one in layers} == parts
    assert min(one.worst.sqnr for one in layers if one.worst is not None) > 39
    assert result.passed, result.divergence
