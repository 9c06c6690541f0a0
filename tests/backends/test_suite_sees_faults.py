"""Each check of the suite, on a backend that is made wrong for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.errors import BackendError
from qeff_proxy.testing.backend_subject import BackendSubject
from qeff_proxy.testing.backends import BackendSuite


class Wrong(OnnxRuntimeBackend):
    """ONNX Runtime, right in all but what a fault changes."""


class WrongSession:
    """A session around a right one."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.kept: dict[str, Any] = {}

    def run(self, feeds: Any) -> Any:
        return self.session.run(feeds)

    def close(self) -> None:
        self.session.close()


def with_session(change: type[WrongSession]) -> type[Wrong]:
    class Changed(Wrong):
        def open(self, *arguments: Any) -> Any:
            return change(super().open(*arguments))

    return Changed


class OtherDtype(WrongSession):
    def run(self, feeds: Any) -> Any:
        return {name: array.astype(np.float64) for name, array in super().run(feeds).items()}


class OtherOrder(WrongSession):
    def run(self, feeds: Any) -> Any:
        return dict(reversed(super().run(feeds).items()))


class SlightlyOff(WrongSession):
    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        for array in found.values():
            array += np.asarray(np.abs(array).max(initial=0) * 3e-5, array.dtype)
            if array.dtype.kind == "i":
                array += 1
        return found


class PadsThePast(WrongSession):
    """Takes a row of zeros for an empty past, and gives it back."""

    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        for name, array in found.items():
            if name.startswith("present.") and feeds["past_key_values.0.key"].shape[2] == 0:
                found[name] = np.pad(array, ((0, 0), (0, 0), (1, 0), (0, 0)))
        return found


class ForgetsThePast(WrongSession):
    def run(self, feeds: Any) -> Any:
        past = {n: a for n, a in feeds.items() if n.startswith("past_key_values.")}
        return super().run({**feeds, **{name: np.zeros_like(a) for name, a in past.items()}})


class OneRow(WrongSession):
    """Gives every row of a batch what the first gives."""

    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        return {name: np.repeat(a[:1], len(a), 0) for name, a in found.items()}


class Remembers(WrongSession):
    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        for name, array in found.items():
            before = self.kept.get(name, 0)
            self.kept[name] = array.flat[0].copy() if array.size else 0
            array += np.asarray(before, array.dtype)
        return found


class SameBuffer(WrongSession):
    """Gives the same arrays again where the shapes allow."""

    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        for name, array in found.items():
            if name in self.kept and self.kept[name].shape == array.shape:
                self.kept[name][...] = array
            else:
                self.kept[name] = array
        return dict(self.kept)


class GivesInputsBack(WrongSession):
    """An output that is a view of an input, as an optimizer of copies may leave it."""

    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        return {**found, **({"numbers_again": feeds["numbers"]} if "numbers" in feeds else {})}


class WritesToInputs(WrongSession):
    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        for array in feeds.values():
            if array.flags.writeable:
                array[...] = 0
        return found


class WantsOnePiece(WrongSession):
    """Reads the memory as if it lay in one piece."""

    def run(self, feeds: Any) -> Any:
        pieces = {}
        for name, array in feeds.items():
            whole = array if array.flags.c_contiguous or array.base is None else array.base
            pieces[name] = whole.reshape(-1)[: array.size].reshape(array.shape)
        return super().run(pieces)


class TakesAnything(WrongSession):
    """Drops what it does not know and casts what is of another dtype."""

    def run(self, feeds: Any) -> Any:
        part = self.session._part
        known = {s.name: feeds[s.name].astype(s.dtype) for s in part.inputs if s.name in feeds}
        return super().run(known)


class NamesNothing(WrongSession):
    def run(self, feeds: Any) -> Any:
        try:
            return super().run(feeds)
        except BackendError:
            raise BackendError("something is wrong") from None


class BreaksAfterAnError(WrongSession):
    def run(self, feeds: Any) -> Any:
        try:
            return super().run(feeds)
        except BackendError:
            self.close()
            raise


class NeverClosed(WrongSession):
    def close(self) -> None:
        pass


class ClosesOnce(WrongSession):
    def close(self) -> None:
        self.session._session.get_inputs()  # fails on what is closed
        super().close()


class Shared(WrongSession):
    """All threads and sessions feed through one place."""

    place: dict[str, Any] = {}  # noqa: RUF012 (the fault)

    def run(self, feeds: Any) -> Any:
        import time

        self.place.clear()
        self.place.update(feeds)
        time.sleep(0.002)
        return super().run(dict(self.place))


