"""How fast two dumps are compared, and in how much memory.

Writes a reference and a candidate with noise in every element, measures how fast the disk reads
their files, then compares them in a new process. The page cache is dropped before each read.

    python benchmarks/compare_speed.py --gigabytes 10 --form full
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from qeff_proxy.dump import DumpOptions, DumpWriter

LAYERS, HEADS, HEAD_DIM, HIDDEN = 12, 12, 64, 768

COMPARE = """
import json, resource, sys, time
from qeff_proxy.compare import compare_dumps
before = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
result = compare_dumps(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([seconds, cpu, int(status["VmHWM"].split()[0]) / 1024,
                  result.passed, len(result.tensors)]))
"""


def write_dump(folder: Path, gigabytes: float, form: str, noise: float) -> None:
    """Write a dump of about ``gigabytes``: whole caches, or the rows of single steps."""
    rows = 256 if form == "full" else 1
    rng = np.random.default_rng(0)
    base = rng.standard_normal(1 << 22, dtype=np.float32)
    error = np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32) * noise
    values = base + error
    size = HEADS * rows * HEAD_DIM
    a_step = 4 * (2 * LAYERS * size + (LAYERS + 1) * HIDDEN * (rows if form == "full" else 1))
    with DumpWriter(folder, {"model": "benchmark"}, DumpOptions(kv="full")) as writer:
        for step in range(int(gigabytes * 1e9 / a_step)):
            at = (step * 7919) % (1 << 20)
            outputs = {}
            for layer in range(LAYERS):
                begin = at + layer * 1000
                piece = values[begin : begin + size].reshape(1, HEADS, rows, HEAD_DIM)
                outputs[f"present.{layer}.key"] = piece
                outputs[f"present.{layer}.value"] = piece
                hidden = values[begin : begin + HIDDEN * rows].reshape(1, rows, HIDDEN)
                outputs[f"hidden_states.{layer}"] = hidden
            outputs["last_hidden_state"] = hidden
            writer.step("decode", step, "body", {}, outputs)


def drop_cache(folder: Path) -> int:
    """Drop the files from the page cache; return their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += path.stat().st_size
    return total


def read_files(folder: Path) -> None:
    """Read every file once, a megabyte at a time."""
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*.npy"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each of the two dumps")
    parser.add_argument("--form", choices=("full", "delta"), default="full")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folders = [Path(work) / "reference", Path(work) / "candidate"]
        for folder, noise in zip(folders, (0.0, 1e-6), strict=True):
            write_dump(folder, args.gigabytes, args.form, noise)
        size = sum(drop_cache(folder) for folder in folders)
        start = time.perf_counter()
        for folder in folders:
            read_files(folder)
        read_seconds = time.perf_counter() - start
        for folder in folders:
            drop_cache(folder)
        command = [sys.executable, "-c", COMPARE, *map(str, folders)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, cpu, peak, passed, tensors = json.loads(done.stdout)
        warm = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    report = {
        "form": args.form,
        "bytes_both": size,
        "tensors": tensors,
        "passed": passed,
        "disk_read_mb_s": round(size / read_seconds / 1e6),
        "compare_mb_s": round(size / seconds / 1e6),
        "compare_cached_mb_s": round(size / warm[0] / 1e6),
        "share_of_disk_speed": round(read_seconds / seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(peak),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
