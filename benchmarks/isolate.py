"""How surely and at what cost a faulty operator is named, between two exports of one model.

GPT-2 124M (random weights). In each layer the exponent of one element of the attention's two
projections and the MLP's two is changed by one bit: 48 faults, one at a time, in the body's weights
file. With ``--polygraphy`` the same two graphs also run in ``polygraphy run --onnx-outputs mark
all``, which must be installed with onnxruntime, and time and memory are compared.

    python benchmarks/isolate.py
    python benchmarks/isolate.py --polygraphy --faults 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LAYERS = 12


def export(folder: Path) -> None:
    """A GPT-2 with the published shape, exported with layer taps."""
    import torch
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.load.load_model import wrap_model
    from qeff_proxy.plugins.manager import Plugins
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hooks = Plugins.discover().hooks_for("gpt2")
    model = wrap_model(GPT2LMHeadModel(GPT2Config()).eval())
    export_model(model, hooks, output=folder / "first", taps="layers")


def flip(body: Path, layer: int, kind: str) -> str:
    """Flip one bit of one weight in a file of weights, and return the weight's name."""
    with body.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        (name,) = (n for n in header if n.endswith(f"h.{layer}.{kind}"))
        begin, end = header[name]["data_offsets"]
        element = (end - begin) // 8 * 4 + 8 + size + begin
        file.seek(element)
        bits = int.from_bytes(file.read(4), "little") ^ 1 << 29
        file.seek(element)
        file.write(bits.to_bytes(4, "little"))
    return str(name)


def isolate(first: Path, second: Path) -> dict[str, Any]:
    """Find the fault in this process."""
    from qeff_proxy.artifact.export_folder import read_export
    from qeff_proxy.isolate.between_exports import isolate_between
    from qeff_proxy.request import Request
    from qeff_proxy.verify.options import VerifyOptions

    ids = [[7 + 13 * number for number in range(32)]]
    start = time.perf_counter(), time.process_time()
    fault = isolate_between(
        read_export(first),
        read_export(second),
        Request(inputs={"input_ids": ids}),
        VerifyOptions(max_new_tokens=1),
    )
    weights = [w for cause in fault.causes for o in cause.operators for w in o.weights]
    return {
        "where": fault.where if not fault.healthy else None,
        "operators": sum(len(cause.operators) for cause in fault.causes),
        "weights": weights,
        "wall_s": round(time.perf_counter() - start[0], 2),
        "cpu_s": round(time.process_time() - start[1], 2),
    }


def measured(command: list[str]) -> dict[str, Any]:
    """Wall and CPU seconds and peak memory of a command in a process of its own."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "exit": child.returncode,
    }


def main() -> None:
    """Put the faults in, one at a time, and print what was named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=48)
    parser.add_argument("--polygraphy", metavar="COMMAND", nargs="?", const="polygraphy")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar="EXPORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        export(args.export)
        return
    if args.one:
        print(json.dumps(isolate(*map(Path, args.one))))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own: the peak of a new process begins with that of its parent.
        subprocess.run([sys.executable, __file__, "--export", name], check=True)
        first = Path(name) / "first"
        second = Path(shutil.copytree(first, Path(name) / "second"))
        (weights,) = list(second.glob("body*.safetensors"))
        faults = [(layer, kind) for layer in range(LAYERS) for kind in KINDS][: args.faults]
        named = 0
        for layer, kind in faults:
            flipped = flip(weights, layer, kind)
            if args.polygraphy:
                compare_with_polygraphy(args.polygraphy, first, second)
            found = isolate(first, second)
            place = found["where"] == f"body layer {layer}" and found["operators"] == 1
            right = place and any(flipped.endswith(one) for one in found["weights"])
            named += right
            print(json.dumps({"fault": flipped, "named": right, **found}), flush=True)
            flip(weights, layer, kind)  # the same bit again
        healthy = isolate(first, second)
        print(json.dumps({"faults": len(faults), "named": named, "healthy": healthy}))


def compare_with_polygraphy(command: str, first: Path, second: Path) -> None:
    """Time both tools on the same two graphs, each in new processes."""
    ours = measured([sys.executable, __file__, "--one", str(first), str(second)])
    results = second / "first.json"
    caches = [
        f"past_key_values.{layer}.{one}:[1,12,0,64]"
        for layer in range(LAYERS)
        for one in ("key", "value")
    ]
    sizes = ["inputs_embeds:[1,32,768]", "position_ids:[1,32]", "attention_mask:[1,1,32,32]"]
    run = ["--onnxrt", "--onnx-outputs", "mark", "all", "--input-shapes", *sizes, *caches]
    theirs = [
        measured([command, "run", str(folder / "body.onnx"), *run, option, str(results)])
        for folder, option in ((first, "--save-outputs"), (second, "--load-outputs"))
    ]
    print(json.dumps({"ours": ours, "polygraphy": theirs}), flush=True)


if __name__ == "__main__":
    main()
