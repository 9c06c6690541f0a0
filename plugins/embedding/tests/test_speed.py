"""The speed of an embedder, beside the uncut model on the same texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModel, Request
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.flows.flow import Job
from qeff_proxy.load.load_model import load_config
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from qeff_proxy_embedding.flow import EncoderFlow

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
INPUTS = {
    "input_ids": [[5, 6, 7, 0], [8, 9, 10, 0], [5, 6, 7, 8]],
    "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    "token_type_ids": [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=37)).eval()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    face = QEFFAutoModel(model, proxy="split", options={"pooling": "mean", "normalize": True})
    return read_export(face.export(tmp_path_factory.mktemp("bert") / "export"))


def test_the_uncut_model_does_what_the_parts_do(model, export):
    """What is compared in speed gives the same vectors, pooling and all."""
    compiled = compile_export(export, "torch", CompileOptions(batch_size=2))
    with open_sessions(compiled) as sessions:
        job = Job(
            export=export,
            sessions=sessions,
            options=compiled.options,
            config=load_config(export.processor_folder),
            tensors={name: torch.tensor(rows) for name, rows in INPUTS.items()},
            folder=export.processor_folder,
        )
        vectors = EncoderFlow().run(job)["sentence_embedding"]
        with torch.no_grad():
            batches = EncoderFlow().run_model(model, job)
    assert [len(batch) for batch in batches] == [2, 1]
    np.testing.assert_allclose(np.concatenate(batches), vectors, atol=1e-6)


def test_texts_a_second_are_told_of_each_backend_and_of_pytorch(export):
    options = VerifyOptions(compile=CompileOptions(batch_size=2, num_cores=1), speed=True, turns=1)
    found = verify_model(export, ["onnxruntime", "openvino"], Request(inputs=INPUTS), options)
    speed = found.speed
    assert (speed.amount, speed.unit) == (3, "texts")
    assert {one.name for one in speed.timings} == {"onnxruntime", "openvino"}
    assert speed.reference is not None
    assert "BertModel" in speed.notes[0]
