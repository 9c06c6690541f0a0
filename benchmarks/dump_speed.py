"""The cost of a dump in a decode step, and how fast the full form is written to disk.

The tensors have the shapes of GPT2-124M: 12 layers, 12 heads of 64, hidden size 768. The decode
step is not run, only its measured time is used, so that the figure is that of the writer alone.

    python benchmarks/dump_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from qeff_proxy.dump import DumpOptions, DumpWriter

LAYERS, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 12, 12, 64, 768, 50_257

Calls = list[tuple[str, dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]]


def decode_step(past: int, cache: np.ndarray[Any, Any]) -> Calls:
    """Return the inputs and outputs of the three parts in one decode step."""
    hidden = np.ones((1, 1, HIDDEN), np.float32)
    inputs: dict[str, np.ndarray[Any, Any]] = {
        "inputs_embeds": hidden,
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.full((1, 1), past),
    }
    outputs: dict[str, np.ndarray[Any, Any]] = {"last_hidden_state": hidden}
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = cache[:, :, :past].copy()
            outputs[f"present.{layer}.{kind}"] = cache[:, :, : past + 1].copy()
    logits = np.zeros((1, 1, VOCABULARY), np.float32)
    return [
        ("embedding", {"input_ids": np.zeros((1, 1), np.int64)}, {"inputs_embeds": hidden}),
        ("body", inputs, outputs),
        ("lm_head", {"hidden_states": hidden}, {"logits": logits}),
    ]


def time_writer(folder: Path, steps: int, past: int, form: str) -> tuple[list[float], float]:
    """Return the milliseconds of each step, and those of completing the dump."""
    cache = np.random.default_rng(0).standard_normal(
        (1, HEADS, past + steps, HEAD_DIM), dtype=np.float32
    )
    seconds = []
    kv: Any = form
    with DumpWriter(folder, {"model": "benchmark"}, DumpOptions(kv=kv)) as writer:
        for index in range(steps):
            calls = decode_step(past + index, cache)
            start = time.perf_counter()
            for part, inputs, outputs in calls:
                writer.step("decode", index, part, inputs, outputs)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return [1e3 * s for s in seconds], 1e3 * (time.perf_counter() - start)


def time_file_each(folder: Path, steps: int, past: int) -> list[float]:
    """Return the milliseconds of a step with a file for each tensor, a layout not used."""
    cache = np.zeros((1, HEADS, past + steps, HEAD_DIM), np.float32)
    seconds = []
    for index in range(steps):
        calls = decode_step(past + index, cache)
        place = folder / f"decode-{index:04d}"
        start = time.perf_counter()
        place.mkdir(parents=True)
        for part, inputs, outputs in calls:
            for name, array in (inputs | outputs).items():
                if name.startswith("past"):
                    continue
                rows = array[:, :, -1:] if name.startswith("present") else array
                np.save(place / f"{part}.{name}.npy", rows)
        seconds.append(time.perf_counter() - start)
    return [1e3 * s for s in seconds]


def disk_write_speed(folder: Path, size: int) -> float:
    """Return bytes a second of writing one file in megabytes, to the disk."""
    block = np.random.default_rng(0).bytes(1 << 20)
    start = time.perf_counter()
    with (folder / "yardstick").open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())
    return size / (time.perf_counter() - start)


def checksum_ms() -> float:
    """Return the milliseconds of the checksums of one delta step."""
    step = decode_step(0, np.zeros((1, HEADS, 1, HEAD_DIM), np.float32))
    arrays = [a for _, i, o in step for n, a in (i | o).items() if not n.startswith("past")]
    start = time.perf_counter()
    for _ in range(100):
        for array in arrays:
            zlib.crc32(array.data)
    return 10 * (time.perf_counter() - start)


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--full-steps", type=int, default=20)
    parser.add_argument("--decode-ms", type=float, default=50.0, help="of a step without a dump")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        root = Path(work)
        delta, close = time_writer(root / "delta", args.steps, 32, "delta")
        each = time_file_each(root / "each", args.steps, 32)
        start = time.perf_counter()
        full, full_close = time_writer(root / "full", args.full_steps, 1000, "full")
        size = sum(path.stat().st_size for path in (root / "full").rglob("*.npy"))
        full_speed = size / (sum(full) + full_close) * 1e3
        wall = time.perf_counter() - start
        disk = disk_write_speed(root, size)
    mean = statistics.mean(delta)
    report = {
        "delta_ms_a_token": round(mean, 3),
        "delta_median_ms": round(statistics.median(delta), 3),
        "delta_completing_ms": round(close, 1),
        "decode_speed_kept": round(args.decode_ms / (args.decode_ms + mean), 4),
        "crc32_ms_a_token": round(checksum_ms(), 3),
        "file_each_ms_a_token": round(statistics.mean(each), 3),
        "full_bytes": size,
        "full_mb_s_with_fsync": round(full_speed / 1e6),
        "disk_write_mb_s": round(disk / 1e6),
        "share_of_disk_speed": round(full_speed / disk, 2),
        "full_wall_s": round(wall, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
