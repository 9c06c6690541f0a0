"""Find the layers of a module, tap their outputs, copy a module with fewer of them."""

from __future__ import annotations

from qeff_proxy.layers.layer_lists import LayerList, find_layer_list
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.layers.shorten import shorten
from qeff_proxy.layers.taps import tap_proxy

__all__ = ["LayerList", "find_layer_list", "replace_modules", "shorten", "tap_proxy"]
