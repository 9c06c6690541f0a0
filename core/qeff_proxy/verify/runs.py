"""One input, run by PyTorch and then by backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.run.replay_tokens import keep_tokens, replay_tokens
from qeff_proxy.run.run_compiled import RunResult, new_run_name, run_compiled
from qeff_proxy.verify.inputs import describe_given

if TYPE_CHECKING:
    import torch

    from qeff_proxy.artifact.export_folder import Export
    from qeff_proxy.backends.compile_export import Compiled
    from qeff_proxy.parts import Proxy
    from qeff_proxy.plugins.hooks import Hooks
    from qeff_proxy.request import Request
    from qeff_proxy.session.session import Session
    from qeff_proxy.verify.options import VerifyOptions

__all__ = ["REFERENCE", "Runs"]

#: The folder of the reference's dump, beside those of the backends.
REFERENCE = "reference"


class Runs:
    """One input, run by PyTorch and then by backends that are fed PyTorch's tokens.

    Args:
        export: What is run.
        hooks: Of its model type.
        request: The input.
        tensors: What ``preprocess`` made of it.
        processor: The tokenizer or processor, for what comes out.
        options: Of the verification.
    """

    def __init__(
        self,
        export: Export,
        hooks: Hooks,
        request: Request,
        tensors: Mapping[str, torch.Tensor],
        processor: Any,
        options: VerifyOptions,
    ) -> None:
        self.export = export
        self.hooks = hooks
        self.request = request
        self.tensors = tensors
        self.processor = processor
        self.options = options
        self.folder = options.io_folder or export.folder / "io" / f"verify-{new_run_name()}"
        self.tokens: list[torch.Tensor] = []
        outputs = [spec.name for part in export.parts for spec in part.outputs]
        self.generates = any(name.startswith("present.") for name in outputs)

    def reference(self, live: Proxy | None) -> RunResult:
        """Run PyTorch, on live parts or on the export's, and keep the tokens that it chose."""
        compiled = compile_export(self.export, "torch", self.options.compile)
        sessions = None
        if live is not None:
            from qeff_proxy.session.torch_session import TorchSession

            sessions = {part.name: TorchSession(part) for part in live.parts}
        return self._run(compiled, REFERENCE, keep_tokens(self.tokens), sessions)

    def candidate(self, compiled: Compiled, name: str | None = None) -> Path:
        """Run a backend on the tokens that PyTorch chose; give its dump, called ``name``."""
        name = name or compiled.backend
        self._run(compiled, name, replay_tokens(self.tokens))
        return self.folder / name

    def settings(
        self, chooser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """What the flow is told: to generate, with the tokens of ``chooser`` or the reference's."""
        if not self.generates:
            return {}
        return {
            "max_new_tokens": self.options.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "logits_processor": [chooser or replay_tokens(self.tokens)],
        }

    def _run(
        self,
        compiled: Compiled,
        name: str,
        chooser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sessions: Mapping[str, Session] | None = None,
    ) -> RunResult:
        return run_compiled(
            compiled,
            self.hooks,
            self.request,
            processor=self.processor,
            settings=self.settings(chooser),
            write_io=True,
            io_folder=self.folder / name,
            io_options=self.options.io,
            sessions=sessions,
            tensors=self.tensors,
        )

    def described(self) -> dict[str, Any]:
        """What was run, as JSON values."""
        request = self.request
        found: dict[str, Any] = {"prompts": [str(prompt) for prompt in request.prompts]}
        for kind in ("audio", "images"):
            if given := getattr(request, kind):
                found[kind] = [describe_given(one) for one in given]
        for name, value in (request.inputs or {}).items():
            array = np.asarray(value)
            found[name] = array.tolist() if name == "input_ids" else list(array.shape)
        if self.generates:
            found["new_tokens"] = len(self.tokens)
        return found
