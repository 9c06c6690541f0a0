"""Embedding models, from a model to vectors, on ONNX Runtime and against PyTorch alone.

The models are small and random, biases and norms too, so that nothing left out goes unnoticed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModel
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CutError, UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Absent, Site
from qeff_proxy.verify.verify_model import verify_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 300,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "camembert": lambda: transformers.CamembertConfig(**SIZES),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=300
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **{**SIZES, "num_hidden_layers": 4}, local_attention=8, pad_token_id=0, **MODERN
    ),
    "nomic_bert": lambda: transformers.NomicBertConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
    "qwen2": lambda: transformers.Qwen2Config(
        **{name: size for name, size in DECODER.items() if name != "head_dim"}
    ),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "gemma2": lambda: transformers.Gemma2Config(**DECODER, sliding_window=6),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=6),
}
DECODERS = {"gemma2", "llama", "mistral", "qwen2", "qwen3"}
LENGTHS = (5, 17, 150, 2, 41)


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """One cache for all tests of a run, so that an export is made once."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def random_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def random_inputs(model, lengths=LENGTHS, left=False):
    """Rows of these lengths, padded at one end, the ids as a tokenizer would give them."""
    generator = np.random.default_rng(1)
    ids = np.full((len(lengths), max(lengths)), model.config.pad_token_id or 0)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for index, length in enumerate(lengths):
        where = slice(-length, None) if left else slice(length)
        ids[index, where] = generator.integers(3, 99, length)
        types[index, where] = generator.integers(0, 2, length)
        mask[index, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type in {"bert", "nomic_bert"}:
        inputs["token_type_ids"] = types
    return inputs


def reference(model, inputs, pooling, normalize=True):
    """Each row by itself, without any padding, through the uncut model."""
    vectors = []
    for index, mask in enumerate(inputs["attention_mask"]):
        row = {
            name: torch.tensor(value[index][mask != 0][None])
            for name, value in inputs.items()
            if name != "attention_mask"
        }
        with torch.no_grad():
            hidden = model(**row).last_hidden_state[0]
        vector = {
            "mean": hidden.mean(0),
            "cls": hidden[0],
            "max": hidden.max(0).values,
            "last": hidden[-1],
        }[pooling]
        vectors.append((vector / vector.norm() if normalize else vector).numpy())
    return np.stack(vectors)


def embedder(model, pooling="mean", kind="split", **options):
    options = {"pooling": pooling, "normalize": True, **options}
    return QEFFAutoModel(model, proxy=kind, options=options)


@pytest.fixture(scope="module")
def bert():
    return random_model(CONFIGS["bert"]())


# Families


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_batches_give_what_pytorch_gives_for_each_row_alone(family):
    model = random_model(CONFIGS[family]())
    pooling = "last" if family in DECODERS else "mean"
    proxy = embedder(model, pooling)
    proxy.compile(batch_size=2, seq_len=[32, 200])
    inputs = random_inputs(model)
    vectors = proxy.generate(inputs).embeddings
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, reference(model, inputs, pooling), atol=1e-5)


def test_embeddinggemma_sees_later_tokens():
    """The oracle is transformers' Gemma 3 with bidirectional attention, each text alone."""
    config = transformers.Gemma3TextConfig(
        **DECODER, sliding_window=12, use_bidirectional_attention=True, query_pre_attn_scalar=8
    )
    model = random_model(config)
    proxy = embedder(model)
    inputs = random_inputs(model)
    expected = reference(model, inputs, "mean")
    np.testing.assert_allclose(proxy.generate(inputs).embeddings, expected, atol=1e-5)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
    "factor": 18.75,
}


def test_texts_on_both_sides_of_a_rotary_threshold_give_what_pytorch_gives_for_each_alone():
    model = random_model(transformers.LlamaConfig(**DECODER, rope_parameters=LONGROPE))
    inputs = random_inputs(model, (8, 40, 16, 17))
    proxy = embedder(model, "last")
    proxy.compile(batch_size=4)
    expected = reference(model, inputs, "last")
    np.testing.assert_allclose(proxy.generate(inputs).embeddings, expected, atol=1e-5)
    proxy.compile(batch_size=4, seq_len=[64])
    with pytest.raises(UsageError, match="seq_len 64 gives a text of 16 tokens the rotary factors"):
        proxy.generate(inputs)


def test_the_cut_is_verified_on_both_sides_of_the_rotary_threshold(monkeypatch):
    """The real limit is lowered for that; rows of both sides in one batch are found."""
    long = LONGROPE | {"original_max_position_embeddings": 4096}
    config = transformers.LlamaConfig(**DECODER, rope_parameters=long)
    with monkeypatch.context() as change:
        change.setattr("qeff_proxy_embedding.flow._padding_group", lambda *_: 0)
        with pytest.raises(CutError, match="do not equal the uncut model"):
            embedder(random_model(config)).export()
    embedder(random_model(config)).export()


