"""Which backend is the quickest: measured in turns, and told with what stands against it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.backends.torch.backend import TorchBackend
from qeff_proxy.cli import main
from qeff_proxy.compare import Tolerances
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.request import Request
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.timing import Speed, Timing, take_turns
from qeff_proxy.verify.verify_backend import backends_to_choose_from
from qeff_proxy.verify.verify_model import verify_model

if TYPE_CHECKING:
    from qeff_proxy.verify.results import Verification

ONE_CORE = CompileOptions(num_cores=1)
PROMPT = Request(prompts=("Anna went to the market",))


def quick(**changes: Any) -> VerifyOptions:
    return VerifyOptions(max_new_tokens=3, compile=ONE_CORE, speed=True, turns=2, **changes)


@pytest.fixture
def slow_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """PyTorch's, with a rest before each run, registered as ``slow``."""
    import time

    class Resting:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, feeds: Any) -> Any:
            time.sleep(0.02)
            return self.session.run(feeds)

        def close(self) -> None:
            self.session.close()

    class Slow(TorchBackend):
        def open(self, *args: Any) -> Any:
            return Resting(super().open(*args))

    module = ModuleType("slow_backend")
    module.Slow = Slow  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slow_backend", module)
    monkeypatch.setitem(BUILTIN_BACKENDS, "slow", "slow_backend:Slow")
    return "slow"


@pytest.fixture(scope="module")
def best_run(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``--backend best`` on a checkpoint: what it said, and as JSON."""
    import contextlib
    import io

    home = tmp_path_factory.mktemp("home")
    arguments = ["verify", str(demo_checkpoint), "--backend", "best", "--num-cores", "1"]
    arguments += ["--max-new-tokens", "3", "--turns", "2", "-O", "openvino.precision=float32"]
    said = io.StringIO()
    kept: list[Verification] = []

    def keep(*given: Any, **named: Any) -> Verification:
        kept.append(verify_model(*given, **named))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("QEFF_HOME", str(home))
        patch.setattr(sys.modules[verify_model.__module__], "verify_model", keep)
        code = main(arguments)
    return {"code": code, "out": said.getvalue(), "json": kept[0].to_json(), "home": home}


def test_best_verifies_all_that_can_run_here_and_names_the_quickest(
    best_run: dict[str, Any], demo_checkpoint: Path
) -> None:
    assert best_run["code"] == 0
    found = best_run["json"]
    assert [one["backend"] for one in found["backends"]] == ["onnxruntime", "openvino"]
    speed = found["speed"]
    assert (speed["unit"], speed["amount"]) == ("tokens", 3)
    timed = {one["name"]: one for one in speed["backends"]}
    assert set(timed) == {"onnxruntime", "openvino"}
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in timed.values())
    assert speed["best"] == max(timed, key=lambda name: timed[name]["a_second"])
    assert speed["pytorch"]["a_second"] > 0
    said = best_run["out"]
    assert "tokens a second" in said
    assert "Quickest: " in said
    command = (
        f"    qeff-proxy generate {demo_checkpoint} INPUT --backend {speed['best']} --num-cores 1"
    )
    (line,) = [line for line in said.splitlines() if line.startswith(command)]
    assert ("-O precision=float32" in line) == (speed["best"] == "openvino")


def test_what_is_no_choice_is_said_with_its_reason(best_run: dict[str, Any]) -> None:
    left_out = best_run["json"]["speed"]["left_out"]
    assert "emulator" in left_out["qnn"]
    assert "qaic-compile" in left_out["qaic"]
    assert "Left out: qnn: it runs in HTP's emulator here" in best_run["out"]


def test_speed_is_that_of_the_graphs_without_taps(best_run: dict[str, Any]) -> None:
    exports = [read_export(path.parent) for path in best_run["home"].glob("*/export.json")]
    assert sorted(len(export.settings.get("taps", ())) for export in exports) == [0, 1]
    plain = next(export for export in exports if not export.settings.get("taps"))
    names = {path.name.rpartition("-")[0] for path in (plain.folder / "compiled").iterdir()}
    assert names >= {"onnxruntime", "openvino"}


def test_plain_verify_measures_nothing(demo_export: Path) -> None:
    found = verify_model(demo_export, options=VerifyOptions(max_new_tokens=1))
    assert found.speed is None
    assert "speed" not in found.to_json()


def test_a_slow_backend_is_not_the_quickest(demo_export: Path, slow_backend: str) -> None:
    found = verify_model(demo_export, [slow_backend, "onnxruntime"], PROMPT, quick())
    assert found.speed is not None
    assert found.speed.best is not None
    assert found.speed.best.name == "onnxruntime"
    assert [one.name for one in found.speed.timings] == ["onnxruntime", "slow"]
    assert found.speed.near == []


def test_what_does_not_pass_is_not_measured(demo_export: Path) -> None:
    none = Tolerances.parse(["*.logits=atol:0"])
    found = verify_model(demo_export, ["onnxruntime"], PROMPT, quick(tolerances=none))
    assert found.speed is not None
    assert found.speed.left_out == {"onnxruntime": "it did not pass"}
    assert found.speed.best is None


def test_a_graph_that_is_wrong_only_without_taps_is_not_measured(
    best_run: dict[str, Any], demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs that are measured are held against the reference as those with taps are."""
    import numpy as np

    class Doubled:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, feeds: Any) -> Any:
            return {name: np.array(value) * 2 for name, value in self.session.run(feeds).items()}

        def close(self) -> None:
            self.session.close()

    class Fused(TorchBackend):
        def open(self, export: Any, part: Any, *others: Any) -> Any:
            session = super().open(export, part, *others)
            plain = part.name == "lm_head" and not export.settings.get("taps")
            return Doubled(session) if plain else session

    monkeypatch.setenv("QEFF_HOME", str(best_run["home"]))  # where it is exported already
    module = ModuleType("fused_backend")
    module.Fused = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fused_backend", module)
    monkeypatch.setitem(BUILTIN_BACKENDS, "fused", "fused_backend:Fused")
    limits = Tolerances.parse(["*.hidden_states.*=peak:0.5"])  # of what is there with taps only
    options = quick(tolerances=limits)
    found = verify_model(str(demo_checkpoint), ["fused", "torch"], PROMPT, options)
    assert found.passed
    assert found.speed is not None
    assert found.speed.left_out == {"fused": "without taps it did not pass: lm_head.out.logits"}
    assert [one.name for one in found.speed.timings] == ["torch"]