class NoVersion(Wrong):
    def versions(self) -> Any:
        return {"wrong": ""}


class OtherVersions(Wrong):
    count = 0

    def versions(self) -> Any:
        type(self).count += 1
        return {"wrong": str(self.count)}


class NoMeaning(Wrong):
    options = {"optimization": ""}  # noqa: RUF012


class WritesIntoTheExport(Wrong):
    def compile(self, export: Any, part: Any, options: Any, folder: Any) -> None:
        super().compile(export, part, options, folder)
        (export.folder / "cache.bin").write_bytes(b"mine")


class KnowsItsPath(Wrong):
    """Writes down where it compiled."""

    def compile(self, export: Any, part: Any, options: Any, folder: Any) -> None:
        super().compile(export, part, options, folder)
        (folder / f"{part.name}.path").write_text(str(folder / f"{part.name}.onnx"))

    def open(self, export: Any, part: Any, options: Any, folder: Any) -> Any:
        from pathlib import Path

        if not Path((folder / f"{part.name}.path").read_text()).is_file():
            raise BackendError("what was compiled is gone")
        return super().open(export, part, options, folder)


class CompilesLater(Wrong):
    """Finds out what is wrong when it opens."""

    def compile(self, export: Any, part: Any, options: Any, folder: Any) -> None:
        pass


class RaisesItsOwn(Wrong):
    def compile(self, export: Any, part: Any, options: Any, folder: Any) -> None:
        try:
            super().compile(export, part, options, folder)
        except BackendError:
            raise RuntimeError("error 17") from None


FAULTS: list[tuple[str, type[Wrong]]] = [
    ("test_it_says_what_it_is", NoVersion),
    ("test_it_says_what_it_is", OtherVersions),
    ("test_it_says_what_it_is", NoMeaning),
    ("test_it_leaves_the_export_as_it_is", WritesIntoTheExport),
    ("test_outputs_are_right", KnowsItsPath),
    ("test_outputs_are_right", with_session(OtherDtype)),
    ("test_outputs_are_right", with_session(OtherOrder)),
    ("test_outputs_are_right", with_session(SlightlyOff)),
    ("test_an_empty_past_is_no_past", with_session(PadsThePast)),
    ("test_steps_equal_one_pass", with_session(ForgetsThePast)),
    ("test_rows_do_not_touch_each_other", with_session(OneRow)),
    ("test_nothing_is_remembered", with_session(Remembers)),
    ("test_the_caller_owns_the_outputs", with_session(SameBuffer)),
    ("test_the_caller_owns_the_outputs", with_session(GivesInputsBack)),
    ("test_the_inputs_stay_as_they_are", with_session(WritesToInputs)),
    ("test_the_inputs_stay_as_they_are", with_session(WantsOnePiece)),
    ("test_wrong_inputs_are_refused", with_session(TakesAnything)),
    ("test_wrong_inputs_are_refused", with_session(NamesNothing)),
    ("test_wrong_inputs_are_refused", with_session(BreaksAfterAnError)),
    ("test_a_closed_session_does_not_run", with_session(NeverClosed)),
    ("test_a_closed_session_does_not_run", with_session(ClosesOnce)),
    ("test_sessions_run_side_by_side", with_session(Shared)),
    ("test_an_unknown_operator_is_named", CompilesLater),
    ("test_an_unknown_operator_is_named", RaisesItsOwn),
    ("test_a_damaged_graph_is_refused", RaisesItsOwn),
]


def check_of(name: str, backend: type[Any], folder: Path) -> Callable[[], None]:
    class Suite(BackendSuite):
        pass

    Suite.backend = backend
    check = getattr(Suite(), name)
    if "tmp_path" in check.__annotations__:
        return lambda: check(folder)
    return lambda: check(BackendSubject(Suite(), folder))


@pytest.mark.parametrize(("check", "backend"), FAULTS)
def test_a_wrong_backend_fails_its_check(check: str, backend: type[Wrong], tmp_path: Path) -> None:
    check_of(check, OnnxRuntimeBackend, _made(tmp_path, "right"))()
    with pytest.raises(
        (AssertionError, pytest.fail.Exception, BackendError, RuntimeError, AttributeError)
    ):
        check_of(check, backend, _made(tmp_path, "wrong"))()


def _made(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def test_every_check_has_a_fault() -> None:
    checks = {name for name in dir(BackendSuite) if name.startswith("test_")}
    assert {name for name, _ in FAULTS} == checks
