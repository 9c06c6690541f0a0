"""The plan of a sweep: models by tasks, backends, settings and inputs, from a TOML file.

A cell is one of each, and its name says which: ``MODEL/BACKEND/SETTING/INPUT``.
"""

from __future__ import annotations

import collections
import difflib
import glob
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qeff_proxy.common.json_schema import Count, FieldError, Text, check_fields
from qeff_proxy.dump.selection import matches_any
from qeff_proxy.errors import UsageError
from qeff_proxy.load.tasks import CUT_OPTIONS, TASKS

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Name = Annotated[str, msgspec.Meta(pattern=r"\A[^/\s*?\[\]]+\Z")]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How a cell exports, compiles and compares; the names are those of ``qeff-proxy verify``.

    Attributes:
        by_layer: Verify one layer at a time, as ``verify --by-layer``; a number splits the layers
            into so many cells, which run beside each other.
        options: Options of one backend, by its name in the plan.
        tol: Tolerances, each as after ``--tol``.
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    proxy: Literal["split", "none"] = "split"
    taps: Text | None = None
    opset: Count | None = None
    batch_size: Count = 1
    prefill_seq_len: Count | None = None
    ctx_len: Count | None = None
    seq_len: tuple[Count, ...] | None = None
    num_cores: Count | None = None
    max_new_tokens: Count = 8
    tol: tuple[Text, ...] = ()
    calibrate: Text | None = None
    speed: bool = False
    by_layer: bool | Count = False
    options: dict[str, dict[str, Any]] = {}


def changed_keys(setting: Setting) -> dict[str, Any]:
    """The keys of a setting that differ from the defaults."""
    plain: dict[str, Any] = msgspec.to_builtins(setting)
    usual = msgspec.to_builtins(Setting())
    return {key: value for key, value in plain.items() if value != usual[key]}


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """An input; an empty table is the example of ``qeff-proxy verify`` for the model."""

    prompts: tuple[Text, ...] = ()
    ids: tuple[tuple[Count, ...], ...] = ()
    audio: tuple[Text, ...] = ()
    images: tuple[Text, ...] = ()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model, which cells of it are wanted (globs), and what differs for it.

    Attributes:
        source: A checkpoint's folder or hub id, or an export's folder; with a glob, every folder
            that matches is a model named by its folder.
        override: Keys of a setting that win over those of every setting.
    """

    source: Text
    tasks: tuple[Literal[tuple(TASKS)], ...] = ()  # type: ignore[valid-type]
    cut_options: dict[Literal[CUT_OPTIONS], Any] = {}  # type: ignore[valid-type]
    trust_remote_code: bool = False
    allow_pickle: bool = False
    backends: tuple[Text, ...] = ("*",)
    settings: tuple[Text, ...] = ("*",)
    inputs: tuple[Text, ...] = ("*",)
    override: dict[str, Any] = {}
    time_limit: _Positive | None = None
    memory_limit: _Positive | None = None
    cores: Count | None = None
    resources: dict[_Name, _Positive] = {}


class _Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A backend of the plan; ``backend`` is its name in the program, where that differs."""

    backend: Text | None = None
    options: dict[str, Any] = {}
    resources: dict[_Name, _Positive] = {}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    models: dict[_Name, Model | Text]
    backends: dict[_Name, _Backend] = msgspec.field(
        default_factory=lambda: {"onnxruntime": _Backend()}
    )
    settings: dict[_Name, Setting] = msgspec.field(default_factory=lambda: {"default": Setting()})
    inputs: dict[_Name, Input] = msgspec.field(default_factory=lambda: {"example": Input()})
    include: tuple[Text, ...] = ("*",)
    exclude: tuple[Text, ...] = ()
    ledger: Text = "ledger.jsonl"
    time_limit: _Positive = 1800
    memory_limit: _Positive | None = None
    cores: Count | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One verification: plain data, so that it can be sent to another process or machine.

    Attributes:
        name: ``MODEL/BACKEND/SETTING/INPUT``.
        piece: Which of how many pieces of the layers, of a setting that splits them.
        backend: The backend's name in the program.
        options: Of the backend.
        time_limit: Seconds.
        memory_limit: Gigabytes (10⁹ bytes) of the cell's processes together.
        cores: That it takes; by default the executor's choice.
        resources: What else it takes, such as ``{"npu": 1}``.
    """

    name: str
    source: str
    task: str | None
    cut_options: dict[str, Any]
    trust_remote_code: bool
    allow_pickle: bool
    backend: str
    options: dict[str, Any]
    setting: Setting
    input: Input
    time_limit: float
    memory_limit: float | None
    piece: tuple[int, int] = (1, 1)
    cores: int | None = None
    resources: dict[str, float] = {}

    @property
    def model(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The cells, in the order of the plan, and where their results are kept."""

    path: Path
    ledger: Path
    cells: tuple[Cell, ...]


def read_plan(path: str | Path, ledger: Path | None = None) -> Plan:
    """Read a plan; paths in it are relative to its folder.

    Args:
        path: The file.
        ledger: The ledger, in place of the plan's own.

    Raises:
        UsageError: It cannot be read, or has an unknown key or a wrong value; names it.
    """
    path = Path(path).expanduser()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise UsageError(f"the plan {path} is no TOML: {error}") from error
    try:
        _check_keys(document, str(path))
        file = check_fields(_File, document, str(path))
        cells = tuple(_cells_of(file, path.resolve().parent, str(path)))
    except FieldError as error:
        raise UsageError(f"{error}", "See docs/sweeps.md for the keys of a plan.") from error
    ledger = ledger or path.parent / file.ledger
    if ledger.suffix != ".jsonl":
        raise UsageError(f"the ledger {ledger} of {path} is no .jsonl file", "Rename it.")
    if not cells:
        raise UsageError(
            f"{path} has no cells: nothing matches its includes, excludes and globs",
            "Correct them; the name of a cell is MODEL/BACKEND/SETTING/INPUT.",
        )
    counts = collections.Counter(cell.name for cell in cells)
    double, count = counts.most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path} has two cells called {double}", "Rename one of the models.")
    return Plan(path=path, ledger=ledger, cells=cells)


