"""The face of causal LMs with LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from qeff_proxy.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_proxy.common import arguments
from qeff_proxy.errors import UsageError
from qeff_proxy.load.adapter_files import CONFIG
from qeff_proxy.load.load_model import load_model


class QEffAutoPeftModelForCausalLM(QEFFAutoModelForCausalLM):
    """A causal LM with LoRA adapters, one of which is merged into its weights at a time."""

    _adapters: dict[str, str]
    _active: str

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> Self:
        """Load the base model that an adapter names, merged with the adapter.

        Args:
            pretrained_model_name_or_path: The adapter's folder or hub id.
            adapter_name: A name for it, for `set_adapter`.
            options: As for ``QEFFAutoModelForCausalLM.from_pretrained``.

        Raises:
            CheckpointError: Base model or adapter cannot be found, read or merged.
            UsageError: The folder holds no adapter.
        """
        face = super().from_pretrained(pretrained_model_name_or_path, **options)
        if not face._loaded.notes.get("adapters"):  # noqa: SLF001 (an instance of this class)
            raise UsageError(
                f"{pretrained_model_name_or_path} holds no adapter ({CONFIG})",
                "Name an adapter's folder, or use QEFFAutoModelForCausalLM.",
            )
        face._adapters = {adapter_name: str(pretrained_model_name_or_path)}  # noqa: SLF001
        face._active = adapter_name  # noqa: SLF001
        return face

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that is merged."""
        return self._active

    def load_adapter(self, model_id: str | Path, adapter_name: str) -> None:
        """Name another adapter of the same base model, for `set_adapter`.

        Args:
            model_id: Its folder or hub id.
            adapter_name: The name.
        """
        arguments.path("the adapter's folder or hub id", model_id)
        self._adapters[adapter_name] = str(model_id)

    def set_adapter(self, adapter_name: str) -> None:
        """Merge another adapter instead of the active one; the next call exports anew.

        Each adapter has an export of its own: one that was made before is found again.

        Raises:
            CheckpointError: The adapter cannot be found, read or merged.
            UsageError: No adapter has that name.
        """
        if adapter_name not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            raise UsageError(f"no adapter is named {adapter_name!r}", f"Known: {known}.")
        if adapter_name == self._active:
            return
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
            adapters=[self._adapters[adapter_name]],
        )
        super().__init__(loaded, proxy=self._kind, plugins=self._plugins, options=before.options)
        self._active = adapter_name
