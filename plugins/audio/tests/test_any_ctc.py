"""Recognizers that no module is written for: learned from the model, against PyTorch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModelForCTC
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Absent, Site
from qeff_proxy_audio.sound import EXAMPLE, load_sound

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
CONFIGS = {
    # Samples; every second frame goes through the layers.
    "sew": lambda: transformers.SEWConfig(
        **SIZES,
        vocab_size=32,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    # Features; the head is a convolution called otherwise.
    "parakeet_ctc": lambda: transformers.ParakeetCTCConfig(
        vocab_size=32,
        pad_token_id=0,
        encoder_config={**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 8},
    ),
    # Features, two steps of the extractor each.
    "wav2vec2-bert": lambda: transformers.Wav2Vec2BertConfig(**SIZES, vocab_size=32),
}


@pytest.fixture(scope="module", params=CONFIGS)
def recognizer(request):
    torch.manual_seed(0)
    model = transformers.AutoModelForCTC.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.2))
    return model.eval(), QEFFAutoModelForCTC(model, proxy="split")


def test_sounds_of_several_lengths_give_what_pytorch_gives_for_each_alone(recognizer):
    model, proxy = recognizer
    name = model.main_input_name
    lengths = (6_000, 2_345) if name == "input_values" else (150, 77)
    width = {"parakeet_ctc": (16,), "wav2vec2-bert": (160,)}.get(model.config.model_type, ())
    values = np.random.default_rng(0).standard_normal((2, lengths[0], *width)).astype(np.float32)
    mask = (np.arange(lengths[0]) < np.array(lengths)[:, None]).astype(np.int64)
    result = proxy.generate(inputs={name: values, "attention_mask": mask})
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(torch.from_numpy(values[row : row + 1, :length])).logits[0].numpy()
        assert np.ptp(expected, axis=0).max() > 0.3  # the frames differ
        np.testing.assert_allclose(result.logits[row], expected, atol=1e-4)
    if width:
        with pytest.raises(UsageError, match="runs each sound in one piece"):
            proxy.generate(inputs={name: values}, chunk_length_s=1.0)
        with pytest.raises(UsageError, match="takes input_features, not input_values"):
            proxy.generate(inputs={"input_values": values[..., 0]})


def test_the_head_is_the_module_beside_the_encoder(recognizer):
    model, _ = recognizer
    hooks = Plugins.discover({}).hooks_for(model.config.model_type, task="ctc")
    assert isinstance(hooks.locate_embedding(model, model.config), Absent)
    head = "ctc_head" if model.config.model_type == "parakeet_ctc" else "lm_head"
    assert hooks.locate_lm_head(model, model.config) == Site(head)
    encoder = next(one for one in model.children() if isinstance(one, transformers.PreTrainedModel))
    assert isinstance(hooks.locate_lm_head(encoder, model.config), Absent)


@pytest.mark.parametrize("recognizer", ["wav2vec2-bert"], indirect=True)
def test_features_of_an_extractor_are_run_without_their_padding(recognizer):
    model, proxy = recognizer
    extractor = transformers.SeamlessM4TFeatureExtractor()
    sound = load_sound(EXAMPLE, 16_000)[:16_123]
    features = extractor(sound, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**features).logits[0][features["attention_mask"][0] != 0].numpy()
    result = proxy.generate(extractor_only(extractor), inputs=sound)
    np.testing.assert_allclose(result.logits[0], expected, atol=1e-4)


def extractor_only(extractor):
    """A processor whose tokenizer is not looked at."""

    class Processor:
        feature_extractor = extractor

        def decode(self, ids):
            return " ".join(map(str, ids))

    return Processor()
