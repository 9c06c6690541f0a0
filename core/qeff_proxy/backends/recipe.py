"""Recipes: what of a model stays wide where a backend computes the rest in a lower precision.

A recipe names modules (`qeff_proxy.graph.modules`), not nodes: these are looked up in the graph
that is compiled. So it fits each export of the model. A backend that can obey one has the option
``recipe``, the path of its file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.file_errors import reading, writing
from qeff_proxy.common.json_schema import FieldError, read_as
from qeff_proxy.common.write_whole import write_whole
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart

#: The option of backends that obey one.
OPTION = "recipe"
_SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """What of a model stays wide.

    Attributes:
        source: The model it was measured on.
        identity: A hash of the names and shapes of the model's weights.
        backend: The backend it was measured for.
        precision: The precision of all else.
        wide: Module paths, each with an operator's type where only these operators of it are meant
            (``model.layers.3.self_attn:Softmax``). All modules in a module are meant too.
        measured: What was measured, for readers.
    """

    source: str
    identity: str
    backend: str
    precision: str
    wide: tuple[str, ...]
    measured: Mapping[str, float | int | str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as TOML; an older file stays until then.

        Raises:
            ArtifactError: It cannot be written.
        """
        facts = {"schema": _SCHEMA, **{n: v for n, v in vars(self).items() if isinstance(v, str)}}
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()
        ]
        paths = "".join(f"    {json.dumps(one, ensure_ascii=False)},\n" for one in self.wide)
        lines += [f"wide = [\n{paths}]", "", "[measured]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in self.measured.items()]
        try:
            write_whole(path, "\n".join(lines) + "\n")
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be written: {error.strerror}", "Choose another place."
            ) from error


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: There is none, or it is damaged.
    """
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
        schema = value.pop("schema", None)
        if schema != _SCHEMA:
            raise FieldError(f"it has schema {schema!r}, not {_SCHEMA}")
        return read_as(Recipe, value, "the recipe")
    except OSError as error:
        raise UsageError(
            f"the recipe {path} cannot be read: {error.strerror}", "qeff-proxy recipe writes one."
        ) from error
    except ValueError as error:  # FieldError, TOML's and UTF-8's errors are ones
        raise UsageError(
            f"{path} is no recipe: {error}", "qeff-proxy recipe writes one."
        ) from error


def identity_of(export: Export) -> str:
    """A hash of the names and shapes of a model's weights: the same for each export of it."""
    from qeff_proxy.load.safetensors_header import read_header

    with reading(export.folder):
        headers = [read_header(export.folder / name) for name in sorted(export.files)]
    shapes = {name: list(one.shape) for header in headers for name, one in header.items()}
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def name_units_of(model: ir.Model, export: Export, part: ExportedPart) -> None:
    """Name the units of a part's graph; the part may be the embedding or the LM head."""
    from qeff_proxy.graph.modules import name_units

    name_units(model, export.cut.get("sites", {}).get(part.name, {}).get("module"))


def with_recipe(backend: str, options: CompileOptions, path: Path | None) -> CompileOptions:
    """The options with a recipe to obey; unchanged for ``None``.

    Raises:
        UsageError: The backend cannot obey one, it cannot be read, or the options are for another
            precision than its own.
    """
    if path is None:
        return options
    implementation = load_backend(backend)
    if OPTION not in implementation.options:
        raise UsageError(f"backend {backend!r} cannot obey a recipe", "Leave --recipe out.")
    _check_precision(path, read_recipe(path), backend, options)
    options = replace(options, backend={**options.backend, OPTION: str(path.absolute())})
    implementation.check_options(backend, options)
    return options


