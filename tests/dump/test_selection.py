from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qeff_proxy.dump import DumpOptions, read_dump
from qeff_proxy.dump.selection import StepSelection
from qeff_proxy.errors import UsageError

_BOUND = st.one_of(st.none(), st.integers(-6, 6))


def select(text: str, total: int) -> list[int]:
    """Choose among ``total`` steps as a writer does, which learns the total at the end."""
    selection = StepSelection.parse(text)
    held: list[int] = []
    kept: list[int] = []
    for number in range(total):
        held.append(number)
        while len(held) > selection.held:
            if selection.keeps_old(oldest := held.pop(0)):
                kept.append(oldest)
    return kept + [n for n in held if selection.keeps_last(n, total)]


@given(_BOUND, _BOUND, st.integers(0, 12))
def test_a_range_selects_what_a_python_slice_does(start, stop, total):
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    try:
        chosen = select(text, total)
    except UsageError:
        assert list(range(100))[start:stop] == []
    else:
        assert chosen == list(range(total))[start:stop]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("first", [0]),
        ("last", [4]),
        ("every:2", [0, 2, 4]),
        ("1:3", [1, 2]),
        ("-2:", [3, 4]),
    ],
)
def test_the_named_selections(text, expected):
    assert select(text, 5) == expected


@pytest.mark.parametrize("text", ["", "some", "every:0", "every:-1", "1:2:3", "3:3", "3:1", "-99:"])
def test_what_selects_nothing_is_refused(text):
    with pytest.raises(UsageError):
        DumpOptions(steps=text)


def test_other_options_are_checked():
    with pytest.raises(UsageError, match="no glob"):
        DumpOptions(tensors=())
    with pytest.raises(UsageError, match="kv is"):
        DumpOptions(kv="rows")
    assert DumpOptions(tensors="body.*").tensors == ("body.*",)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("last", ["decode-0003"]),
        ("first", ["prefill-0000"]),
        ("every:3", ["prefill-0000", "decode-0001"]),
        ("2:4", ["decode-0000", "decode-0001"]),
        ("-3:-1", ["decode-0001", "decode-0002"]),
    ],
)
def test_a_dump_holds_the_selected_steps(make_run, tmp_path, steps, expected):
    run = make_run(tmp_path / "d", steps=steps, kv="full")
    dump = read_dump(run.folder)
    assert [step.label for step in dump.steps] == expected
    for step in dump.steps:
        key = (step.phase, step.index, "body", "out", "present.1.key")
        array = dump.array(step.phase, step.index, "body.out.present_key.layer-01")
        assert array.tobytes() == run.arrays[key].tobytes()


def test_only_the_selected_tensors_are_written(make_run, tmp_path):
    run = make_run(tmp_path / "d", tensors=("*.hidden_states.*", "embedding.in.*"))
    assert read_dump(run.folder).names() == [
        "embedding.in.input_ids",
        "body.out.hidden_states.layer-00",
        "body.out.hidden_states.layer-01",
    ]
