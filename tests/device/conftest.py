"""Dumps of four kinds of model, and a device that echoes the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.dump import Dump, read_dump

sys.path.append(str(Path(__file__).parent))  # for what the tests here share

from device_models import MODELS, write_dump


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dump]:
    folder = tmp_path_factory.mktemp("dumps")
    return {model: read_dump(write_dump(model, folder / model)) for model in MODELS}


@pytest.fixture(scope="session")
def echo() -> Callable[[Dump], Callable[..., dict[str, np.ndarray]]]:
    """Makes the function of a device that gives the reference's outputs, padding filled with 7."""

    def of(dump: Dump) -> Callable[..., dict[str, np.ndarray]]:
        names = {
            (t.index.name.part, t.index.graph_name): t.index.name for t in dump.tensors.values()
        }

        def compute(run: dict[str, Any], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = {}
            for tensor in run["outputs"]:
                array = dump.array(run["phase"], run["index"], names[run["part"], tensor["name"]])
                padded = np.full(tensor["shape"], 7, array.dtype)
                padded[tuple(slice(*valid) for valid in tensor["valid"])] = array
                outputs[tensor["name"]] = padded
            return outputs

        return compute

    return of
