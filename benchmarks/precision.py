"""What a recipe recovers, how near greedy search is to exhaustive, and what sensitivity costs.

For each model and precision: the last outputs with everything low and with the recipe for 10% of
the weights, in the simulation and on the backend, and there with everything wide; and in the
simulation the best of all sets within 10%, of the ten modules that lose most alone, and of the ten
such large ones with all small ones wide. ``--memory`` measures the peak memory of
``sensitivity`` on a GPT-2 of 24 layers and 350 million parameters, with random weights, instead.

    python benchmarks/precision.py MODEL --backend onnxruntime --precision int8 int4
    python benchmarks/precision.py --memory
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_proxy.precision.distance import Distance
    from qeff_proxy.precision.run_variants import Variants

BUDGET = 0.1
MOST = 10
SMALL = 0.001
SENTENCES = (
    "Anna went to the market. The weather was sunny, so she wore her straw hat.",
    "Tom saw a big dog in the park, and the dog wanted to play with his ball.",
    "Once there was a little bird who could not fly, but she wanted to see the sea.",
    "Quarterly revenue rose by twelve percent despite weak demand in the north.",
    "She plays the violin in the city's youth orchestra every Sunday evening.",
    "The enzyme catalyses the hydrolysis of the peptide bond in warm water.",
)


def recover(model: str, backend: str, precision: str, calibration: Path) -> dict[str, Any]:
    """Search, exhaust and prove."""
    from qeff_proxy.backends.recipe import Recipe, identity_of
    from qeff_proxy.precision.prepare import prepare
    from qeff_proxy.precision.run_backend import run_backend
    from qeff_proxy.precision.search import Goal, search
    from qeff_proxy.request import Request
    from qeff_proxy.run.calibration import takes_calibration
    from qeff_proxy.verify.options import VerifyOptions

    given = calibration if takes_calibration(backend) and precision != "fp16" else None
    options = VerifyOptions(calibration=given, max_new_tokens=1)
    ready = prepare(
        model, backend, precision, Request(prompts=SENTENCES), options, None,
        trust_remote_code=False, progress=lambda _stage: None,
    )  # fmt: skip
    variants, start = ready.variants, time.process_time()
    found = search(variants, Goal(most_wide=BUDGET), lambda _stage: None)
    seconds = time.process_time() - start
    every = frozenset(variants.units)
    names = sorted(every)
    alone = dict(zip(names, variants.measure([{name} for name in names]), strict=True))
    worst = sorted(names, key=lambda name: alone[name].sqnr)
    small = frozenset(name for name in names if variants.share({name}) < SMALL)
    families = ((frozenset[str](), worst), (small, [one for one in worst if one not in small]))
    sets = [
        first | frozenset(chosen)
        for first, some in families
        for size in range(MOST + 1)
        for chosen in itertools.combinations(some[:MOST], size)
        if variants.share(first | frozenset(chosen)) <= BUDGET
    ]
    best = max(variants.measure([every - one for one in sets]), key=lambda one: one.sqnr)
    source, wide = ready.export.model["source"], tuple(sorted(found.wide))
    recipe = Recipe(source, identity_of(ready.export), backend, precision, wide)
    before, after, above = (
        run_backend(ready, backend, one, lambda _stage: None)
        for one in (None, recipe, replace(recipe, wide=tuple(names)))
    )
    return {
        "model": Path(model).name,
        "backend": backend,
        "precision": precision,
        "wide": list(wide),
        "share": round(found.share, 4),
        "simulated": [round(found.low.sqnr, 1), round(found.distance.sqnr, 1)],
        "exhaustive": [len(sets), round(best.sqnr, 1)],
        "recovered_noise": round(found.recovered or 0, 3),
        "held_noise": round(_held(variants, alone), 3),
        "on_backend": [round(one.sqnr, 1) for one in (before, after, above)],
        "kl_on_backend": [before.kl, after.kl],
        "search": [found.measured, round(seconds)],
    }


def _held(variants: Variants, alone: Mapping[str, Distance]) -> float:
    """The largest share of the noise that modules make alone, of any with 10% of the weights.

    A part of the last module counts in proportion, so it is a bound.
    """

    def density(name: str) -> float:
        return alone[name].noise / max(1e-12, variants.share({name}))

    held, left = 0.0, BUDGET
    for name in sorted(alone, key=density, reverse=True):
        share = variants.share({name})
        part = min(1.0, left / share) if share else 1.0
        held, left = held + part * alone[name].noise, left - part * share
    return held / sum(one.noise for one in alone.values())


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of processes that measure a model: one that exports it, and two after it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    model = GPT2LMHeadModel(config).eval()
    parameters = sum(one.numel() for one in model.parameters())
    model.save_pretrained(folder / "gpt2-24")
    del model
    ids = ",".join(str(7 * n % 50000) for n in range(64))
    command = [sys.executable, __file__, "--once", str(folder / "gpt2-24"), "--ids", ids]
    environment = {**os.environ, "QEFF_HOME": str(folder / "home")}
    runs = []
    for precision in ("int4", "int4", "fp16"):  # the first exports
        done = subprocess.run(
            [*command, "--precision", precision], env=environment, capture_output=True, text=True
        )
        print(done.stderr[-2000:], file=sys.stderr)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {"parameters": parameters, "runs": runs}


def once(model: str, precision: str, ids: str) -> dict[str, Any]:
    """Sensitivity in this process."""
    import numpy as np
    from qeff_proxy.precision import measure_sensitivity
    from qeff_proxy.request import Request

    start = time.process_time()
    row = np.array([[int(one) for one in ids.split(",")]])
    backend = "onnxruntime" if precision.startswith("int") else "qnn"
    found = measure_sensitivity(model, backend, precision, Request(inputs={"input_ids": row}))
    return {
        "precision": precision,
        "low": round(found.low.sqnr, 1),
        "layers": [round(row.low.sqnr, 1) for row in found.layers],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpu_seconds": round(time.process_time() - start),
    }


def main() -> None:
    """Measure and print, a JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--once")
    parser.add_argument("--ids", default="")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once, args.precision[0], args.ids)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory:
            print(json.dumps(memory(folder)))
        calibration = folder / "calibration.txt"
        calibration.write_text("\n".join(reversed(SENTENCES)).replace(" a ", " the "))
        for model, precision in itertools.product(args.models, args.precision):
            print(json.dumps(recover(model, args.backend, precision, calibration)), flush=True)


if __name__ == "__main__":
    main()
