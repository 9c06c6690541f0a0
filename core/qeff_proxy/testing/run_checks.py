"""Checks of the flow on sessions of every backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array, to_array
from qeff_proxy.backends.compile_export import Compiled, compile_export, open_sessions
from qeff_proxy.backends.registry import list_backends
from qeff_proxy.compare.verdict import describe_verdict
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UsageError
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from qeff_proxy.testing.expectations import expect, expect_same, needs
from qeff_proxy.testing.subject import Run, Subject, global_state, is_arrays
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model

#: Tokens of a chunk; every sample has more.
_CHUNK = 3
_PADDING = 3


class RunChecks:
    """The exported parts, run like users run them, compute what the model computes."""

    def test_onnx_runtime_gives_what_pytorch_gives(self, subject: Subject) -> None:
        """ONNX Runtime and PyTorch agree on every tensor of every part, at every step."""
        reference = subject.run_on(subject.rows[0], sessions=subject.torch_sessions)
        expect(reference.steps, "no part was run", "The flow's run must tell job.recorder.")
        expect_same(
            reference.tensors,
            subject.run.tensors,
            "ONNX Runtime and PyTorch differ",
            "The part's forward does something that the trace does not show.",
            subject.suite.tolerance,
        )

    @needs("cache")
    def test_prefill_and_decode_steps_equal_one_pass(self, subject: Subject) -> None:
        """Steps with a cache lead to the same logits as one pass of the uncut model."""
        logits = subject.run.logits
        expect(
            len(logits) > 1,
            f"{len(logits)} steps gave logits",
            "Let the suite's `settings` ask for several tokens.",
        )
        expected = subject.suite.one_pass(subject.model, subject.rows[0], _fed(subject.run))
        stepwise = np.stack(logits, axis=1)
        expect_same(
            {"logits": expected[:, -stepwise.shape[1] :]},
            {"logits": stepwise},
            "decode steps differ from one pass of the uncut model",
            "Check positions, masks and the order of the cache in the body.",
            subject.suite.tolerance,
        )

    def test_the_input_matters(self, subject: Subject) -> None:
        """Another input leads to another output; otherwise the comparisons mean nothing."""
        other = subject.run_on(subject.suite.other_input(subject.rows[0]))
        first, second = _numbers(subject.run), _numbers(other)
        expect(
            any(
                one.shape != two.shape or np.abs(one - two).max() > 1e-4 * np.abs(one).max()
                for one, two in zip(first, second, strict=False)
            ),
            "two different inputs give the same output",
            "Give the tiny model larger weights, or see whether a part ignores its input.",
        )

    @needs("chunks")
    def test_a_prompt_in_chunks_gives_the_same(self, subject: Subject) -> None:
        """A prefill in chunks of a few tokens equals one at once."""
        options = CompileOptions(batch_size=1, prefill_seq_len=_CHUNK)
        chunked = subject.run_on(subject.rows[0], options=options)
        expect_same(
            _last_steps(subject.run, self._passes(subject.run)),
            _last_steps(chunked, self._passes(subject.run)),
            "a prompt run in chunks gives something else than at once",
            "A chunk sees the cache of those before it: check masks and positions for past > 0.",
            subject.suite.tolerance,
        )

    @staticmethod
    def _passes(run: Run) -> int:
        """The number of passes whose logits choose a token."""
        return len(run.logits)

    @needs("padding")
    def test_padding_changes_nothing(self, subject: Subject) -> None:
        """A row with padding equals the row alone."""
        padded = subject.run_on(subject.suite.pad(subject.rows[0], _PADDING))
        expect_same(
            subject.results_of_row(subject.run, 0, 1),
            subject.results_of_row(padded, 0, 1),
            "padding changes what a row gives",
            "Hide padding by the masks, count positions from the first token, and leave padding "
            "out of pooling.",
            subject.suite.tolerance,
        )

    @needs("batch")
    def test_a_batch_gives_what_its_rows_give_alone(self, subject: Subject) -> None:
        """Rows of a batch do not affect each other."""
        rows = subject.rows
        expect(
            len(rows) > 1, f"there is {len(rows)} row", "Let make_inputs give at least two rows."
        )
        batch = subject.run_on(subject.suite.join(rows))
        for index, row in enumerate(rows):
            expect_same(
                subject.results_of_row(subject.run_on(row), 0, 1),
                subject.results_of_row(batch, index, len(rows)),
                f"row {index} gives something else in a batch than alone",
                "Keep the batch axis dynamic and apart from the others in every part.",
                subject.suite.tolerance,
            )

    def test_two_runs_give_the_same_bits(self, subject: Subject) -> None:
        """A second run has equal results: nothing is random or kept from the first."""
        again = subject.run_on(subject.rows[0])
        expect_same(
            subject.run.tensors,
            again.tensors,
            "the same run again gives something else",
            "Sample only where the user asks for it, and keep no state between runs.",
        )

    def test_a_dump_is_complete_and_can_be_read(self, subject: Subject, tmp_path: Path) -> None:
        """A dump has every tensor of every part's specs, in every step, with their shapes."""
        dump = read_dump(_dump(subject, tmp_path / "dump"))
        held = set(dump.names())
        omitted = {str(one.name) for one in dump.omitted}
        steps = {(step.phase, step.index) for step in dump.steps}
        ran = {(step.phase, step.index) for step in subject.run.steps}
        expect(steps == ran, f"the dump has the steps {steps}", f"The flow ran {ran}.")
        for part in subject.export.parts:
            for side, specs in (("in", part.inputs), ("out", part.outputs)):
                lost = [
                    s.name for s in specs if _dumped(part.name, side, s.name) not in held | omitted
                ]
                expect(
                    not lost,
                    f"the dump lacks {lost[:2]} of the {part.name} part",
                    "The flow's run must tell job.recorder of every run of every part, with all "
                    "inputs and outputs.",
                )

    def test_recorded_inputs_and_outputs_belong_together(self, subject: Subject) -> None:
        """Running a part again on its recorded inputs leads to its recorded outputs."""
        expect(subject.run.steps, "no part was run", "The flow's run must tell job.recorder.")
        for step in subject.run.steps:
            again = subject.sessions[step.part].run(step.inputs)
            expect_same(
                step.outputs,
                {name: again[name] for name in step.outputs},
                f"{step.part} in {step.phase} {step.index} does not give its recorded outputs",
                "Tell job.recorder of the arrays that went in and came out of this very run.",
                subject.suite.tolerance,
            )

    def test_a_stub_is_not_decoded(self, subject: Subject) -> None:
        """Running a stub is an error, because its numbers mean nothing."""
        try:
            subject.run_on(subject.rows[0], kind="stub")
        except UsageError as error:
            said = str(error)
        else:
            said = "nothing"
        expect(
            "stub" in said,
            f"running a stub said {said!r}",
            "Let the flow's run raise UsageError where job.export.kind is 'stub'.",
        )

    def test_a_request_without_input_is_refused(self, subject: Subject) -> None:
        """A request without input is a `UsageError`."""
        for request in (Request(), Request(inputs={})):
            try:
                subject.run_on(None, request=request)
            except UsageError:
                continue
            except Exception as error:  # noqa: BLE001 (whatever a plugin's code raises)
                said = f"raised {type(error).__name__}: {error}"
            else:
                said = "was run"
            expect(
                False,
                f"a request without input {said}",
                "Answer None in preprocess for what you do not take; raise UsageError in the flow "
                "where an input is missing.",
            )

    def test_every_backend_gives_the_same(self, subject: Subject, tmp_path: Path) -> None:
        """Each of the suite's ``backends`` agrees, compiled with fixed sizes if it needs them."""
        expected = _numbers(subject.run)
        for name in subject.suite.backends:
            compiled = compile_export(subject.export, name, subject.suite.compile_options())
            folder = tmp_path / name
            result = _run(subject, compiled, folder)
            expect(
                len(read_dump(folder).steps) > 0,
                f"backend {name} dumped nothing",
                "The flow's run must tell job.recorder.",
            )
            found = [np.asarray(one) for one in _flat(result)]
            for one, two in zip(_flat(subject.run.results), found, strict=True):
                expect_same(
                    {"result": np.asarray(one)},
                    {"result": two},
                    f"backend {name} gives something else than ONNX Runtime",
                    "Run the parts through job.sessions alone, and nothing beside them.",
                    subject.suite.tolerance,
                )
        expect(expected, "the flow gave no numbers", "Return arrays from the flow's run.")

    def test_verify_passes(self, subject: Subject) -> None:
        """``verify`` accepts each backend: every tensor of every layer equals the checkpoint's."""
        installed = [report.name for report in list_backends() if report.state == "listed"]
        results = verify_model(
            subject.stored,
            subject.suite.verified_on or installed,
            request=Request(inputs=subject.rows[0]),
            options=VerifyOptions(
                output=subject.export.folder, taps=subject.suite.taps, max_new_tokens=2
            ),
            hooks=subject.hooks,
        ).results
        for result in results:
            verdict = result.comparison and " ".join(describe_verdict(result.comparison))
            expect(
                result.passed,
                f"verify failed on {result.backend}: {verdict or result.error}",
                "Run qeff-proxy verify on a checkpoint of this depth for the whole report.",
            )

    @needs("processor")
    def test_the_processors_request_becomes_tensors(self, subject: Subject) -> None:
        """``preprocess`` returns tensors by name, and the same ones in each call."""
        request = subject.suite.make_request()
        once = subject.hooks.preprocess(processor=subject.processor, request=request)
        twice = subject.hooks.preprocess(processor=subject.processor, request=request)
        expect(once, "preprocess gave no tensors", "Give them by the names of the graphs' inputs.")
        expect_same(
            {name: to_array(value) for name, value in once.items()},
            {name: to_array(value) for name, value in twice.items()},
            "preprocess gives other tensors when it is called again",
            "Leave the processor's settings as they were.",
        )

    @needs("processor")
    def test_outputs_become_what_the_user_wanted(self, subject: Subject) -> None:
        """``decode`` returns a result for a real run, and can be called without a processor."""
        run = subject.run_on(None, request=subject.suite.make_request())
        decoded = subject.hooks.decode(processor=subject.processor, outputs=run.outputs)
        expect(decoded is not None, "decode gave None", "Turn the flow's outputs into a result.")
        subject.hooks.decode(processor=None, outputs=run.outputs)

    def test_no_global_state_is_left(self, subject: Subject) -> None:
        """The whole flow changes no global state of torch, NumPy, transformers or the process."""
        before = global_state()
        subject.cut_as("split")
        subject.run_on(subject.rows[0])
        after = global_state()
        changed = [name for name in before if before[name] != after[name]]
        # Test fixtures set environment variables between checks.
        exported = {name for name in before if name != "the environment's variables"}
        changed += [name for name in exported if subject.state[name] != after[name]]
        expect(
            not changed,
            f"the flow changed {', '.join(sorted(set(changed)))}",
            "Put back what you change, in a context manager; use generators of your own for "
            "random numbers.",
        )


