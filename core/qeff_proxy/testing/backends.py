"""The conformance suite of backends: inherit `BackendSuite` in a test file of a few lines.

::

    from qeff_proxy.testing.backends import BackendSuite


    class TestMyBackend(BackendSuite):
        backend = "my-backend"

pytest runs some twenty checks on a small export made by hand: outputs, dtypes and shapes are those
of the part, an empty past and batches work, nothing is remembered from run to run, the caller owns
what it gets, wrong inputs are refused by name, and sessions do not disturb each other. Each part's
outputs are held against ONNX's reference implementation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.hashes import hash_weights_file, sha256_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.messages import type_named
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, ProxyError
from qeff_proxy.session.session import Session
from qeff_proxy.testing.backend_parts import feeds_of, make_export, unknown_operator
from qeff_proxy.testing.backend_subject import BackendSubject

# A prefill, a decode step, another prefill of another length, a batch.
_SHAPES = (
    {"query": 5, "past": 0},
    {"query": 1, "past": 5},
    {"query": 3, "past": 4},
    {"batch": 3, "query": 4, "past": 0},
    {"batch": 2, "query": 1, "past": 2},
)


class BackendSuite:
    """The checks of one backend.

    Attributes:
        backend: Its name, or its class.
        options: What it is told in `CompileOptions.backend`.
        compile_options: Shapes and cores; the lengths are there for backends of fixed shapes.
        dtypes: Floating dtypes of exports that it takes.
        tolerances: Largest difference of an element, over the largest of its tensor, by dtype.
        integer_bits: Bits that it computes whole numbers with, 64 or 32; 0 where no part may give
            whole numbers.
        reads_graphs: It compiles the exported graphs, and not something of its own.
        same_bits: The same inputs give the same bits.
    """

    backend: ClassVar[str | type[Backend]]
    options: ClassVar[Mapping[str, Any]] = {}
    dtypes: ClassVar[Sequence[str]] = ("float32", "float16")
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "float16": 5e-3}
    integer_bits: ClassVar[int] = 64
    reads_graphs: ClassVar[bool] = True
    same_bits: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> BackendSubject:
        """The export, compiled; shared by all checks of the class."""
        return BackendSubject(cls(), tmp_path_factory.mktemp("backend"))

    # What an author may override

    @property
    def compile_options(self) -> CompileOptions:
        """How the export is compiled."""
        return CompileOptions(prefill_seq_len=8, ctx_len=16, backend=dict(self.options))

    def make_backend(self) -> Backend:
        """A new instance of the backend."""
        return load_backend(self.backend) if isinstance(self.backend, str) else self.backend()

    def make_export(self, folder: Path, dtype: str) -> Export:
        """The export that it is tried on."""
        return make_export(folder, dtype, integer_bits=self.integer_bits)

    # The checks

    def test_it_says_what_it_is(self, subject: BackendSubject) -> None:
        """Versions and options are names and sentences; the versions do not change."""
        versions = subject.backend.versions()
        assert versions
        assert all(isinstance(t, str) and t for item in versions.items() for t in item)
        assert dict(versions) == dict(self.make_backend().versions())
        options = subject.backend.options
        assert all(isinstance(t, str) and t for item in options.items() for t in item)
        assert set(self.options) <= set(options)

    def test_it_leaves_the_export_as_it_is(self, subject: BackendSubject) -> None:
        """Compiling writes into its own folder and nowhere else."""
        export, _ = subject.compiled()
        assert {part.file: sha256_of(export.folder / part.file) for part in export.parts} == {
            part.file: part.sha256 for part in export.parts
        }
        written = {p.name for p in export.folder.iterdir() if p.is_file()}
        named = {*export.files, *(part.file for part in export.parts), "export.json"}
        assert written == named
        for name, digest in export.hashes.items():
            assert hash_weights_file(export.folder / name) == digest

    def test_outputs_are_right(self, subject: BackendSubject) -> None:
        """Names, dtypes, shapes and values, for prefill and decode steps, one session for all."""
        for dtype in self.dtypes:
            for part in subject.parts(dtype):
                reference = subject.reference(part, dtype)
                with subject.session(part, dtype) as session:
                    for sizes in _SHAPES:
                        feeds = feeds_of(part, **sizes)
                        outputs, expected = session.run(feeds), reference.run(feeds)
                        assert list(outputs) == [spec.name for spec in part.outputs], part.name
                        for spec in part.outputs:
                            self._check(spec.name, spec.dtype, outputs, expected)

    def test_an_empty_past_is_no_past(self, subject: BackendSubject) -> None:
        """A cache of no positions gives what the queries alone give, bits and shape."""
        part = _with_cache(subject)
        feeds = feeds_of(part, query=3, past=0)
        assert 0 in feeds[_cache_name(part)].shape
        with subject.session(part) as session:
            outputs = session.run(feeds)
        (present,) = [n for n in outputs if n.startswith("present.0") and n.endswith("key")]
        assert outputs[present].shape[2] == 3
        assert all(np.isfinite(array.astype(np.float64)).all() for array in outputs.values())

    def test_steps_equal_one_pass(self, subject: BackendSubject) -> None:
        """The cache that one run gives goes into the next, and changes nothing in the result."""
        part = _with_cache(subject)
        whole = feeds_of(part, query=4, past=0)
        with subject.session(part) as session:
            expected = session.run(whole)
            outputs: dict[str, Array] = {}
            cache = {name: array for name, array in whole.items() if _is_cache(name)}
            for index in range(4):
                feeds = {n: a[:, index : index + 1] for n, a in whole.items() if not _is_cache(n)}
                for mask in part.masks:
                    feeds[mask.name] = whole[mask.name][:, :, index : index + 1, : index + 1]
                outputs = session.run({**feeds, **cache})
                cache = {
                    name.replace("present.", "past_key_values.", 1): array
                    for name, array in outputs.items()
                    if name.startswith("present.")
                }
        for name, array in outputs.items():
            last = expected[name] if name.startswith("present.") else expected[name][:, -1:]
            self._check(name, str(array.dtype), outputs, {name: last})

    def test_rows_do_not_touch_each_other(self, subject: BackendSubject) -> None:
        """A batch gives what its rows give alone."""
        for part in subject.parts():
            feeds = feeds_of(part, batch=3, query=2, past=0)
            with subject.session(part) as session:
                together = session.run(feeds)
                row = session.run({name: array[1:2] for name, array in feeds.items()})
            for spec in part.outputs:
                rows = {name: array[1:2] for name, array in together.items()}
                self._check(spec.name, spec.dtype, row, rows)

    def test_nothing_is_remembered(self, subject: BackendSubject) -> None:
        """The same inputs give the same, whatever ran between them, and in another session."""
        for part in subject.parts():
            feeds, others = feeds_of(part, query=3, past=0), feeds_of(part, query=4, past=0, seed=1)
            with subject.session(part) as session:
                first = session.run(feeds)
                session.run(others)
                again = session.run(dict(reversed(feeds.items())))
            with subject.session(part) as session:
                elsewhere = session.run(feeds)
            for spec in part.outputs:
                for found in (again, elsewhere):
                    if self.same_bits:
                        np.testing.assert_array_equal(found[spec.name], first[spec.name])
                    self._check(spec.name, spec.dtype, found, first)

    def test_the_caller_owns_the_outputs(self, subject: BackendSubject) -> None:
        """Later runs do not change them, nor does writing into them change later runs."""
        for part in subject.parts():
            feeds = feeds_of(part, query=3, past=0)
            with subject.session(part) as session:
                first = session.run(feeds)
                copies = {name: array.copy() for name, array in first.items()}
                session.run(feeds_of(part, query=3, past=0, seed=1))
                for name, array in first.items():
                    np.testing.assert_array_equal(array, copies[name])
                _check_apart(first, feeds)
                for array in first.values():
                    assert array.flags.writeable
                    array[...] = 7
                again = session.run(feeds)
            for name, array in again.items():
                np.testing.assert_array_equal(array, copies[name])

    def test_the_inputs_stay_as_they_are(self, subject: BackendSubject) -> None:
        """Arrays that may not be written to, or do not lie in one piece, are taken, and kept."""
        for part in subject.parts():
            feeds = feeds_of(part, query=4, past=2)
            kept = {name: array.copy() for name, array in feeds.items()}
            scattered = {}
            for name, array in feeds.items():
                wide = np.repeat(array, 2, axis=1)[:, ::2]
                wide.flags.writeable = False
                scattered[name] = wide
            with subject.session(part) as session:
                expected, found = session.run(feeds), session.run(scattered)
            for name, array in feeds.items():
                np.testing.assert_array_equal(array, kept[name])
            for spec in part.outputs:
                self._check(spec.name, spec.dtype, found, expected)

    def test_wrong_inputs_are_refused(self, subject: BackendSubject) -> None:
        """Each by an error that names the input; the session goes on working."""
        for part in subject.parts():
            feeds = feeds_of(part, query=3, past=0)
            with subject.session(part) as session:
                expected = session.run(feeds)
                for name, wrong in _wrong_feeds(part, feeds):
                    with pytest.raises(BackendError) as caught:
                        session.run(wrong)
                    assert name in str(caught.value), f"{caught.value} does not name {name}"
                again = session.run(feeds)
            for name, array in expected.items():
                np.testing.assert_array_equal(again[name], array)

    def test_a_closed_session_does_not_run(self, subject: BackendSubject) -> None:
        """It says so; closing twice is no error, and other sessions stay open."""
        part = subject.parts()[-1]
        feeds = feeds_of(part, query=2, past=0)
        with subject.session(part) as other, subject.session(part) as session:
            expected = session.run(feeds)
            session.close()
            session.close()
            with pytest.raises(BackendError, match="closed"):
                session.run(feeds)
            found = other.run(feeds)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)

    def test_sessions_run_side_by_side(self, subject: BackendSubject) -> None:
        """Two sessions of a part, and two threads on each, give what each gives alone."""
        part = _with_cache(subject)
        feeds = [feeds_of(part, query=3, past=past, seed=past) for past in (0, 4)]
        with subject.session(part) as one, subject.session(part) as two:
            expected = [one.run(each) for each in feeds]
            jobs = [(session, index) for session in (one, two) for index in (0, 1)]
            results = _in_threads([(session, feeds[index]) for session, index in jobs])
        for (_, index), found in zip(jobs, results, strict=True):
            assert isinstance(found, dict), f"a thread failed: {found}"
            for name, array in expected[index].items():
                np.testing.assert_array_equal(found[name], array)

    def test_an_unknown_operator_is_named(self, tmp_path: Path) -> None:
        """A graph that cannot be compiled is refused with the operator's name."""
        if not self.reads_graphs:
            return
        export = self.make_export(tmp_path / "export", "float32")
        part = next(part for part in export.parts if part.masks)
        unknown_operator(export, part)
        (tmp_path / "compiled").mkdir()
        with pytest.raises(BackendError, match="Nonsense"):
            self.make_backend().compile(export, part, self.compile_options, tmp_path / "compiled")

    def test_a_damaged_graph_is_refused(self, tmp_path: Path) -> None:
        """And what is raised is an error of this package."""
        if not self.reads_graphs:
            return
        export = self.make_export(tmp_path / "export", "float32")
        part = next(part for part in export.parts if part.masks)
        path = export.folder / part.file
        path.write_bytes(path.read_bytes()[:200])
        (tmp_path / "compiled").mkdir()
        with pytest.raises(ProxyError, match=part.name):
            self.make_backend().compile(export, part, self.compile_options, tmp_path / "compiled")

    def _check(
        self, name: str, dtype: str, found: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> None:
        """Hold an output against what it must be."""
        one, two = found[name], expected[name]
        assert isinstance(one, np.ndarray), f"{name} is {type_named(one)}"
        assert one.dtype.name == dtype, f"{name} is {one.dtype}, not {dtype}"
        assert one.shape == two.shape, f"{name} has the shape {one.shape}, not {two.shape}"
        if one.dtype.kind in "iub":
            np.testing.assert_array_equal(one, two, err_msg=name)
            return
        difference = np.abs(one.astype(np.float64) - two.astype(np.float64))
        largest = float(np.abs(two.astype(np.float64)).max(initial=0.0))
        limit = self.tolerances[dtype] * max(largest, 1e-6)
        worst = float(difference.max(initial=0.0))
        assert worst <= limit, f"{name} is off by {worst:.3g}, with {limit:.3g} allowed"


def _is_cache(name: str) -> bool:
    return name.startswith("past_key_values.")


def _cache_name(part: ExportedPart) -> str:
    return next(spec.name for spec in part.inputs if _is_cache(spec.name))


def _with_cache(subject: BackendSubject) -> ExportedPart:
    return next(
        part for part in subject.parts() if any(_is_cache(spec.name) for spec in part.inputs)
    )


def _check_apart(outputs: Mapping[str, Array], feeds: Mapping[str, Array]) -> None:
    """Make sure that no two arrays share memory."""
    arrays = list(outputs.items())
    for index, (name, array) in enumerate(arrays):
        for other, second in (*arrays[index + 1 :], *feeds.items()):
            assert not np.shares_memory(array, second), f"{name} shares memory with {other}"


def _wrong_feeds(
    part: ExportedPart, feeds: Mapping[str, Array]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs that are wrong in one way each, with the name that the error must say."""
    yield "no_such_input", {**feeds, "no_such_input": np.zeros(1, np.float32)}
    for spec in part.inputs:
        array = feeds[spec.name]
        yield spec.name, {name: other for name, other in feeds.items() if name != spec.name}
        other_type = np.float64 if array.dtype.kind != "i" else np.int32
        yield spec.name, {**feeds, spec.name: array.astype(other_type)}
        yield spec.name, {**feeds, spec.name: array[..., None]}
        for axis, size in enumerate(spec.shape):
            if isinstance(size, int):
                wrong = np.concatenate([array, array.take([0], axis)], axis)
                if wrong.shape != array.shape:
                    yield spec.name, {**feeds, spec.name: wrong}
    for mask in part.masks:  # one key more than there are
        array = feeds[mask.name]
        yield mask.name, {**feeds, mask.name: np.concatenate([array, array[..., :1]], -1)}


def _in_threads(jobs: Sequence[tuple[Session, Mapping[str, Array]]]) -> list[Any]:
    """What each session gives, run ten times at once with the others; else what went wrong."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        session, feeds = jobs[index]
        start.wait()
        try:
            runs = [session.run(feeds) for _ in range(10)]
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported)
            results[index] = error
            return
        same = all(np.array_equal(run[name], runs[0][name]) for run in runs for name in run)
        results[index] = runs[0] if same else "its runs differ"

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
