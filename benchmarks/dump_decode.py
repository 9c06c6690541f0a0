"""The cost of dumps in the real decode loop: a random GPT-2 of 124M parameters on ONNX Runtime.

Within a run, steps with and without a dump alternate (off, on, on, off …), so that other load
affects both alike; runs alternate between the delta form and the full form. The time of a step is
the time from one token to the next. Prints ratios of medians over all steps, their spread over the
runs, and the time inside the writer.

    python benchmarks/dump_decode.py
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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions, DumpWriter
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.load.load_model import load_config, wrap_model
from qeff_proxy.plugins.manager import Plugins

FORMS: tuple[Literal["delta", "full"], ...] = ("delta", "full")
_WARM_UP = 8  # steps that are not measured
_TURNS = (False, True, True, False)  # neither kind always follows the other


class Alternating:
    """A recorder that dumps some decode steps, and a streamer that measures the time of each."""

    def __init__(self, writer: DumpWriter) -> None:
        self.writer = writer
        self.times: list[float] = []
        self.inside: dict[int, float] = {}

    def step(
        self, phase: Any, index: int, part: str, inputs: Any, outputs: Any, **how: Any
    ) -> None:
        """Dump the part, if it is the step's turn."""
        if phase == "prefill" or _TURNS[index % len(_TURNS)]:
            start = time.perf_counter()
            self.writer.step(phase, index, part, inputs, outputs, **how)
            spent = time.perf_counter() - start
            self.inside[index] = self.inside.get(index, 0.0) + 1e3 * spent

    def put(self, _value: Any) -> None:
        """Record the time, first for the prompt, then for each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: no token is buffered."""

    def result(self) -> dict[str, list[float]]:
        """Milliseconds of the steps without and with a dump, and inside the writer."""
        steps = [1e3 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        steps = steps[_WARM_UP:]
        turns = [_TURNS[(index + _WARM_UP) % len(_TURNS)] for index in range(len(steps))]
        return {
            "off": [ms for ms, on in zip(steps, turns, strict=True) if not on],
            "on": [ms for ms, on in zip(steps, turns, strict=True) if on],
            "writer": [ms for index, ms in self.inside.items() if index >= _WARM_UP],
        }


def make_model(layers: int) -> Any:
    """Create a GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(  # noqa: SLF001 (what the auto classes call)
        GPT2Config(n_layer=layers), attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def timed(compiled: Any, ids: Any, tokens: int, form: Any, folder: Path) -> dict[str, Any]:
    """Generate once, dumping every other step; return milliseconds."""
    export = compiled.export
    dumped = DumpWriter(folder / form, {"model": "benchmark"}, DumpOptions(kv=form))
    with open_sessions(compiled) as sessions, dumped as writer:  # closed first, and timed
        clock = Alternating(writer)
        job = Job(
            export=export,
            sessions=sessions,
            options=compiled.options,
            config=load_config(export.processor_folder),
            tensors={"input_ids": ids},
            folder=export.processor_folder,
            settings={"max_new_tokens": tokens, "do_sample": False, "streamer": clock},
            recorder=clock,
        )
        load_flow(export.flow).run(job)
        end = time.perf_counter()
    return {**clock.result(), "completing": 1e3 * (time.perf_counter() - end)}


def summed_up(runs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The figures of one form."""
    pooled = {
        what: statistics.median([ms for run in runs for ms in run[what]])
        for what in ("off", "on", "writer")
    }
    kept = [statistics.median(run["off"]) / statistics.median(run["on"]) for run in runs]
    files = list((folder / "decode").glob("*.npy"))
    dumped = len(runs[-1]["writer"]) + sum(_TURNS[i % len(_TURNS)] for i in range(_WARM_UP))
    return {
        "off_median_ms": round(pooled["off"], 2),
        "on_median_ms": round(pooled["on"], 2),
        "speed_kept": round(pooled["off"] / pooled["on"], 4),
        "speed_kept_by_run": [round(ratio, 3) for ratio in sorted(kept)],
        "writer_median_ms": round(pooled["writer"], 2),
        "speed_kept_by_writer_time": round(pooled["off"] / (pooled["off"] + pooled["writer"]), 4),
        "mb_a_token": round(sum(path.stat().st_size for path in files) / 1e6 / dumped, 3),
        "completing_ms": round(statistics.median([run["completing"] for run in runs]), 1),
    }


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate in a run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each form")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--taps", default="", help="such as layers")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        root = Path(work)
        loaded = wrap_model(make_model(args.layers))
        hooks = Plugins.discover().hooks_for(loaded.model_type)
        export = export_model(loaded, hooks, output=root / "export", taps=args.taps)
        compiled = compile_export(export, options=CompileOptions(num_cores=args.cores))
        rows = export.settings["embedding_rows"]
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, rows, (1, args.prompt)))
        del loaded
        runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        for _ in range(args.runs):
            for form in FORMS:
                runs[form].append(timed(compiled, ids, args.tokens, form, root))
        report: dict[str, Any] = {form: summed_up(runs[form], root / form) for form in FORMS}
    report |= {"layers": args.layers, "taps": args.taps, "prompt": args.prompt}
    report |= {"tokens": args.tokens, "runs": args.runs}
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {args.cores} used"
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