@pytest.mark.parametrize(
    ("architecture", "weight"),
    [("BertForSequenceClassification", "classifier.bias"), ("BertForMaskedLM", "cls.predictions")],
)
def test_weights_of_a_head_that_is_not_used_are_named(architecture, weight, tmp_path):
    config = CONFIGS["bert"]()
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "checkpoint")
    proxy = QEFFAutoModel.from_pretrained(tmp_path / "checkpoint", enable_proxy=True)
    with pytest.warns(UserWarning, match=rf"BertModel does not use {weight}.* head"):
        proxy.export()


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_token_table_is_cut_and_there_is_no_head(family):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(CONFIGS[family]())
    hooks = Plugins.discover({}).hooks_for(family, task="encoder")
    site = hooks.locate_embedding(model, model.config)
    assert isinstance(site, Site)
    assert model.get_submodule(site.module) is model.get_input_embeddings()
    assert isinstance(hooks.locate_lm_head(model, model.config), Absent)
    assert hooks.distribution == "qeff-proxy-embedding"


def test_positions_and_token_types_stay_in_the_body(bert):
    proxy = embedder(bert)
    folder = proxy.export()
    with safe_open(folder / "body.safetensors", "numpy") as file:
        names = set(file.keys())
    assert {
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
    } <= names
    assert "embeddings.word_embeddings.weight" not in names
    with safe_open(folder / "vocabulary.safetensors", "numpy") as file:
        assert list(file.keys()) == ["embeddings.word_embeddings.weight"]


