"""The cost of an export: CPU seconds, peak memory and bytes, compared with transformers' exporter.

Each export runs in a new process. Checkpoints have random weights, except the largest, which is a
sparse file of zeros, or with --dense one repeated block of random numbers. Rows to compare are
interleaved; medians and their ratio are printed.

    python benchmarks/export_speed.py                      # all rows
    python benchmarks/export_speed.py --rows depth gpt2 --runs 3 --json export.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    **LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LLAMA_7B = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SLIM = {
    **LLAMA,
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}

#: Row → exports: (label, model type, settings, dtype, exporter).
ROWS: dict[str, list[tuple[str, str, dict[str, Any], str, str]]] = {
    "depth": [
        ("2 layers", "llama", {**SLIM, "num_hidden_layers": 2}, "float32", "qeff-proxy"),
        ("48 layers", "llama", {**SLIM, "num_hidden_layers": 48}, "float32", "qeff-proxy"),
    ],
    "gpt2": [
        ("transformers", "gpt2", {}, "float32", "transformers"),
        ("qeff-proxy", "gpt2", {}, "float32", "qeff-proxy-compile"),
    ],
    "1b": [
        ("transformers", "llama", LLAMA_1B, "float32", "transformers"),
        ("qeff-proxy", "llama", LLAMA_1B, "float32", "qeff-proxy"),
        ("by reference", "llama", LLAMA_1B, "float32", "qeff-proxy-reference"),
    ],
    "7b": [
        ("float32", "llama", LLAMA_7B, "float32", "qeff-proxy"),
        ("by reference", "llama", LLAMA_7B, "float32", "qeff-proxy-reference"),
    ],
}

EXPORTERS = {
    "qeff-proxy": """
from qeff_proxy.export import export_model
from qeff_proxy.load import load_model
from qeff_proxy.plugins import Plugins
loaded = load_model(folder, dtype=dtype)
hooks = Plugins.discover().hooks_for(loaded.model_type)
export = export_model(loaded, hooks, output=output, weights=weights, progress=stage)
stage("exported")
""",
    "transformers": """
import torch
from transformers import AutoModelForCausalLM, AutoConfig
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
stage("tracing")
ids = torch.ones(2, 5, dtype=torch.long)
exported = OnnxExporter().export_for_generation(
    model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, OnnxConfig(dynamic=True)
)
stage("writing")
exported.save_pretrained(output)
stage("exported")
""",
}

#: Also measure a new shape and a second compilation.
AFTERWARDS = ("specializing", "compiling again")
#: After an export: specialize every part to one set of fixed shapes, and compile twice.
AFTER = """
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy_npu.fixed_shapes.specialize import specialize
from qeff_proxy.session.axes import axes_of
stage("specializing")
sizes = {"batch": 1, "query": 32, "past": 96}
for part in export.parts:
    specialize(output / part.file, part, {axis: sizes[axis] for axis in axes_of(part)})
stage("compiling")
compile_export(export, "onnxruntime")
stage("compiling again")
assert compile_export(export, "onnxruntime").was_there
"""

EXPORTERS["qeff-proxy-compile"] = EXPORTERS["qeff-proxy"] + AFTER

PROCESS = """
import json, resource, sys, time
from pathlib import Path
folder, output, dtype, weights = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
#: name, CPU seconds, peak memory, memory that is no file's (MiB), seconds of those in the kernel
stages = []
def stage(name):
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The kernel's ru_maxrss is that of the process that started this one, where that is larger.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    stages.append([
        name, round(used.ru_utime + used.ru_stime, 3), int(peak.split()[1]) // 1024,
        int(own.split()[1]) // 1024, round(used.ru_stime, 3),
    ])
