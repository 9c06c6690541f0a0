"""Generate text with a proxy of a causal LM, and write every tensor of every step to disk.

    python text_model.py [MODEL] [--prompt TEXT]

MODEL is a hub id or a local folder.
"""

from __future__ import annotations

import argparse

from qeff_proxy import QEFFAutoModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a proxy of a causal LM.")
    parser.add_argument("model", nargs="?", default="openai-community/gpt2")
    parser.add_argument("--prompt", default="Hi there!! My name is")
    parser.add_argument("--generation-len", type=int, default=32)
    args = parser.parse_args()

    # The token embedding and the LM head become parts of their own; the body keeps the rest.
    model = QEFFAutoModelForCausalLM.from_pretrained(args.model, enable_proxy=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    model.compile(prefill_seq_len=32, ctx_len=128, num_cores=16)
    result = model.generate(
        prompts=[args.prompt],
        tokenizer=tokenizer,
        generation_len=args.generation_len,
        write_io=True,
    )

    print(f"{args.prompt}{result.generated_texts[0]}")
    print(f"{result.perf_metrics.decode_perf:.1f} tokens/s")
    print(f"inputs and outputs of every step: {result.io_folder}")


if __name__ == "__main__":
    main()
