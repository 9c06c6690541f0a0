from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from qeff_proxy.dump import DumpOptions, DumpWriter, read_dump
from qeff_proxy.errors import DumpError


def write(folder, *steps, options=None, **keywords):
    """Write decode steps of the part ``body``, each (inputs, outputs)."""
    with DumpWriter(folder, {"model": "m"}, options or DumpOptions()) as writer:
        for index, (inputs, outputs) in enumerate(steps):
            writer.step("decode", index, "body", inputs, outputs, **keywords)
    return read_dump(folder)


@pytest.mark.parametrize("form", ["delta", "full"])
def test_every_tensor_of_every_step_comes_back_whole(form, request):
    run = request.getfixturevalue(f"{form}_run")
    dump = read_dump(run.folder)
    from qeff_proxy.dump.format import name_tensor

    assert len(run.arrays) == 6 * (2 + 2 + 4 + 3 + 4)
    for (phase, index, part, side, graph_name), array in run.arrays.items():
        read = dump.array(phase, index, name_tensor(part, side, graph_name))
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_files_are_plain_npy_that_numpy_alone_reads(delta_run):
    rows = np.load(delta_run.folder / "decode" / "body.out.present_key.layer-01.npy")
    assert rows.shape == (4, 1, 3, 1, 4)
    whole = delta_run.arrays["decode", 2, "body", "out", "present.1.key"]
    np.testing.assert_array_equal(rows[2], whole[:, :, -1:])
    masks = np.load(delta_run.folder / "decode" / "body.in.attention_mask.npy")
    assert masks.shape == (7 + 8 + 9 + 10,)


def test_the_number_of_files_does_not_grow_with_the_steps(delta_run, make_run, tmp_path):
    more = make_run(tmp_path / "more", decode=30)
    count = [sum(1 for _ in folder.rglob("*.npy")) for folder in (delta_run.folder, more.folder)]
    assert count[0] == count[1]


def test_the_delta_form_leaves_out_cache_inputs_and_says_so(delta_run, full_run):
    manifest = json.loads((delta_run.folder / "manifest.json").read_text())
    omitted = {entry["name"]: entry["rows_of"] for entry in manifest["omitted"]}
    past = "body.in.past_key_values_key.layer-01"
    assert omitted[past] == "body.out.present_key.layer-01"
    assert not list(delta_run.folder.rglob(f"{past}.npy"))
    assert list(full_run.folder.rglob(f"{past}.npy"))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.array(3.5, np.float64),
        np.zeros((2, 0, 3), np.float32),
        np.array([True, False]),
        np.arange(24, dtype=np.int8).reshape(2, 3, 4).transpose(2, 0, 1),
        np.asfortranarray(np.arange(6, dtype=np.uint32).reshape(2, 3)),
        np.arange(5, dtype=">f4"),
        np.arange(4).astype(ml_dtypes.bfloat16),
        np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        np.array([np.nan, np.inf, -0.0], np.float32),
    ],
    ids=lambda a: f"{a.dtype}-{a.ndim}",
)
def test_any_shape_layout_and_dtype_survives(tmp_path, array):
    dump = write(tmp_path / "d", ({"x": array}, {"y": array}))
    read = dump.array("decode", 0, "body.out.y")
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.tobytes() == array.astype(read.dtype).tobytes()


def test_bits_are_given_their_true_dtype(tmp_path):
    values = np.array([1.0, -2.5], ml_dtypes.bfloat16)
    step = ({"x": values.view(np.uint16)}, {})
    dump = write(tmp_path / "d", step, true_dtypes={"x": "bfloat16"})
    read = dump.array("decode", 0, "body.in.x")
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)
    assert np.load(tmp_path / "d" / "decode" / "body.in.x.npy").dtype == np.uint16


@pytest.mark.parametrize(
    ("array", "true"),
    [
        (np.zeros(2, np.uint16), "float32"),
        (np.zeros(2, np.float16), "bfloat16"),
        (np.zeros(2, np.complex64), None),
        (np.array(["a"]), None),
        (np.array([object()]), None),
        (np.zeros(2, np.uint8), "float3"),
    ],
)
def test_a_dtype_that_cannot_be_dumped_is_refused(tmp_path, array, true):
    with pytest.raises(DumpError, match=r"body\.in\.x of decode-0000"):
        write(tmp_path / "d", ({"x": array}, {}), true_dtypes={"x": true} if true else None)
    assert list(tmp_path.iterdir()) == []