start = time.perf_counter()
{code}
stage("done")
print("RESULT" + json.dumps({{"seconds": time.perf_counter() - start, "stages": stages}}))
"""


def make_checkpoint(
    folder: Path, model_type: str, settings: dict[str, Any], *, dense: bool
) -> None:
    """A checkpoint with random weights; a large one is a file of zeros, or of one block."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) < 2e9:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return
    folder.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + parameter.numel() * 4
        shape = list(parameter.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text))
        if dense:
            block = (torch.randn(1 << 22) * 0.02).numpy().data.cast("B")
            for _ in range(end // len(block)):
                file.write(block)
            file.write(block[: end % len(block)])
            # Drop it from the page cache, so that it is read from the disk.
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # A model of zeros cannot be verified: set the norms and a few rows.
        ones = torch.ones(settings["hidden_size"]).numpy().tobytes()
        for name, entry in header.items():
            if "norm" in name:
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(ones)
        noise = torch.randn(1000, settings["hidden_size"]).numpy().tobytes()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(noise)


def apparent_bytes(folder: Path, *, linked: bool) -> int:
    """Bytes below a folder; files with other hard links count only with ``linked``."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if linked or path.stat().st_nlink == 1)


def run(checkpoint: Path, work: Path, dtype: str, exporter: str) -> dict[str, Any]:
    """Export once; CPU seconds, peak memory in MiB, bytes written over the checkpoint's."""
    output = work / "output"
    kind = exporter.removesuffix("-reference")
    reference = "reference" if exporter.endswith("-reference") else "copy"
    program = PROCESS.format(code=EXPORTERS[kind])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, checkpoint, output, dtype, reference],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise SystemExit(f"{exporter} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    end = next(stage for stage in found["stages"] if stage[0] == "exported")
    found["cpu_seconds"], found["peak_mib"] = end[1], end[2]
    found["after"] = {
        name: round(later[1] - used, 3)
        for (name, used, *_), later in itertools.pairwise(found["stages"])
        if name in AFTERWARDS
    }
    shutil.rmtree(output / "compiled", ignore_errors=True)
    own = apparent_bytes(output, linked=False)
    found["bytes_over_checkpoint"] = own / apparent_bytes(checkpoint, linked=True)
    shutil.rmtree(output)
    return found


def main() -> None:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dense", action="store_true", help="fill the largest checkpoint")
    parser.add_argument("--only", metavar="LABEL", help="of each row only this one")
    parser.add_argument("--work", type=Path, default=None, help="a folder on a disk with space")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": {},
    }
    for row in args.rows:
        with tempfile.TemporaryDirectory(dir=args.work) as name:
            work = Path(name)
            found: dict[str, list[dict[str, Any]]] = {}
            for turn in range(args.runs):
                for label, model_type, settings, dtype, exporter in ROWS[row]:
                    if args.only not in (None, label):
                        continue
                    slug = f"{model_type}-{settings.get('num_hidden_layers', 0)}"
                    checkpoint = work / slug
                    if not checkpoint.exists():
                        make_checkpoint(checkpoint, model_type, settings, dense=args.dense)
                    found.setdefault(label, []).append(run(checkpoint, work, dtype, exporter))
                    print(row, turn, label, json.dumps(found[label][-1]), file=sys.stderr)
        results["rows"][row] = found
        print(f"\n{row}\n{'':16}{'CPU s':>10}{'peak MiB':>12}{'bytes/ckpt':>12}{'CPU ratio':>11}")
        first = None
        for label, runs in found.items():
            cpu, peak, share = (
                statistics.median(one[key] for one in runs)
                for key in ("cpu_seconds", "peak_mib", "bytes_over_checkpoint")
            )
            first = first or cpu
            print(f"{label:16}{cpu:10.1f}{peak:12.0f}{share:12.4f}{cpu / first:11.2f}", flush=True)
            for name in AFTERWARDS:
                times = [one["after"][name] for one in runs if name in one["after"]]
                if times:
                    one = statistics.median(times)
                    print(f"  {name:14}{one:10.3f}{'':35}{one / cpu:.4f} of the export")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
