"""Cut: a model and its sites become a proxy, verified before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qeff_proxy.errors import CutError, PluginError
from qeff_proxy.flows import CutReport, load_flow
from qeff_proxy.locate import locate_sites, site_to_json
from qeff_proxy.sites import Absent, Site
from qeff_proxy.unchanged import changes_between, snapshot_model

if TYPE_CHECKING:
    from qeff_proxy.load import LoadedModel
    from qeff_proxy.parts import Kind, Proxy
    from qeff_proxy.plugin_hooks import Hooks

__all__ = ["Cut", "cut_model", "site_weights"]


@dataclass(frozen=True)
class Cut:
    """A model, cut.

    Attributes:
        proxy: Its parts.
        sites: What was located.
        report: What was verified; ``None`` for stubs, whose values mean nothing.
    """

    proxy: Proxy
    sites: dict[str, Site | Absent]
    report: CutReport | None

    def to_json(self) -> dict[str, Any]:
        """The sites and the report as a JSON object."""
        return {
            "sites": {name: site_to_json(site) for name, site in self.sites.items()},
            "verified": self.report.to_json() if self.report is not None else None,
        }


def cut_model(loaded: LoadedModel, hooks: Hooks, kind: Kind, *, verify: bool = True) -> Cut:
    """Locate the sites of a model, cut it there and verify the cut.

    Args:
        loaded: The model. It is not changed.
        hooks: Of its model type.
        kind: ``"split"``, ``"stub"`` or ``"whole"``.
        verify: Leave out the verification with ``False``, to look at a cut that fails.

    Raises:
        UnsupportedModelError: No plugin knows how to cut it.
        CutError: The parts do not equal the model.
        PluginError: The plugin failed, or changed the model.
    """
    model = loaded.model
    before = snapshot_model(model)
    sites = locate_sites(model, hooks)
    proxy = hooks.build_proxy(
        model=model,
        embedding=sites["embedding"],
        lm_head=sites["lm_head"],
        kind=kind,
        options=loaded.options,
    )
    if changes := changes_between(before, snapshot_model(model)):
        raise PluginError(
            f"plugin {hooks.plugin!r} changed the model of type {hooks.model_type!r} while it "
            f"located and cut: {changes[0]}",
            "It must build parts of its own (qeff_proxy.surgery.replace_modules): what it changes "
            "would be changed in the reference, too.",
        )
    if kind == "split":
        _check_body(loaded, proxy, sites)
    report = None
    if verify and kind != "stub":
        report = load_flow(proxy.flow).verify(model, proxy, sites)
    return Cut(proxy, sites, report)


def site_weights(loaded: LoadedModel, site: Site | Absent) -> set[str]:
    """Names of the parameters that belong to a site, under every name they have."""
    if isinstance(site, Absent):
        return set()
    model = loaded.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if site.tables:
        own = {id(parameters[name]) for name in site.tables}
    else:
        own = {id(parameter) for parameter in model.get_submodule(site.module).parameters()}
    return {name for name, parameter in parameters.items() if id(parameter) in own}


def _check_body(loaded: LoadedModel, proxy: Proxy, sites: dict[str, Site | Absent]) -> None:
    """A split has all the parts that its sites call for."""
    names = [part.name for part in proxy.parts]
    for name, site in sites.items():
        if isinstance(site, Site) and name not in names:
            raise CutError(
                f"{type(loaded.model).__name__} was cut at its {name} ({site.module}), but the "
                f"plugin gave no {name} part, only {', '.join(names)}"
            )
