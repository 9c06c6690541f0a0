"""Name the right class for a checkpoint that was loaded with another, and the right proxy."""

from __future__ import annotations

from qeff_proxy.common.messages import an
from qeff_proxy.errors import (
    CheckpointError,
    ExportError,
    PluginError,
    ProxyError,
    UnsupportedModelError,
)
from qeff_proxy.load.load_model import LoadedModel, architecture_of, is_class_of
from qeff_proxy.load.tasks import TASKS, Task
from qeff_proxy.parts import Kind
from qeff_proxy.plugins.entry_points import GENERIC
from qeff_proxy.plugins.manager import Plugins

#: The errors that a checkpoint of another task raises.
_SIGNS = (CheckpointError, PluginError, UnsupportedModelError)


def with_right_class(
    error: ProxyError, loaded: LoadedModel, asked: Task, plugins: Plugins, kind: Kind
) -> ProxyError:
    """The error itself, or one that names the right class for the checkpoint, or its parts.

    Args:
        error: The error of the export.
        loaded: The checkpoint.
        asked: The task it was loaded for.
        plugins: The plugins to use.
        kind: What was to be exported.
    """
    if isinstance(error, ExportError) and kind == "whole" and "traced" in error.problem:
        return ExportError(
            f"{loaded.source} cannot be exported as one graph: {error.problem}",
            "Give enable_proxy=True: its parts may be exported one by one.",
        )
    if not isinstance(error, _SIGNS):
        return error
    name = architecture_of(loaded)
    tasks = [] if name is None else _tasks_of(name, loaded.model_type, plugins)
    if name is None or not tasks or asked in tasks:
        return error
    return UnsupportedModelError(
        f"{loaded.source} is {an(name)}, which {asked.face} is not for ({error.problem})",
        f"Load it with {tasks[0].face}.",
    )


def _tasks_of(architecture: str, model_type: str, plugins: Plugins) -> list[Task]:
    """The tasks that serve an architecture, the most specific first."""
    tasks = []
    for task in TASKS.values():
        # Every model has a base model, but only some are embedding models.
        served = task.auto_class != "AutoModel" or _is_claimed(model_type, task, plugins)
        if served and is_class_of(architecture, model_type, task.auto_class):
            tasks.append(task)
    return tasks


def _is_claimed(model_type: str, task: Task, plugins: Plugins) -> bool:
    return plugins.hooks_for(model_type, task=task.flows[0]).plugin != GENERIC
