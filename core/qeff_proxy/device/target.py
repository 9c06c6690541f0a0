"""What differs from tool to tool: how files are laid out, the command, how outputs come back.

A package registers a target as an entry point of the group ``qeff_proxy.device_targets``: its name
→ ``module:class``, a class derived from `Target`. Everything else (shapes, dtypes, layouts, names,
steps) is common to all: `qeff_proxy.device.pack_dump` and `qeff_proxy.device.unpack_outputs`.
"""

from __future__ import annotations

import mmap
import os
import re
import shlex
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.device.index import Index, PackedRun, PackedTensor
from qeff_proxy.device.names import file_stem
from qeff_proxy.dump.format import DTYPES, Direction, Phase, as_values
from qeff_proxy.errors import DumpError, UsageError
from qeff_proxy.plugins.entry_points import find_entry, load_entry

GROUP = "qeff_proxy.device_targets"
#: The targets of the core: name → class.
BUILTIN_TARGETS = {
    "npy": "qeff_proxy.device.targets.numpy_files:NpyTarget",
    "npz": "qeff_proxy.device.targets.numpy_files:NpzTarget",
    "onnx": "qeff_proxy.device.targets.onnx_data:OnnxTarget",
    "polygraphy": "qeff_proxy.device.targets.polygraphy:PolygraphyTarget",
}
#: Where the device's outputs are expected in a packed folder.
OUTPUTS = "outputs"

#: Yields the inputs or outputs of a run as the files are to have them.
Reader = Callable[[PackedRun, Direction], Iterator[tuple[PackedTensor, NDArray[Any]]]]


@dataclass(frozen=True)
class Group:
    """The runs of one binary of one set of shapes.

    Attributes:
        folder: The packed folder, in which the tool's commands run.
        name: Of the group: its folder in the packed folder, and below ``outputs/``.
        runs: In order.
        outputs: Where the device's outputs are.
    """

    folder: Path
    name: str
    runs: Sequence[PackedRun]
    outputs: Path

    @property
    def place(self) -> Path:
        """The group's folder in the packed folder."""
        return self.folder / self.name

    def binary(self, variable: str) -> str:
        """The shell's word for the group's binary: ``$BINARY_<GROUP>`` if set, else ``$BINARY``.

        Groups differ in shapes, and so in their binaries, unless one binary holds all.
        """
        own = f"{variable}_{re.sub('[^A-Za-z0-9]', '_', self.name).upper()}"
        return f'"${{{own}:-${{{variable}:?set it, or {own}, to the compiled binary}}}}"'


@dataclass(frozen=True)
class Found:
    """A tensor that a tool wrote.

    Attributes:
        name: What the tool calls it.
        where: File (and place in it), for messages.
        raw: The file, where it holds bytes without dtype and shape.
        dtype: The dtype that the tool states, or None.
        certain: Whether it does; else it states the size of an element, and any dtype of that size
            may be meant.
        shape: The shape that the tool states, or None.
        load: Returns the array, where the file states dtype and shape.
    """

    name: str
    where: str
    raw: Path | None = None
    dtype: str | None = None
    certain: bool = True
    shape: tuple[int, ...] | None = None
    load: Callable[[], NDArray[Any]] | None = None


@dataclass(frozen=True)
class Recorded:
    """A run that a tool recorded without an index.

    Attributes:
        phase: Of the step, where its path says it.
        index: Of the step within its phase, where its path says it.
        number: Of the run in the tool's own count.
        inputs: What went in.
        outputs: What came out.
    """

    phase: Phase | None
    index: int | None
    number: int
    inputs: list[Found]
    outputs: list[Found]


class Target(ABC):
    """One tool.

    Args:
        model: The part's ``.onnx``, for targets that number their files in the graph's order.
        runner: Whose outputs are read, where a file holds those of several.
    """

    #: As the user names it.
    name: ClassVar[str]
    #: Runs may share a binary's cache, so that the device can carry its own.
    carries_cache: ClassVar[bool] = False
    #: The tool runs one binary of fixed shapes on each list.
    one_shape: ClassVar[bool] = False
    #: The dtype of all files unless ``--dtype`` is given, or None: the tensor's own.
    plain_dtype: ClassVar[str | None] = None
    #: Which of the arguments it has a use for.
    uses: ClassVar[tuple[str, ...]] = ()
    #: Where a cache's valid rows lie in files without an index.
    rows: ClassVar[str] = "whole"

    def __init__(self, *, model: Path | None = None, runner: str | None = None) -> None:
        self.model = model
        self.runner = runner

    def file_dtype(self, dtype: str) -> str:
        """The dtype of the file of a tensor, unless the user says another."""
        return dtype

    @abstractmethod
    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write the runs of a group, and return the commands that run them.

        Args:
            group: The runs; the files go below its name in its folder.
            read: Yields a run's tensors, one at a time.
        """

    @abstractmethod
    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield what came back for each run of a group; nothing for a missing run.

        Raises:
            DumpError: A file is damaged, or it cannot be told which run it is of.
        """

    def find_recorded(self, path: Path) -> Iterator[Recorded]:  # noqa: ARG002
        """Yield the runs that the tool wrote without an index.

        Raises:
            DumpError: A file is damaged, or the tool's files do not say what they are.
        """
        raise UsageError(
            f"files of {self.name} do not say which tensor of which step they are",
            "Name the folder that pack wrote.",
        )


