"""Train the tiny Whisper checkpoint that ships with qeff-proxy-audio: spoken digits to words.

espeak-ng synthesizes the speech (see ``spoken_digits.py``). During training the encoder also has a
CTC loss on the words, whose head is discarded; without it, the decoder's cross attention would take
hours to train. At the end the model is tested on held-out voices.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from speech_training import parse_arguments, test, train, write
from spoken_digits import MOST_WORDS, RATE, WORDS
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy, ctc_loss
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "plugins/audio/qeff_proxy_audio/checkpoints/tiny-whisper"
PEAK_RATE = 2e-3
SECONDS = 5
SPECIALS = ("<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>",
            "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")  # fmt: skip


def new_processor() -> WhisperProcessor:
    """Tokens: the bytes, the ten words, and Whisper's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = "\u0120" + word
        for stop in range(2, len(pieces) + 1):
            pair = (pieces[: stop - 1], pieces[stop - 1])
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(pieces[:stop], len(vocabulary))
    for token in SPECIALS:
        vocabulary[token] = len(vocabulary)
    tokenizer = WhisperTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=SPECIALS[0],
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        additional_special_tokens=list(SPECIALS[1:]),
    )
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=SECONDS)
    return WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)


def new_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Create the untrained model."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    end, start, plain = ids[SPECIALS[0]], ids[SPECIALS[1]], ids["<|notimestamps|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=40,
        d_model=80,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_source_positions=SECONDS * 50,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        no_timestamps_token_id=plain,
        prev_sot_token_id=ids["<|startofprev|>"],
        is_multilingual=False,
        return_timestamps=False,
        max_new_tokens=16,
    )
    return model


def targets(tokenizer: WhisperTokenizer, texts: list[str]) -> torch.Tensor:
    """Prompt, words and end token, ``[batch, tokens]``, padded with end tokens."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (SPECIALS[1], SPECIALS[-1])]
    rows = []
    for text in texts:
        words = tokenizer(" " + text, add_special_tokens=False).input_ids
        rows.append(ids + words + [tokenizer.eos_token_id] * (MOST_WORDS + 1 - len(words)))
    return torch.tensor(rows)


def losses(
    model: WhisperForConditionalGeneration,
    listen: torch.nn.Linear,
    features: torch.Tensor,
    rows: torch.Tensor,
    words: list[list[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's loss on the words and the end token, and the encoder's CTC loss."""
    hidden = model.model.encoder(features).last_hidden_state
    logits = model(encoder_outputs=(hidden,), decoder_input_ids=rows[:, :-1]).logits
    spoken = cross_entropy(logits[:, 1:].flatten(0, 1), rows[:, 2:].flatten())
    heard = ctc_loss(
        listen(hidden).log_softmax(-1).transpose(0, 1),
        torch.tensor([word for row in words for word in row]),
        torch.full((len(words),), hidden.shape[1]),
        torch.tensor([len(row) for row in words]),
        zero_infinity=True,
    )
    return spoken, heard


def main() -> None:
    """Train, test and write the checkpoint."""
    arguments = parse_arguments("Whisper", OUTPUT, 3000)
    processor = new_processor()
    model = new_model(processor.tokenizer)
    if arguments.start:
        model = WhisperForConditionalGeneration.from_pretrained(arguments.start)
    model.train()
    listen = torch.nn.Linear(model.config.d_model, len(WORDS) + 1)

    def loss_of(sounds: list[np.ndarray], texts: list[str]) -> torch.Tensor:
        features = processor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        words = [[WORDS.index(word) + 1 for word in text.split()] for text in texts]
        rows = targets(processor.tokenizer, texts)
        spoken, heard = losses(model, listen, features, rows, words)
        return spoken + heard

    @torch.no_grad()
    def transcribe(samples: np.ndarray) -> str:
        features = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
        return processor.decode(model.generate(features)[0], skip_special_tokens=True)

    peak_rate = PEAK_RATE / 2 if arguments.start else PEAK_RATE
    train(arguments, [*model.parameters(), *listen.parameters()], peak_rate, loss_of)
    model.eval()
    write(model, processor, arguments.output)
    test(transcribe)


if __name__ == "__main__":
    main()