def test_arrays_may_be_reused_after_the_call(tmp_path):
    buffer = np.zeros(3, np.float32)
    with DumpWriter(tmp_path / "d", {}, DumpOptions(steps="-2:")) as writer:
        for index in range(4):
            buffer[:] = index
            writer.step("decode", index, "body", {"x": buffer}, {})
    dump = read_dump(tmp_path / "d")
    assert [float(dump.array("decode", i, "body.in.x")[0]) for i in (2, 3)] == [2.0, 3.0]


def test_cross_attention_inputs_that_do_not_change_are_written_once(tmp_path):
    rng = np.random.default_rng(0)
    cross, other = (rng.standard_normal((1, 2, 50, 4), dtype=np.float32) for _ in range(2))
    inputs = [cross, cross, cross.copy(), other, other]
    dump = write(tmp_path / "d", *[({"cross_past_key_values.0.key": x}, {}) for x in inputs])
    name = "body.in.cross_past_key_values_key.layer-00"
    assert np.load(tmp_path / "d" / "decode" / f"{name}.npy").shape == (2, 1, 2, 50, 4)
    for index, array in enumerate(inputs):
        np.testing.assert_array_equal(dump.array("decode", index, name), array)


def test_rows_of_a_cache_of_fixed_size_begin_at_past_length(tmp_path):
    cache = np.arange(10, dtype=np.float32).reshape(1, 1, 10, 1)
    step = (
        {"inputs_embeds": np.zeros((1, 2, 4)), "past_key_values.0.key": cache},
        {"present.0.key": cache + 100},
    )
    dump = write(tmp_path / "d", step, past_length=5)
    rows = dump.written("decode", 0, "body.out.present_key.layer-00")
    assert rows.ravel().tolist() == [105, 106]
    with pytest.raises(DumpError, match="Pass past_length"):
        write(tmp_path / "e", step)


def test_a_window_of_the_cache_has_its_new_rows_at_its_end(tmp_path):
    window = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    step = ({"inputs_embeds": np.zeros((1, 1, 4))}, {"present.0.key": window})
    dump = write(tmp_path / "d", step, past_length=9)
    assert dump.written("decode", 0, "body.out.present_key.layer-00").ravel().tolist() == [3]
    assert dump.steps[0].past_length == 9


def test_rows_that_were_not_dumped_cannot_be_put_together(make_run, tmp_path):
    run = make_run(tmp_path / "d", steps="2:")
    with pytest.raises(DumpError, match="Dump all steps"):
        read_dump(run.folder).array("decode", 1, "body.out.present_key.layer-00")


def test_more_tensors_than_files_may_be_open(tmp_path):
    arrays = {f"hidden_states.{n}": np.full(2, n, np.float32) for n in range(600)}
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    dump = write(tmp_path / "d", *[({}, arrays) for _ in range(3)])
    # Fewer where other tests' files were closed meanwhile.
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before
    assert dump.array("decode", 2, "body.out.hidden_states.layer-599").tolist() == [599, 599]


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([("decode", 0), ("decode", 1), ("decode", 0)], "already written"),
        ([("warmup", 0)], "is not a step"),
        ([("decode", -1)], "is not a step"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path, calls, problem):
    def run():
        with DumpWriter(tmp_path / "d", {}) as writer:
            for phase, index in calls:
                writer.step(phase, index, "body", {"x": np.zeros(1)}, {})

    with pytest.raises(DumpError, match=problem):
        run()
    assert list(tmp_path.iterdir()) == []


def test_two_graph_tensors_of_one_name_are_refused(tmp_path):
    arrays = {"present.0.key": np.zeros((1, 1, 1, 1)), "present.key.0": np.zeros((1, 1, 1, 1))}
    with pytest.raises(DumpError, match=r"both named body\.in\.present_key\.layer-00"):
        write(tmp_path / "d", (arrays, {}))


def test_a_dtype_that_changes_is_refused(tmp_path):
    steps = [({"x": np.zeros(1, kind)}, {}) for kind in (np.float32, np.float16)]
    with pytest.raises(DumpError, match="was float32 in the steps before"):
        write(tmp_path / "d", *steps)


def test_a_selection_that_keeps_nothing_is_an_error(tmp_path):
    with pytest.raises(DumpError, match="nothing was dumped"):
        write(tmp_path / "d", ({"x": np.zeros(1)}, {}), options=DumpOptions(tensors=("lm_head.*",)))


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_provenance_must_be_plain_json(tmp_path, value):
    with pytest.raises(DumpError, match="not plain JSON"):
        DumpWriter(tmp_path / "d", {"x": value})
    assert list(tmp_path.iterdir()) == []


