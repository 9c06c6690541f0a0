"""BGE at its real size, 110 million random weights, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModel
from qeff_proxy.compare import compare_dumps
from qeff_proxy.dump import read_dump
from transformers import BertConfig, BertModel

LENGTHS = (7, 32, 100, 301)


@pytest.fixture(scope="module")
def model():
    config = BertConfig()  # its defaults are bge-base's
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 12, 30522)
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def hidden_of_first(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, 0].numpy()


def test_every_length_gives_the_vector_of_pytorch(model, tmp_path):
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, model.config.vocab_size, length) for length in LENGTHS]
    ids = np.zeros((len(rows), max(LENGTHS)), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    proxy = QEFFAutoModel(model, proxy="split", options={"pooling": "cls", "normalize": False})
    proxy.export(tmp_path / "export")
    proxy.compile(batch_size=2, seq_len=[32, 128, 512])
    inputs = {"input_ids": ids, "attention_mask": mask}
    result = proxy.generate(inputs, io_dir=tmp_path / "io")
    expected = np.stack([hidden_of_first(model, row) for row in rows])
    assert np.abs(result.embeddings - expected).max() < 1e-4
    assert np.abs(expected).max() > 1, "else 1e-4 would be a lot"

    dump = read_dump(result.io_folder)
    shapes = [
        dump.array("prefill", one.index, "embedding.in.input_ids").shape for one in dump.steps
    ]
    assert shapes == [(2, 32), (2, 512)]
    assert compare_dumps(result.io_folder, result.io_folder).passed
    with torch.no_grad():
        model.encoder.layer[11].output.LayerNorm.bias[3] += 1e-3
    assert np.abs(hidden_of_first(model, rows[0]) - expected[0]).max() > 5e-4, "a fault is seen"
