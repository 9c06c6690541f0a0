"""Refuse a layer of a number that the model cannot have, before it is exported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UsageError
from qeff_proxy.load.load_model import LoadedModel, load_config

#: How configs call a number of layers, or of several lists of them.
_DEPTH = re.compile(r"^(num|n)_.*(layers?|blocks?)$|^(en|de)coder_layers$|depths?$")


def check_layer_number(layer: str, model: LoadedModel) -> None:
    """Compare a layer's number, if its name ends with one, with all the layers of the config.

    That is a bound: the export tells which names there are.

    Raises:
        UsageError: There are not so many.
    """
    number = layer.rpartition(" ")[2]
    config = model.model.config if model.folder is None else load_config(model.folder)
    most = sum(_depths(config.to_dict()))
    if most and number.isdecimal() and int(number) >= most:
        raise UsageError(
            f"there is no layer {layer!r}",
            f"The config of {model.source} says {counted(most, 'layer')}, and they count from 0.",
        )


def _depths(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _depths(value)
        elif _DEPTH.search(str(name)):
            each = value if isinstance(value, list | tuple) else [value]
            yield from (count for count in each if type(count) is int and count > 0)
