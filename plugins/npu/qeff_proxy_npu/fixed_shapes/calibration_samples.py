"""Inputs to calibrate a backend of fixed shapes with, read from dumps.

A dump holds the inputs of every part at every step (`qeff_proxy.dump`), which a quantizer needs. A
step that is longer than the fixed shape is cut into pieces, as the engine would have run it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qeff_proxy.arrays import Array
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import Dump, read_dump
from qeff_proxy.dump.format import MANIFEST, TensorName, name_tensor
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.errors import UsageError
from qeff_proxy.session.axes import axes_of, terms_of
from qeff_proxy.session.check_feeds import check_feeds
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.tensor_names import PAST, PRESENT, is_state

__all__ = ["digest_of", "dumps_in", "samples_of"]

#: Steps of a part that are run; of more, as many are taken at even distances.
MOST_STEPS = 64


def dumps_in(folder: Path) -> list[Path]:
    """The dumps that a folder is or holds, by name.

    Raises:
        UsageError: There is none.
    """
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise UsageError(
            f"{folder} is no dump and holds none",
            "Give the folder of a dump, as --write-io makes it, or of several.",
        )
    return found


def digest_of(folder: Path) -> str:
    """A hash of what the dumps hold: their manifests have the checksum of every tensor."""
    digest = hashlib.sha256()
    for dump in dumps_in(folder):
        digest.update((dump / MANIFEST).read_bytes())
    return digest.hexdigest()[:16]


def samples_of(folder: Path, part: PartLike, options: CompileOptions) -> Iterator[dict[str, Array]]:
    """Inputs of a part, of sizes that the compiled shapes take.

    Args:
        folder: Of dumps (`dumps_in`).
        part: What they are for.
        options: Of the compilation, with all lengths.

    Raises:
        UsageError: The dumps hold no inputs of this part that fit into ``ctx_len``.
        DumpError: They lack rows of the cache, or are damaged.
    """
    wanted = [name_tensor(part.name, "in", spec.name) for spec in part.inputs]
    steps = [
        (dump, step)
        for dump in map(read_dump, dumps_in(folder))
        for step in dump.steps
        if all(_has(dump, step, name) for name in wanted)
    ]
    count = min(len(steps), MOST_STEPS)
    given = 0
    for number in range(count):
        dump, step = steps[number * len(steps) // count]
        for sample in _pieces(dump, step, part, options):
            given += 1
            yield sample
    if not given:
        raise UsageError(
            f"{folder} holds no inputs of the {part.name} part that fit into the compiled shapes",
            "Calibrate on a dump of all steps and tensors of this export, within ctx_len.",
        )


def _has(dump: Dump, step: StepInfo, name: TensorName) -> bool:
    return (step.phase, name) in dump.tensors or any(
        one.phase == step.phase and one.name == name for one in dump.omitted
    )


def _pieces(
    dump: Dump, step: StepInfo, part: PartLike, options: CompileOptions
) -> Iterator[dict[str, Array]]:
    """The inputs of a part at one step, cut to chunks of ``prefill_seq_len``.

    The last position is added once more alone, as a decode step.
    """

    def read(name: str, direction: str = "in") -> Array:
        key = name_tensor(part.name, "in" if direction == "in" else "out", name)
        return dump.array(step.phase, step.index, key)

    feeds = {spec.name: read(spec.name) for spec in part.inputs}
    sizes = check_feeds(part.name, part.inputs, feeds)
    query, past = sizes.get("query", 1), sizes.get("past", 0)
    context = options.ctx_len
    if "past" not in axes_of(part) or "query" not in axes_of(part):
        if context is None or "past" not in sizes or past + query <= context:
            yield feeds
        return
    most = options.prefill_seq_len or query
    if context is not None:
        query = min(query, context - past)
    chunks = [(start, min(start + most, query)) for start in range(0, query, most)]
    if query > 1:
        chunks.append((query - 1, query))
    if any(is_state(spec.name) for spec in part.inputs):
        chunks = chunks[:1]  # the states between are not in the dump
    for start, stop in chunks:
        yield _cut(part, feeds, lambda name: read(name, "out"), past, start, stop)


def _cut(
    part: PartLike,
    feeds: Mapping[str, Array],
    present: Callable[[str], Array],
    past: int,
    start: int,
    stop: int,
) -> dict[str, Array]:
    """Inputs of the queries from ``start`` to ``stop`` alone, with a past of all before them."""
    reach = {"query": slice(start, stop), "past": slice(0, past + start)}
    found = {}
    for spec in part.inputs:
        array = feeds[spec.name]
        if spec.name.startswith(PAST) and start:
            array = present(spec.name.replace(PAST, PRESENT, 1))
        where = []
        for axis in spec.shape:
            terms = set(terms_of(axis))
            whole = slice(0, past + stop) if {"past", "query"} <= terms else slice(None)
            where.append(reach.get(str(axis), whole))
        found[spec.name] = array[tuple(where)]
    return found
