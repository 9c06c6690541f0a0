"""What the converters share: one part of a dump step by step, and a dump made from steps."""

from __future__ import annotations

import io
import math
import os
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.atomic_folder import replaced_folder
from qeff_proxy.dump.format import MAX_RANK, Direction, Phase, TensorName
from qeff_proxy.dump.manifest import MAX_ELEMENTS, StepInfo
from qeff_proxy.dump.place import DUMPS
from qeff_proxy.dump.reader import Dump
from qeff_proxy.dump.selection import DumpOptions
from qeff_proxy.dump.writer import DumpWriter
from qeff_proxy.errors import DumpError, ProxyError

MAX_FOREIGN_BYTES = 2**34
# What NumPy raises on a damaged .npy header, which it tokenizes and evaluates as Python.
_HEADER_FAULTS = (
    ValueError,
    KeyError,
    SyntaxError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_LONGEST_REASON = 200  # NumPy's reasons repeat the whole header


@dataclass(frozen=True)
class StepArrays:
    """The tensors of one part in one step, by graph name."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


def choose_part(dump: Dump, part: str | None) -> str:
    """Return the part to convert: the one asked for, the only one, or ``body``.

    Raises:
        DumpError: There is no such part, or it must be said which.
    """
    parts = dump.manifest.parts
    if part is None:
        part = parts[0] if len(parts) == 1 else "body"
    if part not in parts:
        raise DumpError(f"{dump.folder} has no part {part!r}", f"Choose one of {', '.join(parts)}.")
    return part


class ConversionSource:
    """One part of a dump, whole tensors by graph name.

    Args:
        dump: What to convert.
        part: Which part of it; see `choose_part`.

    Raises:
        DumpError: There is no such part, or none of its tensors was dumped.
    """

    def __init__(self, dump: Dump, part: str | None = None) -> None:
        self.dump = dump
        self.part = choose_part(dump, part)
        self._names: dict[tuple[Phase, Direction], dict[str, TensorName]] = {}
        for (phase, name), tensor in dump.tensors.items():
            if name.part == self.part:
                known = self._names.setdefault((phase, name.direction), {})
                known[tensor.index.graph_name] = name
        for omitted in dump.omitted:
            if omitted.name.part == self.part:
                rows = dump.tensors.get((omitted.phase, omitted.rows_of))
                if rows is not None:
                    graph = rows.index.graph_name.replace("present.", "past_key_values.", 1)
                    self._names.setdefault((omitted.phase, "in"), {})[graph] = omitted.name
        if not self._names:
            have = sorted({name.part for _, name in dump.tensors})
            raise DumpError(
                f"{dump.folder} holds no tensor of the {self.part} part",
                f"Choose a part of which it does: {', '.join(have)}.",
            )

    def steps(self) -> list[StepInfo]:
        """Return the steps in which the part has tensors."""
        phases = {phase for phase, _ in self._names}
        return [step for step in self.dump.steps if step.phase in phases]

    def graph_names(self, phase: Phase, direction: Direction) -> list[str]:
        """Return the graph's names of the inputs or outputs that were dumped."""
        return list(self._names.get((phase, direction), {}))

    def array(self, step: StepInfo, direction: Direction, graph_name: str) -> NDArray[Any]:
        """Return a whole tensor of one step, in its true dtype.

        Raises:
            DumpError: It is damaged, or rows of the cache were not dumped.
        """
        name = self._names[step.phase, direction][graph_name]
        return self.dump.array(step.phase, step.index, name)

    def arrays(self, step: StepInfo, direction: Direction) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield graph name and whole tensor, one at a time."""
        for graph_name in self.graph_names(step.phase, direction):
            yield graph_name, self.array(step, direction, graph_name)

    def dtype(self, graph_name: str) -> str | None:
        """Return the true dtype of a tensor, or None when the dump does not have it."""
        for (_, name), tensor in self.dump.tensors.items():
            if name.part == self.part and tensor.index.graph_name == graph_name:
                return tensor.index.dtype
        return None


def _is_converted(folder: Path) -> bool:
    """Whether this user made the folder, and it holds files of other tools and nothing else."""
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    return folder.lstat().st_uid == os.getuid() and all(path.suffix in _SUFFIXES for path in files)


#: Of the files of all formats.
_SUFFIXES = {".json", ".pb", ".raw"}
_CONVERTED = replace(DUMPS, is_ours=_is_converted)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``folder`` when the block ends without an error.

    Raises:
        DumpError: ``folder`` exists and is not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows a link
    try:
        _check_empty(folder)
        with replaced_folder(_CONVERTED, folder) as work:
            yield work
            _check_empty(folder)
    except OSError as error:
        raise DumpError(f"{folder} cannot be written: {error.strerror}") from error


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise DumpError(f"{folder} is not empty", "Choose a new folder.")


def write_steps(
    folder: Path,
    steps: Iterable[StepArrays],
    provenance: Mapping[str, Any],
    *,
    like: ConversionSource | None,
    part: str | None,
    labels: list[tuple[Phase, int]] | None = None,
) -> None:
    """Write a dump of steps that another tool recorded.

    Args:
        folder: Of the new dump.
        steps: In the order in which they ran.
        provenance: What is known of their origin.
        like: A dump of the same run; its steps give theirs their phases and numbers.
        part: The name of the part; ``body`` unless given, or that of ``like``.
        labels: Phases and numbers of the steps where the format tells; else all are prefill.

    Raises:
        DumpError: A tensor cannot be dumped, ``like`` has fewer steps, or the disk is full.
    """
    known = [(s.phase, s.index) for s in like.steps()] if like is not None else labels
    name = part or (like.part if like is not None else "body")
    with DumpWriter(folder, provenance, DumpOptions(kv="full")) as writer:
        for number, step in enumerate(steps):
            if known is not None and number >= len(known):
                raise DumpError(f"there are more recorded steps than the {len(known)} expected")
            phase, index = known[number] if known is not None else ("prefill", number)
            writer.step(phase, index, name, step.inputs, step.outputs)


def npy_to_bytes(array: NDArray[Any]) -> bytes:
    """Return ``array`` as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_from_bytes(data: bytes, where: str) -> NDArray[Any]:
    """Return the array in the bytes of a ``.npy`` file that someone else wrote.

    Raises:
        DumpError: It is not one, holds objects, or declares more than it has.
    """
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(buffer)
    except _HEADER_FAULTS as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise DumpError(f"{where} is not a .npy array: {reason}") from error
    remaining = len(data) - buffer.tell()
    plain = not (dtype.hasobject or dtype.names or dtype.subdtype) and dtype.itemsize
    sizes = len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**53 for n in shape)
    if not (plain and sizes) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise DumpError(
            f"{where} declares {str(dtype)[:_LONGEST_REASON]} {str(shape)[:_LONGEST_REASON]}, "
            "which no dump can hold"
        )
    if math.prod(shape) * dtype.itemsize != remaining:
        raise DumpError(f"{where} declares {dtype} {shape}, but {remaining} bytes follow")
    flat = np.frombuffer(data, dtype, offset=buffer.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def read_limited(path: Path, root: Path) -> bytes:
    """Return the bytes of a regular file within ``root``.

    Raises:
        DumpError: It lies outside of ``root``, is not a regular file, or is too large.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve(strict=True)):
            raise DumpError(f"{path} lies outside of {root}")
        if not real.is_file() or real.stat().st_size > MAX_FOREIGN_BYTES:
            raise DumpError(f"{path} is not a regular file of at most {MAX_FOREIGN_BYTES} bytes")
        return real.read_bytes()
    except ProxyError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DumpError(f"{path} cannot be read: {error}") from error
