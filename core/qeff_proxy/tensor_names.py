"""Names of tensors and layers that every stage uses."""

from __future__ import annotations

import re

#: Names of the layers' inputs and outputs (caches, taps): what it is, the layer, which tensor.
LAYER_NAME = re.compile(
    r"(past_key_values|present|hidden_states|cross_key_values)\.(\d+)((?:\.\w+)?)"
)
PAST = "past_key_values."
PRESENT = "present."
#: The inputs so far, of a decoder that runs over all positions at each step, as if of layer 0.
PAST_INPUTS = "past_inputs"
#: The outputs of layers (`qeff_proxy.layers.taps`).
TAP = "hidden_states."
#: Ends of the names of an adapter's tensors, its A and B, behind the path of the module.
ADAPTER = (".lora_A.weight", ".lora_B.weight")
_STATE = re.compile(r"(past_key_values|present)\.\d+\.\w+_state(_\d+)?")


def is_state(name: str) -> bool:
    """Whether a tensor of the cache keeps its size: the state of a convolution or a recurrence."""
    return _STATE.fullmatch(name) is not None
