"""For each target: what is packed is read as its tool reads it, and what it writes comes back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from device_models import MODELS, export_of
from device_stand_in import run_device
from device_targets import CLASSES, make_target
from qeff_proxy.compare import Tolerances, compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.device import Conventions, PackOptions, pack_dump, unpack_outputs
from qeff_proxy.dump import TensorName, read_dump

EXACT = Tolerances.parse(["*=atol:0"])
FIXED = CompileOptions(batch_size=2, prefill_seq_len=6, ctx_len=16)


def round_trip(dump, name, folder, compute, options, conventions=None, **options_of_target):
    """Pack, run the stand-in, unpack, and return the new dump and what was said."""
    target = make_target(name, **options_of_target)
    index = pack_dump(dump, folder / "packed", target, options)
    run_device(folder / "packed", compute)
    result = unpack_outputs(folder / "packed", target, index, dump, folder / "dump", conventions)
    return read_dump(folder / "dump"), result


def parts_of(model):
    return [part for part in MODELS[model] if part not in ("embedding", "lm_head")]


def shapes_of(model, folder, *, fixed):
    return {"export": export_of(model, folder), "shapes": FIXED} if fixed else {}


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_round_trip_is_exact(name, model, fixed, dumps, echo, tmp_path):
    dump, parts = dumps[model], parts_of(model)
    compute, seen = echo(dump), []

    def checking(run, inputs):
        """The device sees the reference's inputs, where the index says they are."""
        seen.append(run)
        for tensor in run["inputs"]:
            array = np.asarray(inputs[tensor["name"]])
            assert list(array.shape) == tensor["shape"]
            valid = tuple(slice(*ends) for ends in tensor["valid"])
            original = array_of(dump, run, tensor["name"])
            np.testing.assert_array_equal(array[valid].astype(original.dtype), original)
        return compute(run, inputs)

    options = PackOptions(parts=parts, **shapes_of(model, tmp_path, fixed=fixed))
    back, result = round_trip(dump, name, tmp_path, checking, options)
    assert (result.missing, result.ignored) == ([], [])
    globs = [f"{part}.out.*" for part in parts]
    comparison = compare_dumps(dump, back, tolerances=EXACT, tensors=globs)
    assert comparison.passed, (comparison.problems, comparison.tensors)
    assert len(comparison.steps) == len(back.steps) == len({(r["phase"], r["index"]) for r in seen})