def test_speeds_within_5_percent_are_said_to_be_equal() -> None:
    def speed(*seconds: float) -> Speed:
        timings = [Timing(f"b{i}", (one,) * 3) for i, one in enumerate(seconds)]
        return Speed(10, "tokens", tuple(timings), Timing("PyTorch", (2.0,)))

    near = speed(1.0, 1.04, 1.06)
    assert near.best is not None
    assert (near.best.name, near.near) == ("b0", ["b1"])
    assert near.over_reference(near.best) == 2
    assert near.rate(near.best) == 10
    assert not near.noisy
    assert Speed(1, "runs", (Timing("a", (1.0, 1.0, 1.5, 2.0, 2.0)),)).noisy


def test_turns_are_taken_in_both_orders_and_a_failure_stops_only_itself() -> None:
    import time

    seen: list[str] = []

    def run(name: str) -> None:
        seen.append(name)
        time.sleep(0.11)

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    found, failed = take_turns({"a": lambda: run("a"), "x": fail, "b": lambda: run("b")}, turns=2)
    assert seen == ["a", "a", "b", "b", "a", "b", "b", "a"]
    assert [len(one.seconds) for one in found.values()] == [2, 2]
    assert list(failed) == ["x"]


def test_the_choice_is_by_what_a_backend_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend

    def untimed(_self: Any, options: CompileOptions) -> str | None:
        return "no such card" if options.num_cores == 1 else None

    monkeypatch.setattr(OnnxRuntimeBackend, "untimed", untimed)
    assert "onnxruntime" in backends_to_choose_from(VerifyOptions().compile_for)[0]
    names, left_out = backends_to_choose_from(lambda _name: ONE_CORE)
    assert "onnxruntime" not in names
    assert left_out["onnxruntime"] == "no such card"


def test_prompts_come_from_a_file_too(demo_export: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Anna went\n\nOne evening\n")
    given = ["verify", str(demo_export), "--max-new-tokens", "1", "--prompt-file"]
    assert main([*given, str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"]["prompts"] == ["Anna went", "One evening"]
    path.write_text("\n")
    assert main([*given, str(path)]) == 2
    assert main([*given, str(tmp_path / "none")]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_turns_are_a_whole_number() -> None:
    with pytest.raises(UsageError, match="turns is 0"):
        VerifyOptions(turns=0)


def test_turns_without_speed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "anything", "--turns", "3"]) == 2
    assert "Ask with --speed" in capsys.readouterr().err
