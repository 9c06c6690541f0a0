"""GPT-2 at its real size, 124 million random weights, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.load.safetensors_header import read_header
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 50257
TOKENS = 64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif ".h." in name:  # larger than at initialization, so that every layer matters
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def proxy(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    proxy = QEFFAutoModelForCausalLM(model, proxy="split")
    proxy.export(tmp_path_factory.mktemp("full") / "gpt2")
    return proxy


def eager_tokens(model: Any, ids: Any, mask: Any) -> Any:
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False
        )
    return out[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("padding", [(0,), (0, 5)])
def test_greedy_tokens_equal_those_of_transformers(
    padding: tuple[int, ...], model: Any, proxy: Any
) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCABULARY, (len(padding), 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    result = proxy.generate(
        inputs={"input_ids": ids, "attention_mask": mask}, generation_len=TOKENS, do_sample=False
    )
    expected = eager_tokens(model, ids, mask)
    assert np.array_equal(result.generated_ids, expected)
    assert len(np.unique(expected)) > 8  # not one token over and over


def test_nothing_of_the_vocabularys_size_is_in_the_body(proxy: Any) -> None:
    folder: Path = proxy.export(read_only_folder(proxy))
    graph = onnx.load(folder / "body.onnx", load_external_data=False).graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer]
    shapes += [
        tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    ]
    assert shapes
    assert not any(VOCABULARY in shape for shape in shapes)
    stored = read_header(folder / "body.safetensors")
    assert len(stored) == 12 * 12 + 3  # twelve tensors a layer, the last norm and the positions
    assert not any(VOCABULARY in place.shape for place in stored.values())
    vocabulary = read_header(folder / "vocabulary.safetensors")
    assert [place.shape for place in vocabulary.values()] == [(VOCABULARY, 768)]


def read_only_folder(proxy: Any) -> Path:
    """The folder the fixture exported to: exporting there again is a lookup."""
    folder: Path = read_export(proxy._export.folder).folder
    return folder
