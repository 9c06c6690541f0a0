"""The cost of a verification: CPU seconds and peak memory, by layer and of the whole model.

Each runs in a new process, on a bfloat16 Llama with random weights (one block of random numbers,
repeated), which is exported first. The prompt has 32 tokens, the continuation 8.

    python benchmarks/verify_cost.py                # 350M, by layer and whole
    python benchmarks/verify_cost.py --model 7b     # by layer
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE = {"vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "350m": {
        **BASE,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "7b": {
        **BASE,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
WORK = {"350m": ("export", "by layer", "whole"), "7b": ("export", "by layer")}
IDS = [[7 + 13 * number for number in range(32)]]


def write_checkpoint(folder: Path, settings: dict[str, Any]) -> None:
    """Write a bfloat16 checkpoint layer by layer, in one file without holding it."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**settings, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    data = block.bfloat16().view(torch.uint16).numpy()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:  # a norm
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())
                continue
            count = shape.numel()
            for begin in range(0, count, len(data)):
                file.write(data[: count - begin].tobytes())


def work(what: str, checkpoint: Path, folder: Path) -> None:
    """Do one thing, and print its CPU seconds and peak memory."""
    import numpy as np
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.load.load_model import load_model
    from qeff_proxy.plugins.manager import Plugins
    from qeff_proxy.request import Request
    from qeff_proxy.verify import VerifyOptions, verify_model
    from qeff_proxy.verify.by_layer import verify_layers

    stages: dict[str, float] = {}
    stage, since = "", _cpu_seconds()

    def begin(name: str) -> None:
        nonlocal stage, since
        stages[stage] = stages.get(stage, 0.0) + _cpu_seconds() - since
        stage, since = name.rpartition(": ")[2], _cpu_seconds()

    if what == "export":
        hooks = Plugins.discover().hooks_for("llama")
        export_model(load_model(str(checkpoint)), hooks, output=folder, taps="layers")
    else:
        verify = verify_layers if what == "by layer" else verify_model
        result = verify(
            str(checkpoint),
            request=Request(inputs={"input_ids": np.array(IDS)}),
            options=VerifyOptions(output=folder, max_new_tokens=8),
            progress=begin,
        )
        assert result.passed, result.to_json()
    begin("")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row = {"what": what, "cpu_s": round(_cpu_seconds(), 1), "peak_mb": peak}
    if what == "by layer":
        row["pytorch_cpu_s"] = round(stages["PyTorch"], 1)  # one pass of the same positions
    print(json.dumps(row))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="350m")
    parser.add_argument("--what", nargs="*", help="of: export, by layer, whole")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]), Path(args.work[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, MODELS[args.model])
        for what in args.what or WORK[args.model]:
            command = [sys.executable, __file__, "--work", what, checkpoint, folder / "export"]
            environment = {**os.environ, "QEFF_HOME": str(folder / "home")}
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
