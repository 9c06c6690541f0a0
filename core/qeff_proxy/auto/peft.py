"""The face of causal LMs with LoRA adapters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from qeff_proxy.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.common import arguments
from qeff_proxy.errors import UsageError
from qeff_proxy.load.adapter_files import CONFIG, parse_adapters
from qeff_proxy.load.adapter_inputs import with_adapter
from qeff_proxy.load.load_model import load_model
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult

#: The name of the base model without an adapter, in ``prompt_to_adapter_mapping``.
_BASE = "base"
_MAPPING = "prompt_to_adapter_mapping"


class QEffAutoPeftModelForCausalLM(QEFFAutoModelForCausalLM):
    """A causal LM with LoRA adapters, one of which is merged into its weights at a time.

    With ``adapter_as_input=True`` the graphs take them as inputs: one export serves all adapters
    that are named before it is made, later ones that are no larger, and the base model.

    ``generate(…, prompt_to_adapter_mapping=[…])`` runs each prompt with the adapter of that name,
    or ``"base"``: those of one adapter together, one adapter after the other.
    """

    how = QEFFAutoModelForCausalLM.how | {_MAPPING}
    _adapters: dict[str, list[str]]
    _active: str

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        *,
        finite_adapters: bool = False,
        **options: Any,
    ) -> Self:
        """Load the base model that an adapter names, merged with the adapter.

        Args:
            pretrained_model_name_or_path: The adapter's folder or hub id.
            adapter_name: A name for it, for `set_adapter`.
            finite_adapters: QEfficient's; the same model serves with and without.
            options: As for ``QEFFAutoModelForCausalLM.from_pretrained``.

        Raises:
            CheckpointError: Base model or adapter cannot be found, read or merged.
            UsageError: The folder holds no adapter.
        """
        arguments.flag("finite_adapters", finite_adapters)
        _check_name(adapter_name)
        more = [
            f"{path}@{weight!r}" for path, weight in parse_adapters(options.get("adapters", ()))
        ]
        if more and options.get("adapter_as_input"):
            raise UsageError(
                "as an input an adapter runs alone, and adapters= names more",
                "Name them with load_adapter.",
            )
        face = super().from_pretrained(pretrained_model_name_or_path, **options)
        loaded = face._loaded  # noqa: SLF001 (an instance of this class)
        if len(loaded.adapters or loaded.notes.get("adapters", ())) <= len(more):
            raise UsageError(
                f"{pretrained_model_name_or_path} holds no adapter ({CONFIG})",
                "Name an adapter's folder, or use QEFFAutoModelForCausalLM.",
            )
        face._adapters = {adapter_name: [str(pretrained_model_name_or_path), *more]}  # noqa: SLF001
        face._active = adapter_name  # noqa: SLF001
        return face

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that the model runs with."""
        return self._active

    def load_adapter(self, model_id: str | Path, adapter_name: str) -> None:
        """Name another adapter of the same base model, for `set_adapter`.

        Args:
            model_id: Its folder or hub id.
            adapter_name: The name.

        Raises:
            CheckpointError: It cannot be an input of this model, or of the export that was made.
            UsageError: The name is that of the active adapter, or of the base model.
        """
        arguments.path("the adapter's folder or hub id", model_id)
        _check_name(adapter_name)
        if adapter_name == self._active:
            raise UsageError(f"the adapter {adapter_name!r} is active", "Choose another name.")
        if self._export is not None and self._loaded.adapters:
            with_adapter(self._export, [model_id])
        elif self._loaded.adapters:
            self._reload([*itertools.chain(*self._adapters.values()), str(model_id)])
        self._adapters[adapter_name] = [str(model_id)]

    def unload_adapter(self, adapter_name: str) -> bool:
        """Forget an adapter that is not merged; whether there was one of that name.

        Raises:
            UsageError: It is merged.
        """
        if adapter_name == self._active:
            raise UsageError(f"the adapter {adapter_name!r} is active", "Set another one first.")
        return self._adapters.pop(adapter_name, None) is not None

    def set_adapter(self, adapter_name: str) -> None:
        """Merge another adapter instead of the active one, or take it as input.

        Each merged adapter has an export of its own: one that was made before is found again. Where
        the model was compiled, the other one is compiled, too, in the same way.

        Raises:
            CheckpointError: The adapter cannot be found, read or merged.
            UsageError: No adapter has that name.
        """
        if adapter_name not in self._adapters and adapter_name != _BASE:
            known = ", ".join(sorted(self._adapters))
            raise UsageError(f"no adapter is named {adapter_name!r}", f"Known: {known}.")
        if adapter_name == self._active:
            return
        if not self._loaded.adapters:
            compiled = self._compiled
            self._reload(self._adapters.get(adapter_name, []))
            if compiled is not None:
                self.export()
                assert self._export is not None  # noqa: S101 (export sets it)
                self._compiled = compile_export(self._export, compiled.backend, compiled.options)
        self._active = adapter_name

    def _reload(self, adapters: list[str]) -> None:
        """Load the model with other adapters."""
        before = self._loaded
        if self._config is not None:
            raise UsageError(
                "set_adapter keeps no config, num_hidden_layers, revision or dtype='auto'",
                "Load the other adapter with from_pretrained.",
            )
        if before.folder is None or (before.folder / CONFIG).exists():
            raise UsageError(
                f"the adapter beside the weights of {before.source} is always merged",
                "Move its files to a folder of their own.",
            )
        loaded = load_model(
            str(before.folder),
            auto_class=self.task.auto_class,
            dtype=before.dtype,
            trust_remote_code=before.trust_remote_code,
            unused=self.task.unused,
            adapters=adapters,
            adapter_as_input=bool(before.adapters),
        )
        super().__init__(loaded, proxy=self._kind, plugins=self._plugins, options=before.options)

    def _run_active(self, *request: Any, **how: Any) -> RunResult:
        """Run with the active adapter."""
        if self._loaded.adapters:
            if self._compiled is None:
                self.compile()
            assert self._compiled is not None  # noqa: S101 (compile sets it)
            named = self._adapters.get(self._active, [])
            export = with_adapter(self._compiled.export, named)
            self._compiled = replace(self._compiled, export=export)
        return super().run_request(*request, **how)

    def run_request(
        self,
        request: Request,
        processor: Any,
        settings: Mapping[str, Any],
        *,
        run: Mapping[str, Any] | None = None,
        **dump: Any,
    ) -> RunResult:
        """Run each prompt with its adapter (`qeff_proxy.auto.base.ProxyModel.run_request`).

        Raises:
            UsageError: There is not one adapter for each prompt, or there is a dump to be written.
        """
        run = dict(run or {})
        names = run.pop(_MAPPING, None)
        if names is None:
            return self._run_active(request, processor, settings, run=run, **dump)
        names = arguments.texts(_MAPPING, names)
        if len(names) != len(request.prompts):
            raise UsageError(
                f"there are {len(request.prompts)} prompts and {len(names)} names in {_MAPPING}",
                f"Give one for each, or {_BASE!r}.",
            )
        if unknown := sorted({*names} - {*self._adapters, _BASE}):
            known = ", ".join(sorted(self._adapters))
            raise UsageError(f"no adapter is named {unknown[0]!r}", f"Known: {known}.")
        if len(set(names)) > 1 and (dump["write_io"] or dump["io_dir"] is not None):
            raise UsageError("a dump is of one adapter", "Give the prompts of one adapter.")
        if self._compiled is None:
            self.compile()
        active, results = self._active, {}
        try:
            for name in dict.fromkeys(names):
                self.set_adapter(name)
                prompts = [p for p, of in zip(request.prompts, names, strict=True) if of == name]
                alone = replace(request, prompts=prompts)
                results[name] = self._run_active(alone, processor, settings, run=run, **dump)
        finally:
            self.set_adapter(active)
        return _in_order(names, results, processor)


