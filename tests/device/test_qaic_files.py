"""``aic_batch_io.json`` and its ``.raw`` files: what is packed, and what QEfficient wrote."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from qeff_proxy.compare import compare_dumps
from qeff_proxy.device import Conventions, PackOptions, import_recorded, pack_dump
from qeff_proxy.dump import DumpWriter, read_dump
from qeff_proxy.errors import DumpError
from qeff_proxy_npu.device.qaic_runner import QaicRunnerTarget


def write_dump(folder):
    """A dump of two chunks and two tokens, cache rows as a delta; its whole arrays, by step."""
    rng, cache = np.random.default_rng(0), np.zeros((1, 3, 0, 4), np.float32)
    arrays = []
    with DumpWriter(folder, {}) as writer:
        for phase, index, query in (
            ("prefill", 0, 3),
            ("prefill", 1, 3),
            ("decode", 0, 1),
            ("decode", 1, 1),
        ):
            embeds = rng.standard_normal((1, query, 8), dtype=np.float32)
            rows = rng.standard_normal((1, 3, query, 4), dtype=np.float32)
            inputs = {"inputs_embeds": embeds, "past_key_values.0.key": cache}
            cache = np.concatenate([cache, rows], axis=2)
            outputs = {"last_hidden_state": embeds * 2, "present.0.key": cache}
            writer.step(phase, index, "body", inputs, outputs)
            arrays.append((inputs, outputs))
    return arrays


def import_dump(path, folder, *, like=None, dtypes=None, **options):
    conventions = Conventions(dtypes=dtypes or {}, **options)
    import_recorded(path, QaicRunnerTarget(), folder, like=like, conventions=conventions)


def test_qaic_files_are_what_the_json_says(tmp_path):
    arrays = write_dump(tmp_path / "a")
    dump = read_dump(tmp_path / "a")
    pack_dump(dump, tmp_path / "q", QaicRunnerTarget(), PackOptions())
    for step, expected in zip(dump.steps, arrays, strict=True):
        place = tmp_path / "q" / "body" / step.label
        (entries,) = json.loads((place / "aic_batch_io.json").read_text())["IO-files"]
        for side, known in zip(("in", "out"), expected, strict=True):
            read = {
                e["map-to"]: np.fromfile(place / e["path"], known[e["map-to"]].dtype).reshape(
                    e["dims"]
                )
                for e in entries
                if e["io-direction"] == side
            }
            assert set(read) == set(known)
            for name, array in known.items():
                np.testing.assert_array_equal(array, read[name], err_msg=name)
        assert all(
            e["elem-size"] * np.prod(e["dims"]) == (place / e["path"]).stat().st_size
            for e in entries
        )


def write_like_qefficient(folder):
    """Files as QEfficient leaves them: two chunks in one folder, and no dims for some."""
    arrays = {
        "input_ids": np.array([[5]], np.int64),
        "past_key.0": np.zeros((1, 1, 2, 1), np.float16),
        "logits": np.ones((1, 1, 3), np.float32),
        "past_key.0_RetainedState": np.ones((1, 1, 2, 1), np.float16),
    }
    sets = []
    for place in ("prefill", "prefill", "decode"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        entries = []
        for name, array in arrays.items():
            array.tofile(folder / place / f"{name}.raw")
            entry = {
                "path": f"{place}/{name}.raw",
                "io-direction": "out" if name in ("logits", "past_key.0_RetainedState") else "in",
                "elem-size": array.itemsize,
                "map-to": name,
            }
            if name != "logits":
                entry["dims"] = array.shape
            entries.append(entry)
        sets.append(entries)
    path = folder / "aic_batch_io.json"
    path.write_text(json.dumps({"IO-files": sets}, indent=True))
    return path


def test_what_qefficient_wrote_is_read(tmp_path):
    import_dump(write_like_qefficient(tmp_path / "q"), tmp_path / "d")
    dump = read_dump(tmp_path / "d")
    # The first chunk's files were written over by the second's.
    assert [step.label for step in dump.steps] == ["prefill-0001", "decode-0000"]
    assert dump.array("decode", 0, "body.in.input_ids").dtype == np.int64
    assert dump.array("decode", 0, "body.out.present_key.layer-00").dtype == np.float16
    assert dump.array("decode", 0, "body.in.past_key_values_key.layer-00").shape == (1, 1, 2, 1)
    assert dump.array("decode", 0, "body.out.logits").tolist() == [1, 1, 1]


def test_the_dtypes_of_raw_files_can_be_told(tmp_path):
    path = write_like_qefficient(tmp_path / "q")
    import_dump(path, tmp_path / "d", dtypes={"*.key": "bfloat16"})
    dtype = read_dump(tmp_path / "d").array("decode", 0, "body.out.present_key.layer-00").dtype
    assert dtype == ml_dtypes.bfloat16
    with pytest.raises(DumpError, match="elements of 4 bytes"):
        import_dump(path, tmp_path / "e", dtypes={"logits": "int8"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"path": "../secret.raw"}, "outside"),
        ({"path": "/etc/passwd"}, "outside"),
        ({"path": "prefill/nothing.raw"}, "cannot be read"),
        ({"dims": [3]}, "bytes, not those of"),
        ({"dims": [-1]}, "not a shape"),
        ({"elem-size": 3}, "are not"),
        ({"elem-size": "4"}, "lacks one of"),
        ({"io-direction": "sideways"}, "direction"),
    ],
)
def test_a_hostile_aic_batch_io_is_refused(tmp_path, change, problem):
    path = write_like_qefficient(tmp_path / "q")
    (tmp_path / "secret.raw").write_bytes(b"12345678")
    value = json.loads(path.read_text())
    value["IO-files"][2][0] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(DumpError, match=problem):
        import_dump(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def write_whole_caches(folder, arrays, ctx_len=16):
    """What `write_io` leaves of a run: the last chunk and the first token, caches whole."""
    sets = []
    for place, number in (("prefill", 1), ("decode", 2)):
        (folder / place).mkdir(parents=True)
        _, outputs = arrays[number]
        present = outputs["present.0.key"]
        cache = np.full((1, 3, ctx_len, 4), 9, np.float16)
        cache[:, :, : present.shape[2]] = present
        files = {
            "last_hidden_state": outputs["last_hidden_state"],
            "past_key.0_RetainedState": cache,
        }
        entries = []
        for name, array in files.items():
            array.tofile(folder / place / f"{name}.raw")
            path = f"{place}/{name}.raw"
            entry = {"path": path, "io-direction": "out", "elem-size": array.itemsize}
            entries.append({**entry, "map-to": name, "dims": array.shape})
        sets.append(entries)
    (folder / "aic_batch_io.json").write_text(json.dumps({"IO-files": sets}))
    return folder


def test_qefficients_whole_caches_are_compared_with_a_dump(tmp_path):
    arrays = write_dump(tmp_path / "a")
    reference = read_dump(tmp_path / "a")
    folder = write_whole_caches(tmp_path / "io", arrays)
    import_dump(folder, tmp_path / "d", like=reference)
    back = read_dump(tmp_path / "d")
    assert [step.label for step in back.steps] == ["prefill-0001", "decode-0000"]
    assert back.array("decode", 0, "body.out.present_key.layer-00").shape == (1, 3, 7, 4)
    comparison = compare_dumps(reference, back, tensors=["body.out.*"], partial=True)
    assert comparison.passed
    assert len(comparison.tensors) == 4
    assert not compare_dumps(reference, back, tensors=["body.out.*"]).passed  # steps are missing
    import_dump(folder, tmp_path / "e", like=reference, rows="back")
    globs = ["body.out.present*"]
    assert not compare_dumps(reference, tmp_path / "e", tensors=globs, partial=True).passed


@pytest.mark.parametrize(
    ("part", "problem"), [(None, "may be last_hidden_state of several parts"), ("body", None)]
)
def test_a_name_of_two_parts_must_be_told_apart(tmp_path, part, problem):
    values = {"last_hidden_state": np.ones((1, 2), np.float32)}
    with DumpWriter(tmp_path / "a", {}) as writer:
        writer.step("prefill", 0, "encoder", {}, values)
        writer.step("prefill", 0, "body", {}, values)
    folder = tmp_path / "io" / "output"
    folder.mkdir(parents=True)
    values["last_hidden_state"].tofile(folder / "x.raw")
    entry = {"path": "output/x.raw", "io-direction": "out", "elem-size": 4}
    text = json.dumps({"IO-files": [[{**entry, "map-to": "last_hidden_state"}]]})
    (tmp_path / "io" / "aic_batch_io.json").write_text(text)
    like = read_dump(tmp_path / "a")

    def read():
        import_recorded(tmp_path / "io", QaicRunnerTarget(), tmp_path / "d", like=like, part=part)

    if problem is None:
        read()
        assert compare_dumps(like, tmp_path / "d", tensors=["body.*"]).passed
    else:
        with pytest.raises(DumpError, match=problem):
            read()


def test_logits_are_the_heads_and_caches_the_bodys(tmp_path, dumps):
    reference = dumps["gpt2"]
    folder = tmp_path / "io" / "decode"
    folder.mkdir(parents=True)
    cache = reference.array("decode", 0, "body.out.present_value.layer-01")
    whole = np.concatenate([cache, np.full((1, 2, 5, 4), 3, np.float32)], axis=2)
    files = {
        "logits": reference.array("decode", 0, "lm_head.out.logits"),
        "past_value.1_InternalRetainedState": whole,
        "position_ids": np.array([[7]]),
    }
    entries = []
    for name, array in files.items():
        array.tofile(folder / f"{name}.raw")
        side = "in" if name == "position_ids" else "out"
        entry = {"path": f"decode/{name}.raw", "io-direction": side, "elem-size": array.itemsize}
        entries.append({**entry, "map-to": name, "dims": array.shape})
    (tmp_path / "io" / "aic_batch_io.json").write_text(json.dumps({"IO-files": [entries]}))
    import_dump(tmp_path / "io", tmp_path / "d", like=reference)
    back = read_dump(tmp_path / "d")
    assert back.names() == ["lm_head.out.logits", "body.out.present_value.layer-01"]
    comparison = compare_dumps(reference, back, tensors=back.names(), partial=True)
    assert comparison.passed
    assert [len(tensor.steps) for tensor in comparison.tensors] == [1, 1]
