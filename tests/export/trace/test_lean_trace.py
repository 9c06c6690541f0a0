"""Traces without the notes that PyTorch takes are the same traces."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy.common.private_names import TRACING
from qeff_proxy.export.export_model import export_model
from qeff_proxy.export.trace.lean_trace import without_notes
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from torch._dynamo import config as dynamo_config
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer


def test_the_graphs_are_those_of_a_trace_with_notes(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = wrap_model(make_model("llama", layers=4))
    hooks = Plugins.discover().hooks_for("llama")
    without = export_model(loaded, hooks, output=tmp_path / "without").folder
    monkeypatch.setitem(TRACING, "cached", "torch:renamed")
    with_notes = export_model(loaded, hooks, output=tmp_path / "with").folder
    for name in ("embedding.onnx", "body.onnx", "lm_head.onnx"):
        assert (without / name).read_bytes() == (with_notes / name).read_bytes()


def test_the_notes_are_left_out_in_this_thread_alone() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Identity())

    def notes() -> tuple[bool, bool]:
        stacks = _ModuleStackTracer(graph).record_stack_traces
        return stacks, dynamo_config.fake_tensor_cache_enabled

    others: list[tuple[bool, bool]] = []
    with without_notes(), without_notes():
        assert notes() == (False, False)
        thread = threading.Thread(target=lambda: others.append(notes()))
        thread.start()
        thread.join()
    assert notes() == others[0] == (True, True)
    assert torch.fx.config.do_not_emit_stack_traces is False
