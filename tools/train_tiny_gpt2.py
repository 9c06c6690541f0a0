"""Train the tiny GPT-2 checkpoint that ships with qeff-proxy.

This script creates the stories (see ``stories.py``), the byte-level BPE tokenizer and the weights.
The same seed, number of steps and number of threads on the same machine lead to the same
checkpoint. At the end the model is measured on held-out stories, and the figures are written to the
model card.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measure_tiny_gpt2 import measure, write_card
from stories import Grammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from stories import Story

OUTPUT = Path(__file__).parents[1] / "core/qeff_proxy/checkpoints/tiny-gpt2"
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1024
POSITIONS = 256
LONGEST_STORY = 200
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TOKENIZER_STORIES = 8000
ROWS = 8
WARM_UP = 150
MATRIX_RATE, RATE = 0.02, 4e-3


def tell(grammar: Grammar, seed: int) -> Iterator[Story]:
    """Generate stories without end."""
    rng = random.Random(seed)  # noqa: S311 - stories, not secrets
    while True:
        yield grammar.tell(rng)


def train_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories = islice(tell(grammar, TRAIN_SEED), TOKENIZER_STORIES)
    bpe.train_from_iterator((story.text for story in stories), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Create the untrained model."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=96,
        n_layer=3,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=LONGEST_STORY,
    )
    return model


def batches(
    grammar: Grammar, tokenizer: PreTrainedTokenizerFast, held_out: set[str]
) -> Iterator[torch.Tensor]:
    """Rows of whole stories, the last of each row cut off at its end.

    One row in eight begins with the end token, so that the model can also start without a prompt.
    """
    stories = (story.text for story in tell(grammar, TRAIN_SEED) if story.text not in held_out)
    row = 0
    while True:
        batch = []
        for _ in range(ROWS):
            ids = [tokenizer.eos_token_id] if row % 8 == 0 else []
            while len(ids) < POSITIONS:
                ids += [*tokenizer.encode(next(stories)), tokenizer.eos_token_id]
            batch.append(ids[:POSITIONS])
            row += 1
        yield torch.tensor(batch)


def share_of_rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then linear decay."""
    return min((step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))


def train(model: GPT2LMHeadModel, rows: Iterator[torch.Tensor], steps: int) -> None:
    """Train the model in place: Muon for the matrices of the layers, AdamW for the others."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, weight_decay=0.01), MATRIX_RATE),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), RATE),
    ]
    model.train()
    began = time.monotonic()
    for step, ids in enumerate(islice(rows, steps)):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share_of_rate(step, steps)
            optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            print(f"step {step:5d}  loss {loss.item():.4f}  {spent:5.0f} s", flush=True)
    model.eval()


def main() -> None:
    """Train, measure and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the tiny GPT-2 checkpoint.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=1, help="threads to train with")
    parser.add_argument("--held-out", type=int, default=200, help="stories to measure on")
    arguments = parser.parse_args()

    torch.manual_seed(TRAIN_SEED)
    torch.set_num_threads(arguments.threads)
    grammar = Grammar()
    held_out = list(islice(tell(grammar, HELD_OUT_SEED), arguments.held_out))
    tokenizer = train_tokenizer(grammar)
    model = new_model(tokenizer)
    began = time.monotonic()
    rows = batches(grammar, tokenizer, {story.text for story in held_out})
    train(model, rows, arguments.steps)
    seconds = time.monotonic() - began

    model.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(arguments.output)
    figures = measure(model, tokenizer, grammar, held_out)
    trained = f"{arguments.steps * ROWS * POSITIONS / 1e6:.1f} million tokens"
    write_card(arguments.output, figures, trained)
    print(f"trained on {trained} in {seconds:.0f} s")
    print(figures.table())


if __name__ == "__main__":
    main()
