"""What the cells of `qeff_proxy.testing.executors` do, by the name of their model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from qeff_proxy.sweep.ledger import Layer
from qeff_proxy.sweep.run_cell import Job, Outcome

_WAITED = 60.0  # seconds that a cell waits for another
_seen: list[str] = []


def run(job: Job) -> Outcome:
    """Do what the model's name says, and return a record of it."""
    model = job.cell.model
    (job.folder / f"{model}.pid").write_text(str(os.getpid()))
    if model.startswith("hangs"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (job.folder / f"{model}.child").write_text(str(child.pid))
        time.sleep(300)
    if model.startswith("dies"):
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if model.startswith("grows"):
        kept = bytearray(os.urandom(1 << 20) * 1500)
        time.sleep(300)
        del kept
    if model.startswith("raises"):
        raise RuntimeError("a defect of the cell")
    if model.startswith("talks"):
        print("x" * (1 << 20), flush=True)
    if model.startswith("pair"):
        end = time.monotonic() + _WAITED
        while len(list(job.folder.glob("pair*.pid"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    _seen.append(model)
    versions = {"seen": ",".join(_seen), "variable": os.environ.get("QEFF_PROXY_TEST", "")}
    layers = [Layer("é layer 0", 1.5e-7, None)]
    return job.record("passed", precision=str(versions), layers=layers, tokens=3), {
        "body.out.x": ["0a1b", 1.0, None]
    }
