"""Changes of the process last as long as any thread needs them; one model is loaded at a time."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from qeff_proxy.common.shared_change import SharedChanges, one_model_at_a_time


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_change_is_made_first_and_undone_last(order: tuple[int, ...]) -> None:
    changes, events = SharedChanges(), []

    def make():
        events.append("made")
        return lambda: events.append("undone")

    contexts = [ExitStack() for _ in range(3)]
    for context in contexts:
        context.enter_context(changes.needed("key", make))
    assert events == ["made"]
    for position in order[:2]:
        contexts[position].close()
    assert events == ["made"]
    contexts[order[2]].close()
    assert events == ["made", "undone"]
    with changes.needed("key", make):
        assert events == ["made", "undone", "made"]


def test_changes_of_other_keys_are_others() -> None:
    changes, made = SharedChanges(), []
    with changes.needed("one", lambda: lambda: made.remove(1)):
        made.append(1)
        with changes.needed("two", lambda: lambda: made.remove(2)):
            made.append(2)
        assert made == [1]
    assert made == []


def test_a_change_that_cannot_be_made_is_not_needed() -> None:
    changes = SharedChanges()

    def fail():
        raise OSError("it cannot be made")

    for _ in range(2):
        with pytest.raises(OSError, match="cannot be made"), changes.needed("key", fail):
            pass


def test_threads_take_turns_and_may_nest() -> None:
    running: list[int] = []
    together = threading.Barrier(2)

    @one_model_at_a_time
    def inner(number: int) -> None:
        running.append(number)
        assert running == [number]

    @one_model_at_a_time
    def outer(number: int) -> None:
        inner(number)
        running.remove(number)

    def work(number: int) -> None:
        together.wait(10)
        for _ in range(200):
            outer(number)

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(work, number) for number in range(2)]:
            job.result()
    assert running == []