def _fed(run: Run) -> Array:
    """The token ids that the parts got: ``[1, positions]``."""
    ids = [step.inputs["input_ids"] for step in run.steps if "input_ids" in step.inputs]
    return np.concatenate(ids, axis=1)


def _last_steps(run: Run, count: int) -> dict[str, Any]:
    """The flow's results, and the logits of its last passes; earlier passes were chunks."""
    return {**run.results, "logits": run.logits[-count:]}


def _flat(results: Mapping[str, Any]) -> list[Array]:
    return [
        one for value in results.values() for one in (value if isinstance(value, list) else [value])
    ]


def _numbers(run: Run) -> list[Array]:
    return [one.astype(np.float64) for one in [*_flat(run.results), *run.logits]]


def _dumped(part: str, side: str, name: str) -> str:
    pieces = name.split(".")
    layer = next((piece for piece in pieces if piece.isdigit()), None)
    rest = list(pieces)
    if layer is not None:
        rest.remove(layer)
    return f"{part}.{side}.{'_'.join(rest)}" + (f".layer-{int(layer):02d}" if layer else "")


def _dump(subject: Subject, folder: Path) -> Path:
    _run(subject, compile_export(subject.export), folder)
    return folder


def _run(subject: Subject, compiled: Compiled, folder: Path) -> dict[str, Any]:
    """Run with a dump, and return the flow's arrays."""
    with open_sessions(compiled) as sessions:
        result = run_compiled(
            compiled,
            subject.hooks,
            Request(inputs=subject.rows[0]),
            settings=subject.suite.settings,
            write_io=True,
            io_folder=folder,
            sessions=sessions,
        )
    return {name: value for name, value in result.outputs.items() if is_arrays(value)}