def _check_precision(path: Path, recipe: Recipe, backend: str, options: CompileOptions) -> None:
    """Refuse options that do not choose the precision of a recipe."""
    chosen = load_backend(backend).precisions.get(recipe.precision)
    if chosen is None:
        raise UsageError(
            f"the recipe {path} is for {recipe.precision} of {recipe.backend}, which {backend} "
            "lacks",
            "Nothing was compiled. Make a recipe for the precision that you compile for.",
        )
    other = {n: v for n, v in chosen.items() if options.backend.get(n, v) != v}
    if other:
        needed = " ".join(f"{name}={value}" for name, value in other.items())
        raise UsageError(
            f"the recipe {path} is for {recipe.precision} of {recipe.backend}, and the options say "
            "otherwise",
            f"Nothing was compiled. Say {needed}, or make a recipe for another precision.",
        )


def check_recipe(export: Export, backend: str, options: CompileOptions) -> str | None:
    """Check a recipe against the whole export that it is for.

    Returns:
        A hash of it; ``None`` where none is to be obeyed.

    Raises:
        UsageError: It is for another model or precision, or a path of it does not exist.
    """
    if OPTION not in options.backend:
        return None
    path = Path(options.backend[OPTION])
    recipe = read_recipe(path)
    _check_precision(path, recipe, backend, options)
    if recipe.identity != identity_of(export):
        raise UsageError(
            f"the recipe {path} is for {recipe.source}, and {export.model['source']} has other "
            "weights",
            "Make one of this model: qeff-proxy recipe.",
        )
    import onnx_ir as ir

    from qeff_proxy.graph.modules import chosen_units, unit_of

    units: dict[str, None] = {}
    for part in export.parts:
        with reading(export.folder):
            model = ir.load(export.folder / part.file)
        name_units_of(model, export, part)
        units.update(dict.fromkeys(unit for node in model.graph if (unit := unit_of(node))))
    missing = [one for one, found in chosen_units(recipe.wide, units).items() if not found]
    if missing:
        raise UsageError(
            f"the recipe {path} names {missing[0]}, which {export.model['source']} does not have",
            "Nothing was compiled. Correct the recipe, or make one anew.",
        )
    return hashlib.sha256(json.dumps(recipe.wide).encode()).hexdigest()


def wide_nodes(options: Mapping[str, Any]) -> Callable[[ir.Node], bool]:
    """Whether a node stays wide, by the recipe among a backend's options.

    Its graph has its units named (`name_units_of`), before nodes are rewritten.
    """
    return _stays(read_recipe(Path(options[OPTION])).wide if OPTION in options else ())


def _stays(wide: Sequence[str]) -> Callable[[ir.Node], bool]:
    from qeff_proxy.graph.modules import chosen_units, unit_of

    def stays(node: ir.Node) -> bool:
        unit = unit_of(node)
        return unit is not None and any(chosen_units(wide, [unit]).values())

    return stays


def wide_nodes_of(
    export: Export, part: ExportedPart, options: Mapping[str, Any]
) -> Sequence[ir.Node]:
    """The nodes of a part's exported graph that stay wide, by the recipe among the options."""
    return _nodes_of(export, part, wide_nodes(options))


def _nodes_of(
    export: Export, part: ExportedPart, stays: Callable[[ir.Node], bool]
) -> Sequence[ir.Node]:
    import onnx_ir as ir

    with reading(export.folder):
        model = ir.load(export.folder / part.file)
    name_units_of(model, export, part)
    return [node for node in model.graph if stays(node)]


def write_nodes(recipe: Recipe, export: Export, backend: str, folder: Path) -> list[Path]:
    """Write the nodes of an export that stay wide, in the form that a backend's own tools read.

    Args:
        recipe: What stays wide.
        export: Whose nodes.
        backend: Whose tools.
        folder: Where to; a file for each part that has any.

    Raises:
        ArtifactError: They cannot be written.
    """
    implementation = load_backend(backend)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
            aside = Path(name)
            for part in export.parts:
                nodes = _nodes_of(export, part, _stays(recipe.wide))
                if nodes:
                    implementation.write_nodes(export.folder / part.file, nodes, aside)
            return [path.replace(folder / path.name) for path in sorted(aside.iterdir())]
