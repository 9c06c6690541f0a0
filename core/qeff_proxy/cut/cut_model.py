"""Cut: a model and its sites become a proxy, verified before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qeff_proxy.common.private_names import model_classes
from qeff_proxy.common.shared_change import one_model_at_a_time
from qeff_proxy.cut.locate_sites import locate_sites, site_to_json
from qeff_proxy.cut.model_snapshot import changes_between, snapshot_model
from qeff_proxy.errors import CheckpointError, CutError, PluginError, UnsupportedModelError
from qeff_proxy.flows.equality import NEEDS_PLUGIN
from qeff_proxy.flows.flow import CheckedFlow, CutReport, load_flow
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.load.mapped_memory import few_pages
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.plugins.entry_points import GENERIC
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Settings of a config that has a tower, and what the tower takes; methods of a model likewise.
_TOWERS = {"vision_config": "images", "audio_config": "sound"}
_METHODS = {"get_image_features": "images", "get_audio_features": "sound"}
#: The extra that brings plugins for it.
_EXTRAS = {"images": "vision", "sound": "audio"}


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


@one_model_at_a_time
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
    _check_towers(model, hooks)
    before = snapshot_model(model)
    with few_pages(model):
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
            "It must build parts of its own (qeff_proxy.layers.replace_modules): what it changes "
            "would be changed in the reference, too.",
        )
    if kind == "split":
        _check_body(loaded, proxy, sites)
    report = None
    if verify and kind != "stub":
        modules = (model, *(part.module for part in proxy.parts))
        with _sites_run_in_their_parts(loaded, proxy, sites), _blame(hooks), few_pages(*modules):
            report = load_flow(proxy.flow).verify(model, proxy, sites)
    _check_processor(loaded, proxy, hooks)
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


def _check_processor(loaded: LoadedModel, proxy: Proxy, hooks: Hooks) -> None:
    """Let the flow see whether the checkpoint's processor, where it has one, fits the parts."""
    flow = load_flow(proxy.flow)
    if loaded.folder is None or not isinstance(flow, CheckedFlow):
        return
    try:
        processor = load_processor(loaded.folder, trust_remote_code=loaded.trust_remote_code)
    except CheckpointError:  # it may be run on tensors
        return
    flow.check_processor(
        proxy, processor, lambda request: hooks.preprocess(processor=processor, request=request)
    )


def _check_towers(model: PreTrainedModel, hooks: Hooks) -> None:
    """Refuse a model of images or sounds that no plugin claims: its cut would drop the towers."""
    if hooks.plugin != GENERIC:
        return
    config = model.config
    inputs = [what for name, what in _TOWERS.items() if getattr(config, name, None) is not None]
    if type(model) is model_classes("AutoModelForImageTextToText").get(type(config), None):
        inputs.append("images")
    inputs += [what for name, what in _METHODS.items() if hasattr(model, name)]
    if inputs:
        raise UnsupportedModelError(
            f"{hooks.model_type!r} models take {inputs[0]}, and no plugin exports their tower",
            f"pip install 'qeff-proxy[{_EXTRAS[inputs[0]]}]' installs those for {inputs[0]}; "
            "`qeff-proxy plugins` lists the model types of the installed plugins.",
        )


def _check_body(loaded: LoadedModel, proxy: Proxy, sites: dict[str, Site | Absent]) -> None:
    """Make sure that a split has a part for each site."""
    names = [part.name for part in proxy.parts]
    for name, site in sites.items():
        if isinstance(site, Site) and name not in names:
            raise CutError(
                f"{type(loaded.model).__name__} was cut at its {name} ({site.module}), but the "
                f"plugin gave no {name} part, only {', '.join(names)}"
            )


@contextmanager
def _sites_run_in_their_parts(
    loaded: LoadedModel, proxy: Proxy, sites: dict[str, Site | Absent]
) -> Iterator[None]:
    """Refuse a split in which a site's module runs in the body: equal or not, it is not cut."""
    if proxy.kind != "split":
        yield
        return
    running: list[str] = []  # the part that runs, if any
    wrong: list[tuple[str, str, str]] = []
    own = {part.name for part in proxy.parts if part.weights == "vocabulary"} | set(sites)

    def begin(part_name: str, *_: Any) -> None:
        running.append(part_name)

    def end(*_: Any) -> None:
        running.clear()

    def note(name: str, path: str, *_: Any) -> None:
        wrong.extend((one, name, path) for one in running if one not in own)

    with ExitStack() as handles:
        for part in proxy.parts:
            before = part.module.register_forward_pre_hook(partial(begin, part.name))
            after = part.module.register_forward_hook(end, always_call=True)
            handles.callback(before.remove)
            handles.callback(after.remove)
        for name, site in sites.items():
            if isinstance(site, Site):
                module = loaded.model.get_submodule(site.module)
                handle = module.register_forward_pre_hook(partial(note, name, site.module))
                handles.callback(handle.remove)
        yield
    if wrong:
        part_name, name, path = wrong[0]
        raise CutError(
            f"the {part_name} part runs {path}, which was located as the {name}",
            f"That is not where the model's {name} is, or the plugin's build_proxy must keep it "
            "out of that part.",
        )


@contextmanager
def _blame(hooks: Hooks) -> Iterator[None]:
    """Name the plugin in an error of the comparison: its author knows what to look for."""
    try:
        yield
    except CutError as error:
        if error.hint != NEEDS_PLUGIN or hooks.distribution == "qeff-proxy":
            raise
        raise CutError(
            error.problem,
            f"Plugin {hooks.plugin!r} cut it: a site is not where it says, or its build_proxy "
            "leaves out what the model does between them, such as a scale, a bias, a soft cap or "
            "its positions.",
        ) from error
