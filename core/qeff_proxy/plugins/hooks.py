"""Check a plugin's hooks, and call them, with the core's generic plugin as the fallback.

1. `hook_names` lists an imported plugin's hooks, and raises `InvalidPluginError` if one is wrong.
2. `Hooks` has five methods for one model type. The owner answers; where it lacks the hook or
   answers ``None``, the generic plugin does.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from traceback import walk_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, get_args

import pluggy

from qeff_proxy import hookspecs
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import PluginError, ProxyError, UnsupportedModelError, UsageError
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.plugins.entry_points import GENERIC
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class InvalidPluginError(Exception):
    """An imported plugin has wrong hooks."""


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def hook_names(plugin: object) -> tuple[str, ...]:
    """The hooks that ``plugin`` implements, sorted.

    Raises:
        InvalidPluginError: It has none, misspells one, takes an argument a hook does not have, was
            written for another version of the hooks, or is a class instead of an object.
    """
    version = getattr(plugin, "qeff_proxy_api", hookspecs.HOOK_API_VERSION)
    if version != hookspecs.HOOK_API_VERSION:
        older = isinstance(version, int) and version < hookspecs.HOOK_API_VERSION
        raise InvalidPluginError(
            f"it was written for version {version!r} of the hooks, and this qeff-proxy has "
            f"version {hookspecs.HOOK_API_VERSION}; install a newer "
            + ("release of the plugin" if older else "qeff-proxy")
        )
    if inspect.isclass(plugin):
        raise InvalidPluginError("it is a class; name an instance of it")
    manager = _new_manager()
    known = [name for name in vars(manager.hook) if not name.startswith("_")]
    names = []
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        name = options.get("specname") or attribute
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"hooks are {', '.join(known)}"
            raise InvalidPluginError(f"there is no hook {name!r}; {advice}")
        names.append(name)
    if not names:
        raise InvalidPluginError("it has no hook; mark its functions with qeff_proxy.hookimpl")
    try:
        manager.register(plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        said = " ".join(str(error).split())
        raise InvalidPluginError(
            f"{said} (version {hookspecs.HOOK_API_VERSION} of the hooks; see qeff_proxy.hookspecs)"
        ) from error
    return tuple(sorted(set(names)))


class Hooks:
    """The five hooks for one model type, answered by its owner or by the generic plugin.

    A `ProxyError` from a plugin passes unchanged. Any other exception becomes a `PluginError` that
    names the plugin, the hook and the model type, with the original exception chained to it.

    Attributes:
        model_type: The model type.
        plugin: The owner's name, or ``"generic"`` when no plugin claims the model type.
        distribution: The package the owner came from; ``None`` when registered from Python.
        version: That package's version; ``None`` likewise.
    """

    def __init__(
        self,
        model_type: str,
        generic: object,
        *,
        owner: object | None = None,
        plugin: str = GENERIC,
        distribution: str | None = None,
        version: str | None = None,
    ) -> None:
        self.model_type = model_type
        self.plugin = plugin
        self.distribution = distribution
        self.version = version
        # A manager of their own, so that no other plugin can ever take part.
        self._manager = _new_manager()
        if owner is not None:
            self._manager.register(owner, plugin)
        # After the owner and ``trylast``, so that it is last even where the owner says trylast.
        self._manager.register(generic, GENERIC)
        for caller in self._manager.get_hookcallers(generic) or ():
            if not all(impl.trylast for impl in caller.get_hookimpls() if impl.plugin is generic):
                raise ValueError(f"the generic plugin's {caller.name} must be trylast")

    def locate_embedding(self, model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent:
        """Where the token embedding is (`qeff_proxy.hookspecs.locate_embedding`).

        Raises:
            UnsupportedModelError: Neither the owner nor the generic plugin knows.
            PluginError: A plugin failed, or returned an object of another type.
        """
        answer = self._ask("locate_embedding", Site | Absent, model=model, config=config)
        return cast("Site | Absent", self._known(answer, "where the token embedding of", model))

    def locate_lm_head(self, model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent:
        """Where the LM head is. As `locate_embedding`."""
        answer = self._ask("locate_lm_head", Site | Absent, model=model, config=config)
        return cast("Site | Absent", self._known(answer, "where the LM head of", model))

    def build_proxy(
        self,
        model: PreTrainedModel,
        embedding: Site | Absent,
        lm_head: Site | Absent,
        kind: Kind,
        options: Mapping[str, Any] | None = None,
    ) -> Proxy:
        """The model, cut (`qeff_proxy.hookspecs.build_proxy`). Errors as in `locate_embedding`."""
        answer = self._ask(
            "build_proxy",
            Proxy,
            model=model,
            embedding=embedding,
            lm_head=lm_head,
            kind=kind,
            options=options or {},
        )
        return cast("Proxy", self._known(answer, f"what a {kind} of", model))

    def preprocess(self, processor: Any, request: Request) -> Mapping[str, torch.Tensor]:
        """The named input tensors (`qeff_proxy.hookspecs.preprocess`).

        Raises:
            UsageError: No plugin handles such a request.
            PluginError: A plugin failed, or did not return a mapping.
        """
        answer = self._ask("preprocess", Mapping, processor=processor, request=request)
        if answer is None:
            raise UsageError(
                f"plugin {self.plugin!r} makes no tensors of such a request",
                "Give a processor and what this model takes (prompts, audio, images), or "
                "ready-made tensors as inputs.",
            )
        return cast("Mapping[str, torch.Tensor]", answer)

    def decode(self, processor: Any, outputs: Mapping[str, Any]) -> Any | None:
        """The decoded output (`qeff_proxy.hookspecs.decode`); ``None`` where no plugin decodes it.

        Raises:
            PluginError: A plugin failed.
        """
        return self._ask("decode", object, processor=processor, outputs=outputs)

    def _known(self, answer: object | None, what: str, model: PreTrainedModel) -> object:
        if answer is None:
            inner = [
                f"inside it is {path} ({type(one).__name__}), which may be exported alone"
                for path, one in model.named_children()
                if getattr(one, "can_generate", bool)()
            ]
            raise UnsupportedModelError(
                f"no plugin knows {what} {type(model).__name__} is (model type "
                f"{self.model_type!r}){''.join(f'; {one}' for one in inner[:1])}",
                "A plugin of your own can say so; `qeff-proxy plugins` lists those installed. "
                "Models whose head is for another task, such as a classifier's, are not cut; an "
                "encoder alone is exported with --model-task embedding (Python: QEFFAutoModel).",
            )
        return answer

    def _ask(self, hook: str, expected: Any, **arguments: object) -> object | None:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        try:
            answer: object | None = caller(**arguments)
        except ProxyError:
            raise
        except Exception as error:
            culprit = self._culprit(caller, error.__traceback__)
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(
                f"{culprit} failed in {hook} for model type {self.model_type!r}: {reason}",
                "Run with --debug for the traceback.",
            ) from error
        if answer is not None and not isinstance(answer, expected):
            named = " or ".join(kind.__name__ for kind in get_args(expected) or (expected,))
            raise PluginError(
                f"{self._culprit(caller, None)} answered {hook} for model type "
                f"{self.model_type!r} with {type_named(answer)}, not {named}"
            )
        return answer

    def _culprit(self, caller: pluggy.HookCaller, traceback: TracebackType | None) -> str:
        """The plugin that failed: the owner if its hook was running, else the generic plugin."""
        own = [impl for impl in caller.get_hookimpls() if impl.plugin_name != GENERIC]
        if traceback is not None:
            running = {frame.f_code for frame, _ in walk_tb(traceback)}
            own = [impl for impl in own if getattr(impl.function, "__code__", None) in running]
        if not own:
            return f"plugin {GENERIC!r} of package 'qeff-proxy'"
        source = f" of package {self.distribution!r}" if self.distribution else ""
        return f"plugin {self.plugin!r}{source}"
