"""How fast models run, greedy decoding and encoding, compared with other tools.

Every contender is a process that stays loaded, in an environment of its own if it needs other
packages. They run in turns, one at a time, so that other load affects all alike. Prints the medians
of a step over all turns, wall-clock and CPU time, and their ratio to qeff-proxy's. All run the same
checkpoint of random weights.

``roofline`` reads as many bytes as a step's weights have: no step in float32 can be faster.

    python benchmarks/run_speed.py                     # all rows, 5 rounds
    python benchmarks/run_speed.py --rows gpt2 --rounds 3 --json run.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("run_worker.py")
TOKENIZER = Path(__file__).parents[1] / "core/qeff_proxy/checkpoints/tiny-gpt2"
LLAMA_160M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
#: Packages of the contenders that need an environment of their own.
PACKAGES = {
    "optimum-onnx": ["optimum-onnx[onnxruntime]==0.1.0", "torch==2.13.0"],
    "genai": ["onnxruntime-genai==0.18.0", "onnx-ir", "torch==2.13.0", "transformers", "tqdm"],
}
ENVIRONMENTS = {"optimum-onnx": "optimum-onnx", "genai": "genai", "genai-int4": "genai"}
DECODERS = [
    "roofline",
    "transformers-eager",
    "transformers",
    "optimum-onnx",
    "genai",
    "qeff-proxy",
    "qeff-proxy-openvino",
]
QUANTIZED = [
    "qeff-proxy",
    "qeff-proxy-int8",
    "qeff-proxy-int4",
    "qeff-proxy-int4-head",
    "genai-int4",
]
#: Row → checkpoint, contenders, and the job: (batch, tokens of the prompt, new tokens).
#: A prompt of 991 tokens and 33 new ones fill GPT-2's 1,024 positions.
ROWS: dict[str, tuple[str, list[str], tuple[int, int, int]]] = {
    "gpt2": ("gpt2", DECODERS, (1, 32, 33)),
    "gpt2-1024": ("gpt2", DECODERS, (1, 991, 33)),
    "gpt2-batch8": ("gpt2", DECODERS, (8, 32, 33)),
    "gpt2-batch8-1024": ("gpt2", DECODERS, (8, 991, 33)),
    "llama": ("llama", DECODERS, (1, 32, 33)),
    "llama-1024": ("llama", DECODERS, (1, 991, 33)),
    "llama-batch8": ("llama", DECODERS, (8, 32, 33)),
    "llama-batch8-1024": ("llama", DECODERS, (8, 991, 33)),
    "gpt2-quantized": ("gpt2", QUANTIZED, (1, 32, 33)),
    "llama-quantized": ("llama", QUANTIZED, (1, 32, 33)),
    "bge": (
        "bert",
        ["encoder-transformers", "encoder-onnxruntime", "encoder-openvino"],
        (32, 128, 2),
    ),
}
#: Models that a contender does not support.
MISSING = {("gpt2", "genai"), ("gpt2", "genai-int4")}


def make_checkpoint(folder: Path, kind: str) -> None:
    """A checkpoint with random weights, and a tokenizer for contenders that need one."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        BertConfig,
        GPT2Config,
        LlamaConfig,
    )

    torch.manual_seed(0)
    configs = {"gpt2": GPT2Config(), "llama": LlamaConfig(**LLAMA_160M), "bert": BertConfig()}
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(configs[kind])
    if kind != "bert":
        model.generation_config.eos_token_id = None  # all generate the same number of tokens
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def python_of(contender: str, environments: Path) -> str:
    """The Python with the contender's packages, which are installed at their first use."""
    name = ENVIRONMENTS.get(contender)
    if name is None:
        return sys.executable
    folder = environments / name
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [folder / "bin/python", "-m", "pip", "install", "--quiet", *PACKAGES[name]]
        subprocess.run(command, check=True)
        (folder / "ready").touch()
    return str(folder / "bin/python")


class Worker:
    """A contender's process."""

    def __init__(self, python: str, contender: str, checkpoint: Path, threads: int) -> None:
        self.contender = contender
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        environment = dict(os.environ)
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, "-W", "ignore", WORKER, contender, checkpoint, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def run(self, work: tuple[int, int, int]) -> dict[str, Any]:
        """Let it run once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.contender} failed: {self.log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_row(row: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a row's contenders in turns; return their milliseconds and other results."""
    kind, contenders, what = ROWS[row]
    checkpoint = work / kind
    if not checkpoint.exists():
        make_checkpoint(checkpoint, kind)
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = []
        for name in contenders:
            if (kind, name) in MISSING or (args.contenders and name not in args.contenders):
                continue
            python = python_of(name, args.environments or work / "environments")
            workers.append(stack.enter_context(Worker(python, name, checkpoint, args.threads)))
        for turn in range(args.rounds):
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                answer = worker.run(what)
                one = found.setdefault(worker.contender, {"wall": [], "cpu": []})
                for clock in ("wall", "cpu"):
                    one[clock] += answer.pop(clock)
                one |= answer
                middle = statistics.median(one["wall"])
                print(row, turn, worker.contender, f"{middle:.1f} ms", file=sys.stderr)
    return found


def summarize(row: str, found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and ratios to qeff-proxy's (or to the first); print them as a table."""
    batch = ROWS[row][2][0]
    ours = next((name for name in found if name in ("qeff-proxy", "encoder-onnxruntime")), None)
    ours = ours or next(iter(found))
    base = {clock: statistics.median(found[ours][clock]) for clock in ("wall", "cpu")}
    print(
        f"\n{row}\n{'':22}{'ms':>9}{'a second':>10}{'CPU ms':>9}{'speed':>8}{'by CPU':>8}  tokens"
    )
    summary: dict[str, Any] = {}
    for name, one in found.items():
        wall, cpu = (statistics.median(one[clock]) for clock in ("wall", "cpu"))
        same = "equal" if one["tokens"] == found[ours]["tokens"] else ""
        summary[name] = {
            "ms": round(wall, 2),
            "fastest_ms": round(min(one["wall"]), 2),
            "cpu_ms": round(cpu, 2),
            "a_second": round(1e3 * batch / wall, 2),
            "speed_over_ours": round(base["wall"] / wall, 3),
            "speed_over_ours_by_cpu": round(base["cpu"] / cpu, 3),
            "same_tokens": bool(same),
            **{key: one[key] for key in ("bytes", "compile_again_s") if key in one},
        }
        speed, by_cpu = base["wall"] / wall, base["cpu"] / cpu
        print(
            f"{name:22}{wall:9.2f}{1e3 * batch / wall:10.2f}{cpu:9.2f}{speed:8.2f}{by_cpu:8.2f}"
            f"  {same}",
            flush=True,
        )
    return summary


def main() -> None:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--contenders", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="a folder to keep checkpoints and exports in")
    parser.add_argument("--environments", type=Path, help="where environments of peers are made")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "rounds": args.rounds,
        "rows": {},
    }
    with ExitStack() as stack:
        work = args.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for row in args.rows:
            results["rows"][row] = summarize(row, run_row(row, work, args))
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