def array_of(dump, run, graph_name, side="in"):
    layer = next((int(word) for word in graph_name.split(".") if word.isdigit()), None)
    tensor = "_".join(word for word in graph_name.split(".") if not word.isdigit())
    name = TensorName(run["part"], side, tensor, layer)
    return dump.array(run["phase"], run["index"], name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float16") for name in CLASSES),
        *((name, "bfloat16") for name in CLASSES if name not in ("polygraphy", "ai-hub")),
    ],
)
def test_half_precision_is_kept_and_compared_as_such(name, dtype, dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    options = PackOptions(conventions=Conventions(dtypes={"*": dtype, "position_ids": "int32"}))
    back, _ = round_trip(dump, name, tmp_path, echo(dump), options)
    array = back.array("decode", 1, "body.out.present_key.layer-00")
    assert array.dtype.name == dtype
    comparison = compare_dumps(dump, back, tensors=["body.out.*"])
    assert comparison.passed
    assert not compare_dumps(dump, back, tensors=["body.out.*"], tolerances=EXACT).passed


@pytest.mark.parametrize("name", CLASSES)
def test_a_layout_is_said_once(name, dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    conventions = Conventions.parse(layouts=["past_key*=B,S,H,D", "past_value*=BHSD>BSHD"])
    options = PackOptions(conventions=conventions, **shapes_of("gpt2", tmp_path, fixed=True))
    back, _ = round_trip(dump, name, tmp_path, echo(dump), options)
    assert compare_dumps(dump, back, tensors=["body.out.*"], tolerances=EXACT).passed
    assert '"axes": [0, 2, 1, 3]' in (tmp_path / "packed" / "pack.json").read_text()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["npy", "qnn-net-run", "trtexec"])
def test_rows_of_the_step_alone_come_back_as_a_delta(name, fixed, dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    whole = echo(dump)
    target = make_target(name)
    options = PackOptions(**shapes_of("gpt2", tmp_path, fixed=True)) if fixed else PackOptions()
    index = pack_dump(dump, tmp_path / "packed", target, options)

    def new_rows(run, inputs):
        # A graph of fixed shapes gives as many new rows as its query has, padding included.
        past = next(a.shape[2] for n, a in inputs.items() if n.startswith("past_key_values."))
        outputs = whole(run, inputs)
        return {n: a[:, :, past:] if n.startswith("present.") else a for n, a in outputs.items()}

    run_device(tmp_path / "packed", new_rows)
    conventions = Conventions(rows="new")
    unpack_outputs(tmp_path / "packed", target, index, dump, tmp_path / "d", conventions)
    back = read_dump(tmp_path / "d")
    assert compare_dumps(dump, back, tensors=["body.out.*"], tolerances=EXACT).passed
    np.testing.assert_array_equal(
        back.array("decode", 2, "body.out.present_key.layer-01"),
        dump.array("decode", 2, "body.out.present_key.layer-01"),
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["npy", "qaic-runner"])
def test_a_device_may_keep_its_rows_at_the_front(name, padded, dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    whole = echo(dump)
    options = PackOptions(cache="device", **shapes_of("gpt2", tmp_path, fixed=True))

    def in_front(run, inputs):
        outputs = whole(run, inputs)
        for tensor in run["outputs"]:
            if tensor["name"].startswith("present."):
                begin, end = tensor["valid"][2]
                array = outputs[tensor["name"]]
                rows = array[:, :, begin:end]
                if padded:
                    rows = np.concatenate([rows, np.full_like(array, 3)], 2)[:, :, : array.shape[2]]
                else:
                    rows = rows[: tensor["valid"][0][1]]
                outputs[tensor["name"]] = rows
        return outputs

    target = make_target(name)
    index = pack_dump(dump, tmp_path / "p", target, options)
    run_device(tmp_path / "p", in_front)
    globs = ["body.out.*"]
    front = Conventions(rows="front")
    unpack_outputs(tmp_path / "p", target, index, dump, tmp_path / "d", front)
    assert compare_dumps(dump, tmp_path / "d", tensors=globs, tolerances=EXACT).passed
    if padded:
        unpack_outputs(tmp_path / "p", target, index, dump, tmp_path / "e")
        assert not compare_dumps(dump, tmp_path / "e", tensors=globs).passed


@pytest.mark.parametrize("name", ["npy", "qnn-net-run", "qaic-runner"])
def test_quantized_outputs_get_their_values_back(name, dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    whole = echo(dump)
    dtypes = Conventions(dtypes={"last_hidden_state": "uint8"})
    target = make_target(name)
    index = pack_dump(dump, tmp_path / "p", target, PackOptions(conventions=dtypes))

    def quantizing(run, inputs):
        outputs = whole(run, inputs)
        scaled = np.round(outputs["last_hidden_state"] / 0.03) + 128
        return {**outputs, "last_hidden_state": np.clip(scaled, 0, 255)}

    run_device(tmp_path / "p", quantizing)
    said = Conventions.parse(quantized=["last_*=uint8,scale:0.03,offset:-128"])
    unpack_outputs(tmp_path / "p", target, index, dump, tmp_path / "d", said)
    limits = Tolerances.parse(["*=atol:0.016"])
    assert compare_dumps(dump, tmp_path / "d", tensors=["body.out.last*"], tolerances=limits).passed
    zero_point = Conventions.parse(quantized=["last_*=uint8,scale:0.03,zero_point:128"])
    assert zero_point == said


def test_bfloat16_tensors_of_a_dump_keep_their_bits(tmp_path):
    from qeff_proxy.dump import DumpWriter

    values = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", {"x": values}, {"y": values})
    dump = read_dump(tmp_path / "d")
    for name in CLASSES:
        folder = tmp_path / name
        back, _ = round_trip(dump, name, folder, lambda _, feed: {"y": feed["x"]}, PackOptions())
        array = back.array("prefill", 0, "body.out.y")
        assert array.astype(np.float32).tolist() == [[1.5, -2.0]]


def test_a_carried_cache_is_not_packed_and_the_comparison_says_so(dumps, echo, tmp_path):
    dump = dumps["gpt2"]
    options = PackOptions(cache="device")
    back, result = round_trip(dump, "npy", tmp_path, echo(dump), options)
    assert result.cache == "device"
    place = tmp_path / "packed" / "body"
    assert (place / "prefill-0000" / "past_key_values.0.key.npy").exists()
    assert not (place / "decode-0000" / "past_key_values.0.key.npy").exists()
    notes = compare_dumps(dump, back, tensors=["body.out.*"]).notes
    assert any("carried its own cache" in note for note in notes)
    back, _ = round_trip(dump, "npy", tmp_path / "r", echo(dump), PackOptions())
    notes = compare_dumps(dump, back, tensors=["body.out.*"]).notes
    assert any("fed the reference's cache" in note for note in notes)


def test_large_files_are_read_in_blocks(tmp_path, monkeypatch):
    """One tensor of many blocks, mapped; its pages are released, and the bytes are right."""
    from qeff_proxy.dump import DumpWriter, streams

    monkeypatch.setattr(streams, "_BLOCK_BYTES", 4096)
    released = []
    release = streams._release
    monkeypatch.setattr(streams, "_release", lambda t: released.append(release(t)))
    values = np.random.default_rng(0).standard_normal((3, 7, 5000)).astype(np.float32)
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", {"x": values[0]}, {"y": values})
    dump = read_dump(tmp_path / "d")
    released.clear()
    back, _ = round_trip(dump, "qnn-net-run", tmp_path, lambda *_: {"y": values}, PackOptions())
    assert len(released) > 100
    assert compare_dumps(dump, back, tensors=["body.out.*"], tolerances=EXACT).passed
    changed = np.memmap(tmp_path / "private", np.float32, "w+", shape=(4000,))
    changed.flush()
    private = np.memmap(tmp_path / "private", np.float32, "c")
    private[:] = 5  # held in memory alone: letting go of these pages would lose it
    with DumpWriter(tmp_path / "e", {}) as writer:
        writer.step("prefill", 0, "body", {"x": private}, {})
    assert (read_dump(tmp_path / "e").array("prefill", 0, "body.in.x") == 5).all()
