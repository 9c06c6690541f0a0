"""Every rule of the format, broken on purpose: the reader names the rule."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from qeff_proxy.dump import RULES, read_dump
from qeff_proxy.dump.format import HEADER_BYTES
from qeff_proxy.dump.npy import build_header
from qeff_proxy.errors import DumpError

HIDDEN = "decode/body.out.hidden_states.layer-01.npy"
ROWS = "decode/body.out.present_key.layer-01.npy"
MASK = "decode/body.in.attention_mask.npy"


def entry(manifest, file=HIDDEN):
    return next(t for t in manifest["tensors"] if t["file"] == file)


def put(key, value, file=HIDDEN):
    def attack(folder, manifest):
        entry(manifest, file)[key] = value

    return attack


def top(key, value):
    def attack(folder, manifest):
        manifest[key] = value

    return attack


def drop(key):
    def attack(folder, manifest):
        del entry(manifest)[key]

    return attack


def raw(old, new):
    def attack(folder, manifest):
        text = (folder / "manifest.json").read_text()
        assert old in text
        (folder / "manifest.json").write_bytes(text.replace(old, new, 1).encode("latin-1"))
        return True

    return attack


def rename(name, **more):
    def attack(folder, manifest):
        tensor = entry(manifest)
        tensor |= {"name": name, "file": f"decode/{name}.npy", **more}

    return attack


def twice(folder, manifest):
    manifest["tensors"].append(dict(entry(manifest)))


def twice_but_for_case(folder, manifest):
    tensor = dict(entry(manifest))
    name = tensor["name"].replace("hidden", "Hidden")
    tensor |= {"name": name, "tensor": "Hidden_states", "file": f"decode/{name}.npy"}
    manifest["tensors"].append(tensor)


def step(position, **fields):
    def attack(folder, manifest):
        manifest["steps"][position] |= fields

    return attack


def linked(folder, manifest):
    (folder / HIDDEN).rename(folder.parent / "outside.npy")
    (folder / HIDDEN).symlink_to(folder.parent / "outside.npy")


def linked_phase(folder, manifest):
    (folder / "decode").rename(folder.parent / "elsewhere")
    (folder / "decode").symlink_to(folder.parent / "elsewhere")


def linked_manifest(folder, manifest):
    (folder / "manifest.json").rename(folder.parent / "m.json")
    (folder / "manifest.json").symlink_to(folder.parent / "m.json")
    return True


def pipe(folder, manifest):
    (folder / HIDDEN).unlink()
    os.mkfifo(folder / HIDDEN)


def missing(folder, manifest):
    (folder / HIDDEN).unlink()


def no_manifest(folder, manifest):
    (folder / "manifest.json").unlink()
    return True


def cut(folder, manifest):
    os.truncate(folder / HIDDEN, (folder / HIDDEN).stat().st_size - 1)


def longer(folder, manifest):
    with (folder / HIDDEN).open("ab") as file:
        file.write(b"\0")


def overwrite(at, data, file=HIDDEN):
    def attack(folder, manifest):
        with (folder / file).open("r+b") as opened:
            opened.seek(at)
            opened.write(data)

    return attack


def pickled(folder, manifest):
    size = (folder / HIDDEN).stat().st_size
    with (folder / HIDDEN).open("wb") as file:
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
        file.write(pickle.dumps(print).ljust(size - file.tell(), b"\0"))


def fortran(folder, manifest):
    header = build_header("<f4", (4, 1, 1, 8)).replace(b"False", b"True ")
    overwrite(0, header)(folder, manifest)


ATTACKS = {
    "no manifest": ("COMPLETE", no_manifest),
    "manifest is a link": ("COMPLETE", linked_manifest),
    "not JSON": ("JSON", raw("{", "")),
    "not UTF-8": ("JSON", raw("tiny", "\xff")),
    "half a surrogate pair": ("JSON", raw("tiny", "\\ud800")),
    "NaN": ("JSON", raw('"seed": 0', '"seed": NaN')),
    "a number beyond float64": ("JSON", raw('"seed": 0', '"seed": 1e999')),
    "a number of many digits": ("JSON", raw('"seed": 0', '"seed": ' + "9" * 9999)),
    "a key twice": ("JSON", raw('"model": "tiny"', '"model": "tiny", "model": "b"')),
    "nested too deep": ("JSON", raw('"tiny"', "[" * 100_000)),
    "another format": ("VERSION", top("format", "safetensors")),
    "a later version": ("VERSION", top("version", 2)),
    "version true": ("VERSION", top("version", True)),
    "big endian": ("VERSION", top("byte_order", "big")),
    "a field too many": ("FIELDS", put("pickle", "x")),
    "a field too few": ("FIELDS", drop("dtype")),
    "an unknown top field": ("FIELDS", top("more", 1)),
    "a field of another type": ("FIELDS", put("crc32", 5)),
    "a tensor that is no object": ("FIELDS", top("tensors", [3])),
    "an escape code": ("FIELDS", put("graph_name", "a\x1b[2J")),
    "an unknown phase": ("FIELDS", put("phase", "train")),
    "an unknown part": ("FIELDS", top("parts", ["embedding"])),
    "an unknown cache form": ("FIELDS", put("kv", "rows")),
    "a step twice": ("STEPS", step(3, index=0)),
    "a step number that falls": ("STEPS", step(3, number=0)),
    "a negative step": ("FIELDS", step(3, index=-1)),
    "a path out": ("NAME", rename("../../etc/passwd")),
    "an absolute path": ("NAME", rename("/etc/passwd")),
    "a name with a line end": ("NAME", rename("body.out.hidden_states.layer-01\n")),
    "components of another": ("NAME", put("layer", 2)),
    "a layer that is a truth value": ("NAME", put("layer", True)),
    "another file": ("FILE", put("file", ROWS)),
    "a file out": ("FILE", put("file", "../../../etc/passwd")),
    "a name twice": ("UNIQUE", twice),
    "a name twice but for case": ("UNIQUE", twice_but_for_case),
    "an object dtype": ("DTYPE", put("dtype", "object")),
    "stored as objects": ("DTYPE", put("stored", "|O")),
    "stored otherwise": ("DTYPE", put("stored", "<f8")),
    "a huge shape": ("SHAPE", put("shape", [2**40, 2**40])),
    "a huge number of dimensions": ("SHAPE", put("shape", [1] * 99)),
    "a negative dimension": ("SHAPE", put("shape", [1, 1, -8])),
    "a dimension that is no number": ("SHAPE", put("shape", [1, 1, 8.0])),
    "a shape of another size": ("SIZE", put("shape", [1, 1, 9])),
    "a shape of the same size": ("HEADER", put("shape", [1, 8, 1])),
    "steps beyond the last": ("RECORDS", put("steps", [[2, 99]])),
    "steps without end": ("RECORDS", put("steps", [[2, 10**15]])),
    "steps that fall": ("RECORDS", put("steps", [[4, 6], [2, 4]])),
    "steps that overlap": ("RECORDS", put("steps", [[2, 5], [4, 6]])),
    "steps of another phase": ("RECORDS", put("steps", [[0, 4]])),
    "no steps": ("RECORDS", put("steps", [])),
    "too few checksums": ("RECORDS", put("crc32", "00000000")),
    "checksums that are no digits": ("RECORDS", put("crc32", "zzzzzzzz" * 4)),
    "too few shapes": ("RECORDS", put("shapes", [[1, 7]], MASK)),
    "the first record repeats": ("RECORDS", put("repeats", [[0, 1]])),
    "repeats beyond the last": ("RECORDS", put("repeats", [[1, 10**12]])),
    "repeats that the file does not have": ("SIZE", put("repeats", [[1, 2]])),
    "rows of what is no cache": ("KV", put("kv", "delta")),
    "rows that begin nowhere": ("KV", step(3, past_length=None)),
    "a link": ("REGULAR", linked),
    "a linked folder": ("REGULAR", linked_phase),
    "a pipe": ("REGULAR", pipe),
    "a missing file": ("REGULAR", missing),
    "a pickle": ("HEADER", pickled),
    "Fortran order": ("HEADER", fortran),
    "not .npy": ("HEADER", overwrite(0, b"PK")),
    "a header of version 3": ("HEADER", overwrite(6, b"\x03")),
    "another dtype in the header": ("HEADER", overwrite(0, build_header("<i4", (4, 1, 1, 8)))),
    "a header that evaluates": ("HEADER", overwrite(10, b"__import__('os')".ljust(309) + b"\n")),
    "cut short": ("SIZE", cut),
    "a byte too many": ("SIZE", longer),
    "one bit wrong": ("CHECKSUM", overwrite(HEADER_BYTES + 40, b"\x01")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_dump_is_refused_with_the_rule_it_breaks(delta_run, tmp_path, attack):
    rule, change = ATTACKS[attack]
    folder = tmp_path / "d"
    shutil.copytree(delta_run.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if not change(folder, manifest):
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DumpError) as caught:
        read_dump(folder).array("decode", 1, "body.out.hidden_states.layer-01")
    assert caught.value.rule == rule
    assert f"rule {rule}: {RULES[rule]}" in str(caught.value)
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_every_rule_has_an_attack():
    assert {rule for rule, _ in ATTACKS.values()} == set(RULES)


def test_a_copy_without_an_attack_is_read(delta_run, tmp_path):
    shutil.copytree(delta_run.folder, tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    read_dump(tmp_path / "d").array("decode", 1, "body.out.hidden_states.layer-01")


def test_the_page_of_the_specification_names_every_rule():
    from pathlib import Path

    page = Path(__file__, "../../../docs/dump-format.md").resolve().read_text()
    assert [rule for rule in RULES if f"**{rule}**" not in page] == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DumpError, match="is not a folder"):
        read_dump(tmp_path / "nothing")
