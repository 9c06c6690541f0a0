"""Train the tiny Wav2Vec2 checkpoint that ships with qeff-proxy-audio: spoken digits to letters.

espeak-ng synthesizes the speech (see ``spoken_digits.py``). At the end the model is tested on
held-out voices.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from speech_training import parse_arguments, test, train, write
from spoken_digits import RATE, WORDS
from torch.nn.functional import ctc_loss
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "plugins/audio/qeff_proxy_audio/checkpoints/tiny-wav2vec2"
PEAK_RATE = 2e-3
# Of the filter bank that initializes the convolutions.
BANDS, PHASES = 32, 3


def new_processor() -> Wav2Vec2Processor:
    """The letters of the ten words as the tokens of a CTC model."""
    letters = sorted(set("".join(WORDS)))
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(path), word_delimiter_token="|")  # noqa: S106
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=RATE, do_normalize=True, return_attention_mask=True
    )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def new_model(vocabulary: int) -> Wav2Vec2ForCTC:
    """Create the untrained model: 20 ms a frame."""
    config = Wav2Vec2Config(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=(BANDS * PHASES, 64, 96),
        conv_kernel=(160, 10, 3),
        conv_stride=(40, 4, 2),
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        num_conv_pos_embeddings=15,
        num_conv_pos_embedding_groups=8,
        hidden_dropout=0.05,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        apply_spec_augment=False,
        pad_token_id=0,
    )
    model = Wav2Vec2ForCTC(config)
    begin_as_filter_bank(model)
    return model


@torch.no_grad()
def begin_as_filter_bank(model: Wav2Vec2ForCTC) -> None:
    """Initialize the first two convolutions as band-pass filters and their energies.

    From random weights, learning such filters would take most of the training. The first
    convolution has each band, evenly spaced on the mel scale, in three phases; the activation keeps
    the positive halves, whose sum over phases and time is about the band's energy.
    """
    bank, energies = (layer.conv for layer in model.wav2vec2.feature_extractor.conv_layers[:2])
    time = (torch.arange(bank.kernel_size[0]) - bank.kernel_size[0] / 2) / RATE
    mel = torch.linspace(2595 * np.log10(1 + 100 / 700), 2595 * np.log10(1 + 7000 / 700), BANDS)
    centers = 700 * (10 ** (mel / 2595) - 1)
    widths = torch.clamp(0.12 * centers, min=80.0)
    for band, (center, width) in enumerate(zip(centers, widths, strict=True)):
        envelope = torch.exp(-0.5 * (2 * torch.pi * width * time) ** 2)
        envelope *= center.sqrt() / envelope.sum()
        for phase in range(PHASES):
            angle = 2 * torch.pi * (center * time + phase / PHASES)
            bank.weight[band * PHASES + phase, 0] = envelope * torch.cos(angle)
    window = torch.hann_window(energies.kernel_size[0], periodic=False)
    for band in range(BANDS):
        energies.weight[band] *= 0.1
        energies.weight[band, band * PHASES : (band + 1) * PHASES] += window / window.sum()


def main() -> None:
    """Train, test and write the checkpoint."""
    arguments = parse_arguments("Wav2Vec2", OUTPUT, 1300)
    processor = new_processor()
    model = new_model(len(processor.tokenizer))
    if arguments.start:
        model = Wav2Vec2ForCTC.from_pretrained(arguments.start)
    model.train()

    def loss_of(sounds: list[np.ndarray], texts: list[str]) -> torch.Tensor:
        inputs = processor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
        labels = [processor.tokenizer(text).input_ids for text in texts]
        logits = model(inputs.input_values, attention_mask=inputs.attention_mask).logits
        frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))  # noqa: SLF001
        return ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor([label for row in labels for label in row]),
            frames,
            torch.tensor([len(row) for row in labels]),
            zero_infinity=True,
        )

    @torch.no_grad()
    def transcribe(samples: np.ndarray) -> str:
        inputs = processor(samples, sampling_rate=RATE, return_tensors="pt")
        return processor.decode(model(inputs.input_values).logits.argmax(-1)[0])

    peak_rate = PEAK_RATE / 2 if arguments.start else PEAK_RATE
    train(arguments, model.parameters(), peak_rate, loss_of)
    model.eval()
    write(model, processor, arguments.output)
    test(transcribe)


if __name__ == "__main__":
    main()