def _check_name(name: str) -> None:
    if name == _BASE:
        raise UsageError(f"{_BASE!r} is the name of the base model", "Name the adapter otherwise.")


def _in_order(names: list[str], results: Mapping[str, RunResult], processor: Any) -> RunResult:
    """The results of several adapters as one, with the prompts in their order."""
    ids = {name: iter(result.outputs["generated_ids"]) for name, result in results.items()}
    name, first = next(iter(results.items()))
    each = range(len(first.outputs["generated_ids"]) // names.count(name))  # of a prompt
    rows = [next(ids[name]) for name in names for _ in each]
    longest = max(map(len, rows))
    ends = (getattr(processor, f"{name}_token_id", None) for name in ("pad", "eos"))
    pad = next((each for each in ends if each is not None), 0)
    padded = [np.pad(row, (0, longest - len(row)), constant_values=pad) for row in rows]
    texts = {name: iter(result.decoded or ()) for name, result in results.items()}
    several = [result.outputs["perf_metrics"] for result in results.values()]
    total = sum(each.total_time for each in several)
    metrics = replace(
        several[0],
        decode_perf=sum(each.decode_perf for each in several) / len(several),
        total_perf=sum(each.total_perf * each.total_time for each in several) / total,
        total_time=total,
    )
    decoded = None if processor is None else [next(texts[name]) for name in names for _ in each]
    outputs = {"generated_ids": np.stack(padded), "perf_metrics": metrics}
    return replace(first, outputs=outputs, decoded=decoded)