def test_commands_take_a_checkpoint_without_the_pooler_that_nothing_uses(tmp_path, capsys):
    transformers.BertModel(CONFIGS["bert"](), add_pooling_layer=False).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, path, {"format": "pt"})
    assert main(["inspect", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "lacks 1 of the weights of BertModel, among them encoder.layer.0" in said


def test_openvino_passes_verify_on_tokens_that_verify_chose(bert):
    found = verify_model(embedder(bert).export(), ["openvino"])
    (result,) = found.results
    assert result.passed, result.error or result.comparison.first_divergence
    assert len(found.input["input_ids"][0]) == 16
    assert result.cosine == pytest.approx(1)


def test_a_decoder_as_a_causal_lm_is_still_served_by_its_own_package():
    assert Plugins.discover({}).hooks_for("qwen3").distribution == "qeff-proxy-text"


# Pooling


@pytest.mark.parametrize("pooling", ["cls", "max", "last"])
def test_each_pooling_is_what_its_name_says(bert, pooling):
    inputs = random_inputs(bert, (7, 3, 12))
    proxy = embedder(bert, pooling, normalize=False)
    proxy.compile(batch_size=3)
    expected = reference(bert, inputs, pooling, normalize=False)
    np.testing.assert_allclose(proxy.generate(inputs).embeddings, expected, atol=1e-5)


def test_a_fault_in_the_weights_would_be_seen(bert):
    inputs = random_inputs(bert, (7, 3, 12))
    expected = reference(bert, inputs, "mean")
    other = random_model(CONFIGS["bert"]())
    with torch.no_grad():
        other.encoder.layer[1].output.dense.bias[3] += 0.05
    assert np.abs(reference(other, inputs, "mean") - expected).max() > 1e-4


def weighted(hidden, mask):
    """A pooling of a user's own: the position-weighted mean."""
    weights = mask * torch.arange(1, mask.shape[1] + 1)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


def test_a_function_pools_inside_the_graph(bert):
    inputs = random_inputs(bert, (7, 3))
    proxy = embedder(bert, weighted, normalize=False)
    proxy.compile(batch_size=2)
    with torch.no_grad():
        expected = []
        for index, length in enumerate((7, 3)):
            row = {
                name: torch.tensor(one[index : index + 1, :length]) for name, one in inputs.items()
            }
            hidden = bert(**row).last_hidden_state
            expected.append(weighted(hidden, row["attention_mask"])[0].numpy())
    np.testing.assert_allclose(proxy.generate(inputs).embeddings, expected, atol=1e-5)


def test_truncated_vectors_are_normalized_after_the_cut(bert):
    inputs = random_inputs(bert, (7, 3))
    short = embedder(bert, truncate_dim=8).generate(inputs).embeddings
    full = reference(bert, inputs, "mean", normalize=False)[:, :8]
    np.testing.assert_allclose(short, full / np.linalg.norm(full, axis=1, keepdims=True), atol=1e-5)


def test_without_a_pooling_hidden_states_come_without_their_padding(bert):
    inputs = random_inputs(bert, (7, 3))
    proxy = QEFFAutoModel(bert, proxy="split")
    proxy.compile(batch_size=2)
    hidden = proxy.generate(inputs).embeddings
    assert [one.shape for one in hidden] == [(7, 32), (3, 32)]
    np.testing.assert_allclose(
        hidden[1].mean(0), reference(bert, inputs, "mean", False)[1], atol=1e-5
    )


# Ways to run


@pytest.mark.parametrize("kind", ["whole", "split"])
def test_one_graph_and_two_give_the_same(bert, kind):
    inputs = random_inputs(bert, (7, 3))
    vectors = embedder(bert, kind=kind).generate(inputs).embeddings
    np.testing.assert_allclose(vectors, reference(bert, inputs, "mean"), atol=1e-5)


def test_padding_on_the_left_changes_nothing(bert):
    right = embedder(bert).generate(random_inputs(bert, (7, 3))).embeddings
    left = embedder(bert).generate(random_inputs(bert, (7, 3), left=True)).embeddings
    np.testing.assert_array_equal(right, left)


def test_a_dump_holds_both_parts_at_the_compiled_length(bert, tmp_path):
    proxy = embedder(bert)
    proxy.compile(batch_size=2, seq_len=[16])
    result = proxy.generate(random_inputs(bert, (7, 3, 9)), io_dir=tmp_path / "io")
    dump = read_dump(result.io_folder)
    wanted = {"embedding.in.input_ids", "body.in.attention_mask", "body.out.sentence_embedding"}
    assert wanted <= {str(name) for name in dump.names()}
    assert dump.array("prefill", 1, "embedding.in.input_ids").shape == (1, 16)
    assert len(dump.steps) == 2


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "average"}, "none of mean"),
        ({"pooling": "no_such_module:f"}, "cannot be found"),
        ({"pooling": "mean", "truncate_dim": 33}, "1 to 32"),
        ({"pooling": "mean", "truncate_dim": 0}, "1 to 32"),
        ({"normalize": True}, "no vector to normalize"),
        ({"pooling": "mean", "normalize": "yes"}, "normalize is 'yes'"),
        ({"pooling": lambda hidden, mask: hidden / mask.no}, "fails: AttributeError: .*must turn"),
        ({"pooling": lambda hidden, mask: hidden}, r"shape \[1, 2, 32\] for one text"),
        ({"poling": "mean"}, "no argument 'poling'. Try 'pooling'"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(bert, options, message):
    with pytest.raises(UsageError, match=message):
        QEFFAutoModel(bert, proxy="split", options=options).export()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no text"),
        ({}, "no input_ids"),
        ({"input_ids": np.zeros((0, 3), int)}, "neither zero"),
        ({"input_ids": np.array([1, 2])}, "texts, sequence"),
        ({"input_ids": np.ones((1, 3), int), "attention_mask": np.ones((1, 2), int)}, "be equal"),
        ({"input_ids": np.ones((1, 3), int), "attention_mask": np.zeros((1, 3), int)}, "no token"),
        ({"input_ids": np.ones((1, 3), int), "attention_mask": np.array([[1, 0, 1]])}, "between"),
        ({"input_ids": np.ones((1, 301), int)}, "300 fit"),
        ({"input_ids": np.array([[1, -4, 2]])}, "-4 is no token"),
        ({"input_ids": np.array([[1, 99]])}, "99 is no token.*0 to 98"),
        ({"input_ids": np.array([[1.5, 2.0]])}, "whole numbers"),
        ({"input_ids": [[1, 2]], "position_ids": [[4, 5]]}, "nothing uses .* 'position_ids'"),
        (5, "inputs is 5"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(bert, inputs, message):
    with pytest.raises(UsageError, match=message):
        embedder(bert).generate(inputs)


def test_a_text_longer_than_every_compiled_length_is_refused(bert):
    proxy = embedder(bert)
    proxy.compile(seq_len=[8, 16])
    with pytest.raises(UsageError, match="16 fit"):
        proxy.generate({"input_ids": np.ones((1, 17), int)})


def test_a_compiled_length_beyond_the_models_positions_is_refused(bert):
    proxy = embedder(bert)
    proxy.compile(seq_len=301)
    with pytest.raises(UsageError, match="301 is longer than the 300 positions"):
        proxy.generate({"input_ids": np.ones((1, 3), int)})


@pytest.mark.parametrize("lengths", [[], [0], ["8"]])
def test_lengths_that_cannot_be_right_are_refused(bert, lengths):
    with pytest.raises(UsageError, match="seq_len"):
        embedder(bert).compile(seq_len=lengths)


def test_texts_without_a_tokenizer_say_what_to_pass(bert):
    with pytest.raises(UsageError, match="tokenizer"):
        embedder(bert).generate("a text")
    with pytest.raises(UsageError, match="tokenizer is 'bert-base'"):
        embedder(bert).generate("a text", "bert-base")