def groups_of(index: Index, folder: Path, outputs: Path) -> list[Group]:
    """The groups of a packed folder; a single one's outputs may lie in ``outputs`` itself."""
    groups = index.groups()
    if len(groups) == 1:
        (name,) = groups
        place = outputs / name
        if outputs.is_dir() and not (place.is_dir() and any(place.iterdir())):
            return [Group(folder, name, groups[name], outputs)]
    return [Group(folder, name, runs, outputs / name) for name, runs in groups.items()]


def load_target(name: str, **options: Any) -> Target:
    """The target of this name.

    Args:
        name: Of the target.
        options: Arguments of `Target`; those that are None are not given.

    Raises:
        UsageError: There is none, or it has no use for an option.
        PluginError: Its package cannot be used.
    """
    from qeff_proxy.errors import PluginError

    try:
        entry = find_entry(GROUP, "target", name, BUILTIN_TARGETS)
    except PluginError as error:
        raise UsageError(error.problem, error.hint) from error
    target: Target = load_entry(entry, "target", lambda kind: kind(**options))
    for option, value in options.items():
        if value is not None and option not in target.uses:
            raise UsageError(f"{name} has no use for --{option}", "Leave it out.")
    return target


def input_path(run: PackedRun, tensor: PackedTensor, ending: str) -> str:
    """``<group>/<step>/<tensor><ending>``, within the packed folder."""
    return f"{run.group}/{run.label}/{file_stem(tensor.name)}{ending}"


def prepare(folder: Path, run: PackedRun, ending: str) -> Path:
    """Make the folder of a run's files, and refuse tensors whose files would have one name."""
    stems: dict[str, str] = {}
    for tensor in run.inputs:
        other = stems.setdefault(file_stem(tensor.name).casefold(), tensor.name)
        if other != tensor.name:
            raise DumpError(f"{other!r} and {tensor.name!r} would both be {other}{ending}")
    place = folder / run.group / run.label
    place.mkdir(parents=True)
    return place


def write_raw(path: Path, array: NDArray[Any]) -> None:
    """Write an array's bytes, little-endian, in C order."""
    stored = np.ascontiguousarray(array)
    stored = stored.astype(stored.dtype.newbyteorder("<"), copy=False)
    with path.open("xb") as file:
        file.write(stored.reshape(-1).view(np.uint8).data)


def map_raw(
    path: Path, dtype: str, shape: tuple[int, ...], root: Path | None = None
) -> NDArray[Any]:
    """Map a raw file of exactly this dtype and shape into memory, read-only.

    Raises:
        DumpError: It has another size, is no regular file, or lies outside of ``root``.
    """
    check_within(path, root)
    stored = np.dtype(DTYPES[dtype].stored)
    count = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
    if raw_size(path) != count:
        raise DumpError(f"{path} has {raw_size(path)} bytes, not the {count} of {dtype} {shape}")
    if not count:
        return as_values(np.empty(shape, stored), dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return as_values(np.frombuffer(mapped, stored).reshape(shape), dtype)


def raw_size(path: Path) -> int:
    """The size of a regular file.

    Raises:
        DumpError: It cannot be read, or is not a regular file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise DumpError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DumpError(f"{path} is not a regular file")
    return status.st_size


def check_within(path: Path, root: Path | None) -> None:
    """Refuse a file that a link or ``..`` puts outside of ``root``."""
    try:
        outside = root is not None and not path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a circle of links, a null in the name
        raise DumpError(f"{path} cannot be read: {error}") from error
    if outside:
        raise DumpError(f"{path} lies outside of {root}")


def raw_files(folder: Path, endings: Iterable[str] = (".raw",)) -> list[Found]:
    """The raw files in a folder and the folders below it, by the name that their path spells."""
    found = []
    for path in sorted(folder.rglob("*")):
        ending = next((each for each in endings if path.name.endswith(each)), None)
        if ending is not None and not path.is_dir():
            name = os.fspath(path.relative_to(folder)).removesuffix(ending)
            check_within(path, folder)
            found.append(Found(name, str(path), raw=path))
    return found


def quoted(path: str | Path) -> str:
    """A path as a word of a shell."""
    return shlex.quote(os.fspath(path))
