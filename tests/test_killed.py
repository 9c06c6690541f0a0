"""A process killed at any point leaves nothing that is later taken for whole."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import DumpError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled

HOOKS = Plugins.discover().hooks_for("gpt2")
#: fork() copies this process with its libraries loaded, which makes many kills affordable; the
#: children use one thread.
pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


def kill_at_random(
    job: Callable[[Callable[[str], None]], None], from_stage: str, longest: float, seed: int
) -> bool:
    """Run ``job`` in a child and kill it some time after it reaches ``from_stage``.

    Returns:
        Whether it was killed; otherwise it ended before.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)

        def progress(stage: str) -> None:
            if stage == from_stage:
                os.write(write, b"x")

        try:
            job(progress)
        finally:
            os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    time.sleep(random.Random(seed).random() * longest)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture(scope="module")
def checkpoint(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer, since it is exported again and again."""
    folder = tmp_path_factory.mktemp("checkpoint") / "one-layer"
    make_model("gpt2", layers=1).save_pretrained(folder)
    return folder


def test_killing_an_export_leaves_the_old_one_or_the_new_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    kinds: list[Any] = ["split", "whole"]
    old = export_model(load_model(str(checkpoint)), HOOKS, "split", output=target)
    (target / "io" / "run").mkdir(parents=True)
    start = time.perf_counter()
    stages: dict[str, float] = {}
    export_model(
        load_model(str(checkpoint)),
        HOOKS,
        "whole",
        output=tmp_path / "timed",
        progress=lambda stage: stages.setdefault(stage, time.perf_counter() - start),
    )
    writing = time.perf_counter() - start - stages["writing weights"]
    killed = 0
    for attempt in range(12):
        kind = kinds[(attempt + 1) % 2]

        def job(progress: Any, kind: Any = kind) -> None:
            loaded = load_model(str(checkpoint))
            export_model(loaded, HOOKS, kind, output=target, force=True, progress=progress)

        stage = "writing weights" if attempt % 3 else "cutting and verifying"
        killed += kill_at_random(job, stage, writing * 1.3, attempt)
        # The target is whole; or, killed between two renames, not there until the next export.
        if target.exists():
            assert read_export(target).kind in kinds
    assert killed >= 6
    again = export_model(load_model(str(checkpoint)), HOOKS, "split", output=target, force=True)
    assert again.parts == old.parts
    assert (target / "io" / "run").is_dir()
    leftovers = [path.name for path in tmp_path.iterdir() if ".partial-" in path.name]
    assert leftovers == []


def test_killing_a_first_export_leaves_no_export(checkpoint: Path, tmp_path: Path) -> None:
    for attempt in range(4):
        target = tmp_path / f"out-{attempt}"

        def job(progress: Any, target: Path = target) -> None:
            loaded = load_model(str(checkpoint))
            export_model(loaded, HOOKS, "whole", output=target, progress=progress)

        kill_at_random(job, "writing weights", 0.05, attempt)
        if target.exists():
            assert read_export(target).kind == "whole"


def test_killing_a_run_leaves_the_old_dump_or_the_new_one(
    demo_export: Path, tmp_path: Path
) -> None:
    compiled = compile_export(read_export(demo_export), options=CompileOptions(num_cores=1))
    folder = tmp_path / "dump"

    def run(progress: Any, tokens: int = 60) -> None:
        progress("start")
        run_compiled(
            compiled,
            HOOKS,
            Request(inputs={"input_ids": [[5, 6, 7]]}),
            settings={"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1},
            write_io=True,
            io_folder=folder,
        )

    begin = time.perf_counter()
    run(lambda _stage: None, tokens=9)
    run(lambda _stage: None, tokens=60)
    longest = time.perf_counter() - begin
    run(lambda _stage: None, tokens=9)
    killed = 0
    sizes = set()
    for attempt in range(20):
        killed += kill_at_random(run, "start", longest, attempt)
        sizes.add(len(read_dump(folder).steps))
    assert killed >= 5
    assert sizes <= {9, 60}


def test_a_dump_killed_before_it_was_whole_is_none(demo_export: Path, tmp_path: Path) -> None:
    compiled = compile_export(read_export(demo_export), options=CompileOptions(num_cores=1))
    folder = tmp_path / "dump"

    class Killer:
        """A streamer that kills the process at the seventh token."""

        count = 0

        def put(self, _value: Any) -> None:
            self.count += 1
            if self.count == 8:
                os.kill(os.getpid(), signal.SIGKILL)

        def end(self) -> None: ...

    child = os.fork()
    if child == 0:
        try:
            run_compiled(
                compiled,
                HOOKS,
                Request(inputs={"input_ids": [[5, 6, 7]]}),
                settings={"max_new_tokens": 30, "do_sample": False, "streamer": Killer()},
                write_io=True,
                io_folder=folder,
            )
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    (left,) = tmp_path.glob("dump*")
    for place in (folder, left):
        with pytest.raises(DumpError):
            read_dump(place)


def test_a_killed_compilation_is_done_again(demo_export: Path) -> None:
    export = read_export(demo_export)
    options = CompileOptions(ctx_len=77, num_cores=1)
    for attempt in range(5):

        def job(progress: Any) -> None:
            compile_export(export, options=options, force=True, progress=progress)

        kill_at_random(job, "compiling embedding", 0.1, attempt)
        compiled = compile_export(export, options=options)
        with open_sessions(compiled) as sessions:
            assert set(sessions) == {"embedding", "body", "lm_head"}
