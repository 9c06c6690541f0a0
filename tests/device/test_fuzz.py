"""Random faults in random packed folders: a comparison passes only if every element is right.

``python tests/device/test_fuzz.py 1000 5000`` runs the cases 1000 to 4999.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))

from device_faults import FAULTS
from device_models import MODELS, export_of, write_dump
from device_stand_in import run_device
from device_targets import CLASSES, make_target
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.device import (
    Conventions,
    PackOptions,
    import_recorded,
    pack_dump,
    unpack_outputs,
)
from qeff_proxy.device.index import read_index
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import DumpError, ProxyError

#: Faults that do not read the elements as float32.
OF_FILES = {
    "missing_step", "missing_tensor", "swapped_steps", "doubled_step", "swapped_tensors",
    "half_a_file", "cut_short", "written_twice", "unknown_name", "copied_name", "empty_file",
    "broken_header",
}  # fmt: skip


def damage_index(folder, rng):
    """Replace a value somewhere in pack.json, or some of its bytes."""
    path = folder / "pack.json"
    if rng.random() < 0.3:
        data = bytearray(path.read_bytes())
        at = int(rng.integers(len(data)))
        data[at : at + 3] = rng.bytes(3)
        path.write_bytes(data)
        return
    value = json.loads(path.read_text())
    run = value["runs"][int(rng.integers(len(value["runs"])))]
    tensor = run["outputs"][int(rng.integers(len(run["outputs"])))]
    place = [value, run, tensor][int(rng.integers(3))]
    key = list(place)[int(rng.integers(len(place)))]
    values = [None, -1, 0, 1, "x", [], {}, [1, 2], "float16", "decode", 2**70, [[0, 1]], "../x"]
    place[key] = values[int(rng.integers(len(values)))]
    path.write_text(json.dumps(value))


def one_case(seed, folder, dumps, echo):
    """Run one case; return what happened, in a word."""
    rng = np.random.default_rng(seed)
    name = sorted(CLASSES)[int(rng.integers(len(CLASSES)))]
    model = sorted(MODELS)[int(rng.integers(len(MODELS)))]
    half = rng.random() < 0.2
    fixed = not half and rng.random() < 0.5
    conventions = Conventions(
        dtypes={"*": "float16", "*_ids": "int32"} if half else {},
        layouts={"past_key*": "B,S,H,D"} if rng.random() < 0.3 and model != "bge" else {},
    )
    shapes = CompileOptions(batch_size=int(rng.integers(1, 3)), prefill_seq_len=5, ctx_len=14)
    options = PackOptions(
        parts=[part for part in MODELS[model] if part not in ("embedding", "lm_head")],
        cache="device" if rng.random() < 0.2 and name in ("npy", "npz") else "reference",
        conventions=conventions,
        **({"export": export_of(model, folder), "shapes": shapes} if fixed else {}),
    )
    dump, target, packed = dumps[model], make_target(name), folder / "p"
    pack_dump(dump, packed, target, options)
    run_device(packed, echo(dump))
    faults = [f for f in sorted(FAULTS) if not half or f in OF_FILES]
    used = [faults[int(rng.integers(len(faults)))] for _ in range(int(rng.integers(0, 3)))]
    for fault in used:
        with suppress(ValueError, EOFError, OSError):  # an earlier fault left no array to read
            FAULTS[fault](packed, rng)
    if rng.random() < 0.15:
        damage_index(packed, rng)
        used.append("damage_index")
    try:
        if rng.random() < 0.1 and name in ("onnx", "polygraphy"):
            used.append("import")
            place = packed / "outputs" / "body"
            import_recorded(place, target, folder / "d", like=dump, part="body")
        else:
            index = read_index(packed)
            unpack_outputs(packed, target, index, dump, folder / "d")
    except ProxyError as error:
        line = str(error)
        if not used or not line.isprintable():
            raise
        assert not (folder / "d").exists()
        return f"refused: {used}"
    back = read_dump(folder / "d")
    try:
        globs = [f"{part}.out.*" for part in options.parts]
        passed = compare_dumps(dump, back, tensors=globs).passed
    except DumpError:
        assert used, seed
        return f"nothing: {used}"
    wrong = first_wrong(dump, back, half=half)
    assert not (passed and wrong), (seed, name, model, used, wrong)
    assert used or (passed and not wrong), (seed, name, model, wrong)
    return f"{'passed' if passed else 'failed'}: {used}"


def first_wrong(dump, back, *, half):
    """The first tensor of the new dump that is not exactly the reference's."""
    for (phase, name), tensor in back.tensors.items():
        for position in tensor.index.positions:
            step = back.steps[position]
            array = back.array(phase, step.index, name)
            known = dump.array(phase, step.index, name)
            if not np.array_equal(array, known.astype(np.float16) if half else known):
                return f"{name} in {step.label}"
    return None


@pytest.mark.parametrize("seed", range(24))
def test_a_comparison_passes_only_if_all_is_right(seed, tmp_path, dumps, echo):
    one_case(seed, tmp_path, dumps, echo)


def main():
    from collections import Counter

    from conftest import echo

    first, last = (int(word) for word in sys.argv[1:])
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dumps = {model: read_dump(write_dump(model, root / model)) for model in MODELS}
        for seed in range(first, last):
            folder = root / "case"
            folder.mkdir()
            try:
                counts[one_case(seed, folder, dumps, echo.__wrapped__())] += 1
            except AssertionError as error:
                print("WRONG", seed, error, flush=True)
            except Exception as error:  # noqa: BLE001 - what a fuzz is for
                print("RAISED", seed, type(error).__name__, error, flush=True)
            shutil.rmtree(folder)
    for word, count in counts.most_common(60):
        print(count, word)


if __name__ == "__main__":
    main()
