"""Train the tiny Wav2Vec2 checkpoint that ships with qeff-proxy-audio: spoken digits to letters.

The speech is made by espeak-ng (see ``spoken_digits.py``). At the end the model is tested on
voices that it was not trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from spoken_digits import (
    HELD_OUT_VOICES,
    RATE,
    TRAIN_VOICES,
    WORDS,
    clips,
    disturbed,
    word_error_rate,
)
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
PEAK_RATE = 3e-3


def new_processor() -> Wav2Vec2Processor:
    """Letters of the ten words, as the tokens of a CTC model."""
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
    """Make the model, untrained: 20 ms a frame."""
    config = Wav2Vec2Config(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=(32, 64, 64, 96, 96),
        conv_kernel=(10, 8, 8, 4, 4),
        conv_stride=(5, 4, 4, 2, 2),
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
    return Wav2Vec2ForCTC(config)


def main() -> None:
    """Train, test and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the tiny Wav2Vec2 checkpoint.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", type=int, default=3000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    training = clips(arguments.clips, TRAIN_VOICES, 1)
    held_out = clips(150, HELD_OUT_VOICES, 2)
    processor = new_processor()
    model = new_model(len(processor.tokenizer))
    print(f"{model.num_parameters()} parameters, {len(training)} clips", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=arguments.steps, pct_start=0.1
    )
    model.train()
    began = time.monotonic()
    for step in range(arguments.steps):
        batch = [training[i] for i in rng.integers(0, len(training), 12)]
        sounds = [disturbed(clip.samples, rng) for clip in batch]
        inputs = processor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
        labels = [processor.tokenizer(clip.text).input_ids for clip in batch]
        logits = model(inputs.input_values, attention_mask=inputs.attention_mask).logits
        frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))  # noqa: SLF001
        loss = ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor([i for row in labels for i in row]),
            frames,
            torch.tensor([len(row) for row in labels]),
            zero_infinity=True,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.steps - 1:
            spent = time.monotonic() - began
            print(f"step {step:5d}  loss {loss.item():.4f}  {spent:5.0f} s", flush=True)
    model.eval()
    pairs = []
    for clip in held_out:
        values = processor(
            np.pad(clip.samples, RATE // 5), sampling_rate=RATE, return_tensors="pt"
        ).input_values
        with torch.no_grad():
            ids = model(values).logits.argmax(-1)[0]
        pairs.append((clip.text, processor.decode(ids)))
    print(f"word error rate on held-out voices: {word_error_rate(pairs):.1%}")
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
