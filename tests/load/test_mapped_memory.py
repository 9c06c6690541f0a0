"""Weights of a large model are run from files, and are not kept in memory."""

from __future__ import annotations

import re
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy.cut import cut_model
from qeff_proxy.load import first_layers, mapped_memory
from qeff_proxy.load.first_layers import enough_layers
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.load.mapped_memory import Scratch, few_pages, few_pages_of, give_back
from qeff_proxy.plugins.manager import Plugins
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

_MB = 1 << 20


def file_pages() -> int:
    """Bytes of mapped files that count as memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"RssFile:\s+(\d+)", status)[0]) * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, vocab_size=4096, num_hidden_layers=3, num_key_value_heads=8)
    path = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_a_large_model_is_cut_with_the_pages_of_few_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(checkpoint))
    assert loaded.sample is not None
    plain = loaded.sample(enough_layers).short()
    for module in (first_layers, mapped_memory):
        monkeypatch.setattr(module, "LARGE", 16 * _MB)
    model = loaded.sample(enough_layers).short()
    for (name, one), (_, other) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    with few_pages(model):
        pass
    before, peak = file_pages(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: peak.append(file_pages()))
    hooks = Plugins.discover().hooks_for("llama")
    cut_model(wrap_model(model), hooks, "split")
    # All weights have 53 MB, the largest 8; libraries that are first used are mapped, too.
    assert max(peak) - before < 24 * _MB
    assert file_pages() - before < 16 * _MB


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_what_was_written_to_memory_is_not_given_back() -> None:
    ones = torch.ones(1024, 1024)
    with closing(Scratch()) as scratch:
        mapped = scratch.put([ones[:1000], ones[1000:].bfloat16()], (1024, 1024), torch.float32)
    assert torch.equal(mapped, ones)
    before = file_pages()
    give_back(mapped)
    assert before - file_pages() > 3 * _MB
    assert torch.equal(mapped, ones)
    mapped.numpy()[512, 7] = 3
    own = torch.full((1024, 1024), 2.0)
    one = torch.ones(1).expand(1024, 1024)
    for tensor in (mapped, own, own[100:], nn.Parameter(own), one):
        expected = tensor.detach().clone()
        give_back(tensor)
        assert torch.equal(tensor, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_a_large_matrix_is_used_with_few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    values, head = torch.randn(5000, 1024), nn.Linear(1024, 5000)
    inputs = torch.randn(3, 7, 1024)
    expected = nn.functional.linear(inputs, values, head.bias)
    with closing(Scratch()) as scratch:
        head.weight = nn.Parameter(scratch.put([values], (5000, 1024), torch.float32))
    seen = []

    class Watched(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is nn.functional.linear:
                seen.append((len(args[1]), file_pages()))
            return result

    monkeypatch.setattr(mapped_memory, "LARGE", 16 * _MB)
    monkeypatch.setattr(mapped_memory, "_BLOCK", 2 * _MB)
    with torch.no_grad(), Watched(), few_pages(head):
        give_back(head.weight)
        before = file_pages()
        torch.testing.assert_close(head(inputs), expected)
        one = nn.functional.linear(inputs, head.weight, torch.ones(1))
    torch.testing.assert_close(one, expected - head.bias + 1)
    assert [rows for rows, _ in seen] == ([512] * 9 + [392]) * 2
    assert (
        max(pages for _, pages in seen) - before < 6 * _MB
    )  # of 20; a library's first use is more


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_pages_that_a_runtime_maps_are_given_back_while_it_runs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint / "model.safetensors"
    mapped = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    expected = file.read_bytes()

    def left() -> int:
        """Bytes that count as memory, two seconds after all were read, or as soon as few do."""
        before = file_pages()
        assert bytes(mapped.numpy()) == expected
        end = time.monotonic() + 2
        while file_pages() - before > _MB and time.monotonic() < end:
            time.sleep(0.01)
        return file_pages() - before

    with few_pages_of(checkpoint):  # a small model
        assert left() > 16 * _MB
    give_back(mapped)
    monkeypatch.setattr(mapped_memory, "LARGE", 16 * _MB)
    with few_pages_of(checkpoint):
        assert left() <= _MB
        assert left() <= _MB