def _check_keys(document: Mapping[str, Any], where: str) -> None:
    """Refuse keys that no table has, with the nearest that it has."""
    _refuse_unknown(document, _File, where)
    kinds: dict[str, type[msgspec.Struct]] = {
        "models": Model,
        "backends": _Backend,
        "settings": Setting,
        "inputs": Input,
    }
    for section, kind in kinds.items():
        tables = document.get(section, {})
        for name, table in tables.items() if isinstance(tables, dict) else ():
            if isinstance(table, dict):
                _refuse_unknown(table, kind, f"[{section}.{name}] of {where}")
                if isinstance(override := table.get("override"), dict) and kind is Model:
                    _refuse_unknown(override, Setting, f"override of [{section}.{name}] of {where}")


def _refuse_unknown(table: Iterable[str], kind: type[msgspec.Struct], where: str) -> None:
    for key in table:
        if key not in kind.__struct_fields__:
            near = difflib.get_close_matches(key, kind.__struct_fields__, 1, 0.0)
            raise UsageError(f"{where} has an unknown key {key!r}", f"The nearest is {near[0]!r}.")


def _cells_of(file: _File, folder: Path, where: str) -> Iterable[Cell]:
    for setting_name, setting in file.settings.items():
        _check_known(setting.options, file.backends, f"options of [settings.{setting_name}]")
    for model_name, model in _models_of(file, folder):
        known = (model.backends, file.backends), (model.settings, file.settings)
        for globs, names in (*known, (model.inputs, file.inputs)):
            _check_globs(globs, names, f"[models.{model_name}] of {where}")
        for task in model.tasks or (None,):
            title = model_name if len(model.tasks) < 2 else f"{model_name}:{task}"
            for backend_name, backend in _chosen(file.backends, model.backends):
                for setting_name, setting in _chosen(file.settings, model.settings):
                    changed = {**msgspec.to_builtins(setting), **model.override}
                    chosen = check_fields(Setting, changed, f"override of [models.{model_name}]")
                    _check_by_layer(chosen, f"{title}/{backend_name}/{setting_name} of {where}")
                    chosen_inputs = _chosen(file.inputs, model.inputs)
                    for (input_name, each), piece in product(chosen_inputs, _pieces(chosen)):
                        number = "" if piece[1] == 1 else f":{piece[0]}of{piece[1]}"
                        name = f"{title}/{backend_name}/{setting_name}{number}/{input_name}"
                        if not matches_any(name, file.include) or matches_any(name, file.exclude):
                            continue
                        yield Cell(
                            name=name,
                            source=_placed(model.source, folder),
                            task=task,
                            cut_options=dict(model.cut_options),
                            trust_remote_code=model.trust_remote_code,
                            allow_pickle=model.allow_pickle,
                            backend=backend.backend or backend_name,
                            options={**backend.options, **chosen.options.get(backend_name, {})},
                            setting=msgspec.structs.replace(
                                chosen,
                                options={},
                                calibrate=chosen.calibrate and _placed(chosen.calibrate, folder),
                            ),
                            input=msgspec.structs.replace(
                                each,
                                audio=tuple(_placed(path, folder) for path in each.audio),
                                images=tuple(_placed(path, folder) for path in each.images),
                            ),
                            time_limit=model.time_limit or file.time_limit,
                            memory_limit=model.memory_limit or file.memory_limit,
                            piece=piece,
                            cores=model.cores or file.cores,
                            resources={**backend.resources, **model.resources},
                        )


def _pieces(setting: Setting) -> list[tuple[int, int]]:
    """Each piece of the layers, and how many there are."""
    count = max(int(setting.by_layer), 1)
    return [(number, count) for number in range(1, count + 1)]


def _check_by_layer(setting: Setting, where: str) -> None:
    for name in ("taps", "calibrate", "speed"):
        if setting.by_layer and getattr(setting, name):
            raise UsageError(f"{where} has both by_layer and {name}", "They exclude each other.")


def _models_of(file: _File, folder: Path) -> Iterable[tuple[str, Model]]:
    """The models by name; a source with a glob stands for every folder that it matches."""
    for name, model in file.models.items():
        table = Model(source=model) if isinstance(model, str) else model
        if not glob.has_magic(table.source):
            yield name, table
            continue
        pattern = str(Path(table.source).expanduser())
        matches = sorted(glob.glob(str(folder / pattern)))  # noqa: PTH207 (absolute patterns, too)
        folders = [Path(match) for match in matches if Path(match).is_dir()]
        if not folders:
            raise UsageError(f"no folder matches the source {table.source!r} of [models.{name}]")
        for each in folders:
            yield each.name, msgspec.structs.replace(table, source=str(each))


def _chosen(tables: Mapping[str, Any], globs: Sequence[str]) -> list[tuple[str, Any]]:
    return [(name, table) for name, table in tables.items() if matches_any(name, globs)]


def _check_globs(globs: Iterable[str], names: Iterable[str], where: str) -> None:
    for pattern in globs:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"{where} names {pattern!r}, which is none of {', '.join(names)}")


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{where} names {name!r}, which is none of {', '.join(known)}")


def _placed(text: str, folder: Path) -> str:
    """A path relative to the plan; a hub id, a URL or an absolute path stays."""
    place = folder / Path(text).expanduser()
    return str(place) if place.exists() or text.startswith((".", "~")) else text
