"""Name the right class for a checkpoint that was loaded with another."""

from __future__ import annotations

from qeff_proxy.common.messages import an
from qeff_proxy.common.private_names import model_classes
from qeff_proxy.errors import CheckpointError, PluginError, ProxyError, UnsupportedModelError
from qeff_proxy.load.checkpoint_files import read_config_file
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.tasks import TASKS, Task
from qeff_proxy.plugins.entry_points import GENERIC
from qeff_proxy.plugins.manager import Plugins

#: The errors that a checkpoint of another task raises.
_SIGNS = (CheckpointError, PluginError, UnsupportedModelError)


def with_right_class(
    error: ProxyError, loaded: LoadedModel, asked: Task, plugins: Plugins
) -> ProxyError:
    """The error itself, or one that names the right class for the checkpoint.

    Args:
        error: The error of the export.
        loaded: The checkpoint.
        asked: The task it was loaded for.
        plugins: The plugins to use.
    """
    if not isinstance(error, _SIGNS):
        return error
    name = _architecture_of(loaded)
    tasks = [] if name is None else _tasks_of(name, loaded.model_type, plugins)
    if name is None or not tasks or asked in tasks:
        return error
    return UnsupportedModelError(
        f"{loaded.source} is {an(name)}, which {asked.face} is not for ({error.problem})",
        f"Load it with {tasks[0].face}.",
    )


def _architecture_of(loaded: LoadedModel) -> str | None:
    """The architecture in a checkpoint's config, or the class of a model made in memory."""
    if loaded.folder is None:
        return type(loaded.model).__name__
    architectures = read_config_file(loaded.folder).get("architectures")
    return str(architectures[0]) if architectures else None


def _tasks_of(architecture: str, model_type: str, plugins: Plugins) -> list[Task]:
    """The tasks that serve an architecture, the most specific first."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return []
    config = transformers.CONFIG_MAPPING[model_type]
    tasks = []
    for task in TASKS.values():
        classes = model_classes(task.auto_class).get(config, ())
        classes = classes if isinstance(classes, list | tuple) else (classes,)
        # Every model has a base model, but only some are embedding models.
        served = task.auto_class != "AutoModel" or _is_claimed(model_type, task, plugins)
        if served and architecture in {kind.__name__ for kind in classes}:
            tasks.append(task)
    return tasks


def _is_claimed(model_type: str, task: Task, plugins: Plugins) -> bool:
    return plugins.hooks_for(model_type, task=task.flows[0]).plugin != GENERIC
