"""Locate: ask the model's plugin where its ends are, and check the answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import PluginError
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def locate_sites(model: PreTrainedModel, hooks: Hooks) -> dict[str, Site | Absent]:
    """Ask for both sites.

    Returns:
        ``{"embedding": …, "lm_head": …}``.

    Raises:
        UnsupportedModelError: No plugin knows one of them.
        PluginError: A plugin named a module or parameter that the model does not have.
    """
    sites = {
        "embedding": hooks.locate_embedding(model=model, config=model.config),
        "lm_head": hooks.locate_lm_head(model=model, config=model.config),
    }
    for name, site in sites.items():
        if isinstance(site, Site):
            _check(model, hooks.plugin, name, site)
    return sites


def site_to_json(site: Site | Absent) -> dict[str, object]:
    """A site as a JSON object: ``{"absent": reason}``, or where it is and what belongs to it."""
    if isinstance(site, Absent):
        return {"absent": site.reason}
    return {
        "module": site.module,
        "tables": list(site.tables),
        "scale": site.scale,
        "follows": list(site.follows),
    }


def _check(model: PreTrainedModel, plugin: str, name: str, site: Site) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    where = f"the {name} of {type(model).__name__}"
    if site.module not in modules:
        raise PluginError(
            f"plugin {plugin} locates {where} at {site.module!r}, where there is no module",
            _near(site.module, modules),
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [table for table in site.tables if table not in parameters]
    if unknown:
        raise PluginError(
            f"plugin {plugin} names {unknown[0]!r} as part of {where}, where there is no such "
            "parameter",
            _near(unknown[0], parameters),
        )
    module = modules[site.module]
    if not site.tables and not any(one.dim() > 1 for one in module.parameters()):
        raise PluginError(
            f"plugin {plugin} locates {where} at {site.module!r}, {type_named(module)}, which "
            "holds no table",
            "Name the module with a row for each token.",
        )


def _near(wanted: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wanted, [path for path in known if path], n=3, cutoff=0.6)
    return f"Near it are {', '.join(near)}." if near else "Its paths are those of named_modules()."
