"""Whatever is done to a dump, the reader refuses it or gives the arrays that were written."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import DumpError

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**53, 2**64, 10**30, 0.5, "", "..", "/", "in", "out", "decode", "|O"]),
    st.text(max_size=6),
    st.lists(st.integers(-1, 9), max_size=3),
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=3),
    st.builds(dict),
)


def places(value, path=()):
    """Yield the path of every value in a JSON document."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    else:
        items = ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def read_all(folder):
    """Read every record of a dump, or None when it is refused."""
    try:
        dump = read_dump(folder)
        return {
            (step.phase, step.index, str(name)): tensor.read(record)
            for (_, name), tensor in dump.tensors.items()
            for record, step in enumerate(dump.steps[p] for p in tensor.index.positions)
        }
    except DumpError:
        return None


def copied(run, work):
    shutil.copytree(run.folder, work / "d")
    return work / "d"


CHANGES = st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "delete", "double"]), VALUES)


@settings(max_examples=250)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_any_change_of_the_manifest_is_refused_or_harmless(delta_run, changes):
    manifest = json.loads((delta_run.folder / "manifest.json").read_text())
    for where, action, value in changes:
        paths = [path for path in places(manifest) if path]
        path = paths[where % len(paths)]
        parent = manifest
        for key in path[:-1]:
            parent = parent[key]
        if action == "delete":
            del parent[path[-1]]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(value)
    with tempfile.TemporaryDirectory() as work:
        folder = copied(delta_run, Path(work))
        (folder / "manifest.json").write_text(json.dumps(manifest))
        arrays = read_all(folder)
    if arrays is not None:  # only what is said about the arrays may have changed
        known = {a.tobytes() for a in read_all(delta_run.folder).values()}
        assert all(array.tobytes() in known for array in arrays.values())


@settings(max_examples=150)
@given(st.data())
def test_any_change_of_a_file_is_refused(delta_run, data):
    files = sorted(p.relative_to(delta_run.folder) for p in delta_run.folder.rglob("*.npy"))
    name = data.draw(st.sampled_from(files))
    content = bytearray((delta_run.folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if change == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif change == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    with tempfile.TemporaryDirectory() as work:
        folder = copied(delta_run, Path(work))
        (folder / name).write_bytes(content)
        assert read_all(folder) is None


@settings(max_examples=100)
@given(st.binary(max_size=300), st.integers(0, 2000), st.integers(0, 300))
def test_any_bytes_as_a_manifest_are_refused(delta_run, noise, at, length):
    original = (delta_run.folder / "manifest.json").read_bytes()
    changed = original[:at] + noise + original[at + length :]
    with tempfile.TemporaryDirectory() as work:
        folder = copied(delta_run, Path(work))
        (folder / "manifest.json").write_bytes(changed)
        arrays = read_all(folder)
    assert arrays is None or all(isinstance(a, np.ndarray) for a in arrays.values())
