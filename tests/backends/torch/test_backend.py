"""The ``torch`` backend cuts the model as the caller's plugins do, installed ones or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qeff_proxy import Plugins, Request, Site, hookimpl
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.run.run_compiled import run_compiled


class Mine:
    """A plugin for GPT-2 that notes when it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    @hookimpl
    def locate_embedding(self, model: Any, config: Any) -> Site:
        self.asked += 1
        return Site("transformer.wte")


def test_a_plugin_registered_from_python_is_used(demo_export: Path) -> None:
    plugin, plugins = Mine(), Plugins.discover()
    plugins.register(plugin, ["gpt2"])
    result = run_compiled(
        compile_export(read_export(demo_export), "torch"),
        plugins.hooks_for("gpt2"),
        Request(inputs={"input_ids": [[5, 6, 7]]}),
        settings={"max_new_tokens": 2, "do_sample": False},
    )
    assert result.outputs["generated_ids"].shape == (1, 2)
    assert plugin.asked == 1
