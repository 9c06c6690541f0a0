"""What goes wrong in a lab: functions that change the outputs in a packed folder.

Each takes the folder and a random generator, and returns the files that it changed, or None where
the target's layout has no place for it.
"""

from __future__ import annotations

import shutil

import numpy as np

RAW = (".raw", ".bin")
FILES = (*RAW, ".npy", ".pb", ".npz", ".h5", ".json")


def files_of(folder):
    outputs = folder / "outputs"
    return [p for p in sorted(outputs.rglob("*")) if p.is_file() and p.suffix in FILES]


def steps_of(folder):
    """The folders of the steps, of groups of several steps only."""
    return [p for p in sorted((folder / "outputs").glob("*/*")) if p.is_dir()]


def pick(rng, items):
    return items[int(rng.integers(len(items)))] if items else None


def arrays(folder):
    """The files whose elements can be changed in place: raw and .npy."""
    return [p for p in files_of(folder) if p.suffix in (*RAW, ".npy") and p.stat().st_size > 128]


def read(path):
    """The elements, little-endian float32 unless the file says otherwise."""
    return np.load(path) if path.suffix == ".npy" else np.fromfile(path, "<f4")


def write(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        array.tofile(path)


def used(array):
    """The elements that are no padding, which the stand-in fills with 7."""
    return np.flatnonzero(array.reshape(-1) != 7).tolist()


def missing_step(folder, rng):
    step = pick(rng, steps_of(folder))
    if step is not None:
        shutil.rmtree(step)
    return step and [step]


def missing_tensor(folder, rng):
    path = pick(rng, arrays(folder))
    if path is not None:
        path.unlink()
    return path and [path]


def swapped_steps(folder, rng):
    """Two steps whose files have the same sizes exchange their names."""
    steps = steps_of(folder)
    for _ in range(20):
        one, two = pick(rng, steps), pick(rng, steps)
        if one is not None and one != two and one.parent == two.parent and sizes(one) == sizes(two):
            place = one.with_name("between")
            one.rename(place)
            two.rename(one)
            place.rename(two)
            return [one, two]
    return None


def sizes(step):
    return {p.name: p.stat().st_size for p in step.iterdir()}


def doubled_step(folder, rng):
    """A step's outputs are those of another."""
    steps = steps_of(folder)
    for _ in range(20):
        one, two = pick(rng, steps), pick(rng, steps)
        if one is not None and one != two and one.parent == two.parent and sizes(one) == sizes(two):
            shutil.rmtree(two)
            shutil.copytree(one, two)
            return [two]
    return None


def swapped_tensors(folder, rng):
    path = pick(rng, arrays(folder))
    others = path and [
        p
        for p in arrays(folder)
        if p.parent == path.parent and p != path and p.stat().st_size == path.stat().st_size
    ]
    other = pick(rng, others)
    if other is None:
        return None
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return [path, other]


def half_a_file(folder, rng):
    path = pick(rng, [p for p in files_of(folder) if p.stat().st_size > 16])
    if path is None:
        return None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return [path]


def cut_short(folder, rng):
    path = pick(rng, [p for p in files_of(folder) if p.stat().st_size > 16])
    if path is None:
        return None
    data = path.read_bytes()
    path.write_bytes(data[: -int(rng.integers(1, 9))])
    return [path]


def written_twice(folder, rng):
    path = pick(rng, arrays(folder))
    if path is None or path.suffix == ".npy":
        return None
    path.write_bytes(path.read_bytes() * 2)
    return [path]


def big_endian(folder, rng):
    path = pick(rng, [p for p in arrays(folder) if p.suffix != ".npy"])
    if path is not None:
        read(path).astype(">f4").tofile(path)
    return path and [path]


def half_precision(folder, rng):
    path = pick(rng, [p for p in arrays(folder) if p.suffix != ".npy"])
    if path is not None:
        write(path, read(path).astype(np.float16))
    return path and [path]


def integers(folder, rng):
    """Elements of the right size and the wrong kind."""
    path = pick(rng, arrays(folder))
    if path is not None:
        with np.errstate(invalid="ignore"):  # of NaN, where another fault came first
            write(path, np.round(read(path) * 100).astype(np.int32))
    return path and [path]


def not_a_number(folder, rng):
    path = pick(rng, arrays(folder))
    if path is not None:
        array = read(path)
        array.reshape(-1)[pick(rng, used(array))] = np.nan
        write(path, array)
    return path and [path]


def one_element(folder, rng):
    """One element of one tensor; of a cache it may be in an old row."""
    path = pick(rng, arrays(folder))
    if path is not None:
        array = read(path)
        array.reshape(-1)[pick(rng, used(array))] += 3
        write(path, array)
    return path and [path]


def another_model(folder, rng):
    """All outputs are noise of the right shape."""
    for path in arrays(folder):
        array = read(path)
        write(path, rng.standard_normal(array.shape).astype(array.dtype))
    return arrays(folder) or None


def unknown_name(folder, rng):
    path = pick(rng, arrays(folder))
    if path is not None:
        other = path.with_name(f"output_42{path.name[len(path.name.split('.')[0]) :]}")
        path.rename(other)
    return path and [path]


def copied_name(folder, rng):
    """Two files could be one tensor."""
    path = pick(rng, [p for p in arrays(folder) if p.suffix == ".raw" and ".output." not in p.name])
    if path is not None:
        shutil.copyfile(path, path.with_name(f"{path.stem}_RetainedState{path.suffix}"))
    return path and [path]


def empty_file(folder, rng):
    path = pick(rng, [p for p in files_of(folder) if p.stat().st_size > 16])
    if path is None:
        return None
    path.write_bytes(b"")
    return [path]


def noise_in_a_file(folder, rng):
    """Random bytes in place of some elements, as a bad transfer leaves them."""
    path = pick(rng, arrays(folder))
    if path is not None:
        array = read(path)
        at = pick(rng, used(array))
        data = np.frombuffer(rng.bytes(16), array.dtype)
        array.reshape(-1)[at : at + len(data)] = data[: array.size - at]
        write(path, array)
    return path and [path]


def broken_header(folder, rng):
    path = pick(rng, [p for p in files_of(folder) if p.suffix in (".npy", ".npz", ".pb", ".json")])
    if path is not None:
        data = bytearray(path.read_bytes())
        at = int(rng.integers(64))
        data[at : at + 4] = rng.bytes(4)
        path.write_bytes(data)
    return path and [path]


FAULTS = {
    name: function
    for name, function in list(globals().items())
    if callable(function)
    and getattr(function, "__module__", "") == __name__
    and name not in ("files_of", "steps_of", "pick", "arrays", "read", "write", "sizes", "used")
}
