"""Encoders that no module is written for: learned from the model, against PyTorch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModel
from qeff_proxy.cli import main
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Absent
from qeff_proxy_embedding.probe import probe_model

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 60,
}
CONFIGS = {
    # A narrow table, and one layer that runs five times.
    "albert": lambda: transformers.AlbertConfig(**SIZES, embedding_size=16),
    # The encoder of an encoder and a decoder, without positions.
    "t5": lambda: transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4
    ),
    # One token type, as XLM-RoBERTa's checkpoints have.
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, type_vocab_size=1),
    # No mask: padding changes its results.
    "fnet": lambda: transformers.FNetConfig(
        **{name: size for name, size in SIZES.items() if name != "num_attention_heads"}
    ),
    # Windows, to which the model pads each text.
    "longformer": lambda: transformers.LongformerConfig(**SIZES, attention_window=[4, 4, 8, 4, 4]),
    # Given embeddings, it leaves out its positions; a hidden token changes all others.
    "esm": lambda: transformers.EsmConfig(
        **SIZES, pad_token_id=1, mask_token_id=2, token_dropout=True
    ),
}
LENGTHS = (7, 3, 12, 7)


def random_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def embedder(request, tmp_path_factory):
    model = random_model(CONFIGS[request.param]())
    proxy = QEFFAutoModel(model, proxy="split", options={"pooling": "mean"})
    proxy.export(export_dir=tmp_path_factory.mktemp(request.param))
    return model, proxy


def inputs():
    ids = np.random.default_rng(1).integers(3, 99, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    types = np.zeros_like(ids)  # as tokenizers give them to models that have one type
    return {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": types,
    }


def test_padded_batches_give_what_pytorch_gives_for_each_row_alone(embedder):
    model, proxy = embedder
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    expected = []
    for ids, length in zip(inputs()["input_ids"], LENGTHS, strict=True):
        with torch.no_grad():
            hidden = encoder(torch.from_numpy(ids[None, :length])).last_hidden_state
        expected.append(hidden[0].mean(0).numpy())
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 0.1  # the texts differ
    proxy.compile(batch_size=2)
    np.testing.assert_allclose(proxy.generate(inputs()).embeddings, expected, atol=1e-5)
    proxy.compile(batch_size=2, seq_len=[16])
    if model.config.model_type == "fnet":
        with pytest.raises(UsageError, match="padding, which changes the results"):
            proxy.generate(inputs())
    else:
        np.testing.assert_allclose(proxy.generate(inputs()).embeddings, expected, atol=1e-5)
    if model.config.model_type == "esm":
        with pytest.raises(UsageError, match="token 2 hides a token"):
            proxy.generate({"input_ids": np.array([[5, 2, 7]])})


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.BertConfig(**SIZES), 60),
        (transformers.XLMRobertaConfig(**SIZES, pad_token_id=3), 56),
        (transformers.MPNetConfig(**SIZES), 58),
        (CONFIGS["t5"](), None),
    ],
)
def test_the_most_tokens_are_learned_from_the_positions_that_the_model_looks_up(config, positions):
    assert probe_model(random_model(config)).positions == positions


def test_commands_know_the_task_by_the_architecture(tmp_path, capsys):
    random_model(transformers.ElectraConfig(**SIZES)).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "qeff_proxy_embedding.family" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: transformers.ViTModel(
                transformers.ViTConfig(hidden_size=32, num_hidden_layers=5, num_attention_heads=4)
            ),
            "takes pixel_values, not token ids",
        ),
        (
            lambda: transformers.IBertModel(transformers.IBertConfig(**SIZES)),
            "token embedding of IBertModel gives a tuple",
        ),
    ],
)
def test_what_cannot_be_cut_says_why(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        QEFFAutoModel(model().eval(), proxy="split").export()


def test_a_model_without_inputs_embeds_is_cut_at_its_table():
    """The cut compares its parts with the uncut model."""
    model = random_model(transformers.CLIPTextConfig(**SIZES))
    cut = cut_model(wrap_model(model), Plugins.discover().hooks_for("x", task="encoder"), "split")
    table = model.get_input_embeddings().weight
    assert cut.report.max_difference <= cut.report.tolerance * cut.report.largest_value
    assert cut.report.largest_value > 1
    assert all(weight is not table for weight in cut.proxy.part("body").module.parameters())
    assert any(weight is table for weight in cut.proxy.part("embedding").module.parameters())


def test_towers_that_are_left_out_are_said():
    """The base model of an image-text model embeds texts."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    text = transformers.LlamaConfig(**sizes, vocab_size=99, num_hidden_layers=2)
    tower = transformers.CLIPVisionConfig(
        **sizes, image_size=28, patch_size=14, projection_dim=32, num_hidden_layers=2
    )
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5)
    model = transformers.LlavaModel(config).eval()
    hooks = Plugins.discover().hooks_for("no_such_type", task="encoder")
    with pytest.warns(UserWarning, match="LlavaModel embeds texts alone here: its parts for ima"):
        hooks.build_proxy(model, hooks.locate_embedding(model, config), Absent("none"), "split")