def test_a_dump_replaces_an_earlier_one(make_run, tmp_path):
    make_run(tmp_path / "d", decode=9)
    make_run(tmp_path / "d", decode=1)
    assert len(read_dump(tmp_path / "d").steps) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_the_earlier_dump(make_run, tmp_path, error):
    make_run(tmp_path / "d")

    def run():
        with DumpWriter(tmp_path / "d", {}) as writer:
            writer.step("decode", 0, "body", {"x": np.zeros(1)}, {})
            raise error

    with pytest.raises(error):
        run()
    assert len(read_dump(tmp_path / "d").steps) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_is_not_a_dump_is_never_replaced(make_run, tmp_path):
    run = make_run(tmp_path / "d")
    (run.folder / "notes.txt").write_text("mine")
    with pytest.raises(DumpError, match="holds other things than a dump"):
        make_run(tmp_path / "d")
    (tmp_path / "link").symlink_to(run.folder)
    with pytest.raises(DumpError, match="is not a folder"):
        make_run(tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DumpError, match="is not a folder"):
        make_run(tmp_path / "file")
    assert (run.folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["decode/minutes.txt", "decode/mine.npy", "prefill/more/x.npy"])
def test_files_that_lie_among_those_of_a_dump_are_not_lost(make_run, tmp_path, name):
    file = make_run(tmp_path / "d").folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"mine")
    with pytest.raises(DumpError, match=r"holds other things than a dump: (decode|prefill)/m"):
        make_run(tmp_path / "d")
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize("text", ['{"name": "an app"}', "{", "[]", '{"format": "qeff-proxy-dump"}'])
def test_a_manifest_of_something_else_is_not_replaced(make_run, tmp_path, text):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(text)
    with pytest.raises(DumpError, match=r"a manifest\.json of something else"):
        make_run(tmp_path / "app")
    assert (tmp_path / "app" / "manifest.json").read_text() == text


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_is_one_clear_error_and_costs_nothing_that_was_whole(make_run, tmp_path):
    make_run(tmp_path / "d")
    # A limit on the size of files stands in for the disk: the write fails in the middle of a step.
    code = """
        import resource, sys
        import numpy as np
        from pathlib import Path
        from qeff_proxy.dump import DumpWriter
        from qeff_proxy.errors import DumpError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        steps = 0
        try:
            with DumpWriter(Path(sys.argv[1]), {}) as writer:
                while True:
                    writer.step("decode", steps, "body", {"x": np.zeros(5_000, np.float32)}, {})
                    steps += 1
        except DumpError as error:
            print(steps, error)
    """
    done = run_python(code, tmp_path / "d")
    assert done.stdout.startswith("4 the dump"), done.stderr
    assert "cannot be written: File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert len(read_dump(tmp_path / "d").steps) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_killed_run_leaves_a_folder_that_is_recognisably_incomplete(make_run, tmp_path):
    make_run(tmp_path / "d")
    code = """
        import os, signal, sys
        import numpy as np
        from pathlib import Path
        from qeff_proxy.dump import DumpWriter
        with DumpWriter(Path(sys.argv[1]), {}) as writer:
            writer.step("decode", 0, "body", {"x": np.zeros(5)}, {})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, tmp_path / "d").returncode == -signal.SIGKILL
    assert len(read_dump(tmp_path / "d").steps) == 6
    (left,) = (path for path in tmp_path.iterdir() if path.name != "d")
    assert left.name.startswith("d.incomplete-")
    np.load(left / "decode" / "body.in.x.npy")
    with pytest.raises(DumpError, match="rule COMPLETE"):
        read_dump(left)


def test_a_failed_writer_takes_nothing_more(tmp_path):
    writer = DumpWriter(tmp_path / "d", {})
    with pytest.raises(DumpError, match="cannot be dumped"):
        writer.step("decode", 0, "body", {"x": np.zeros(1, np.complex64)}, {})
    with pytest.raises(DumpError, match="is failed"):
        writer.step("decode", 1, "body", {"x": np.zeros(1)}, {})
    with pytest.raises(DumpError, match="failed while it was written"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_neither_torch_nor_transformers_is_imported():
    code = """
        import sys
        import qeff_proxy.compare, qeff_proxy.device, qeff_proxy.compare.report
        import qeff_proxy.compare.tables, qeff_proxy.cli.compare, qeff_proxy.cli.run_on
        print(sorted({"torch", "transformers", "onnx", "onnxruntime"} & set(sys.modules)))
    """
    assert run_python(code).stdout == "[]\n"
