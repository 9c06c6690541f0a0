"""One input, checked, then run by PyTorch and by the backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.compare import NoiseFloor, compare_dumps
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.parts import Proxy
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.example_request import DEFAULT_QUESTION, example_request
from qeff_proxy.run.replay_tokens import keep_tokens, replay_tokens
from qeff_proxy.run.run_compiled import RunResult, new_io_folder, run_compiled
from qeff_proxy.session.session import Session
from qeff_proxy.verify.results import reason_of

if TYPE_CHECKING:
    import torch

    from qeff_proxy.verify.options import VerifyOptions

#: The folder of the reference's dump, beside those of the backends.
REFERENCE = "reference"


class Runs:
    """One input, run by PyTorch and then by backends that are fed PyTorch's tokens.

    Args:
        export: The export to run.
        hooks: Of its model type.
        request: The input.
        tensors: Its tensors, from the ``preprocess`` hook.
        processor: The tokenizer or processor, to decode the output.
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
        self.folder = options.io_folder or new_io_folder(export, "verify-")
        self.tokens: list[torch.Tensor] = []
        #: PyTorch's output, and the tokens that the latest candidate would have chosen.
        self.decoded: Any = None
        self._choices: list[torch.Tensor] = []
        #: By precision, the noise floor of each tensor, or why there is none.
        self.floors: dict[str, Mapping[tuple[str, str], NoiseFloor] | str] = {}
        outputs = [spec.name for part in export.parts for spec in part.outputs]
        self.generates = any(name.startswith("present.") for name in outputs)

    def reference(self, live: Proxy | None) -> RunResult:
        """Run PyTorch, on live parts or on those of the export, and keep the tokens it chose."""
        compiled = compile_export(self.export, "torch", self.options.compile)
        sessions = None
        if live is not None:
            from qeff_proxy.session.torch_session import TorchSession

            sessions = {part.name: TorchSession(part) for part in live.parts}
        result = self._run(compiled, REFERENCE, keep_tokens(self.tokens), sessions)
        self.decoded = result.decoded
        return result

    def measure_floor(self, live: Proxy, precision: str) -> None:
        """Run PyTorch with the rounding of a precision, on the reference's tokens.

        The model's weights are those of the reference, so that no second model is in memory.
        """
        from qeff_proxy.session.torch_session import TorchSession
        from qeff_proxy.verify.rounding import BITS, RoundedModule

        if precision not in BITS:
            self.floors[precision] = f"PyTorch cannot compute in {precision}"
            return

        compiled = compile_export(self.export, "torch", self.options.compile)
        sessions = {
            part.name: TorchSession(
                replace(part, module=RoundedModule(part.module, BITS[precision]))
            )
            for part in live.parts
        }
        name = f"floor-{precision}"
        try:
            self._run(compiled, name, replay_tokens(self.tokens), sessions)
        except Exception as error:  # noqa: BLE001 (without a floor, the fixed limits remain)
            self.floors[precision] = f"PyTorch fails in {precision}: {reason_of(error)}"
            return
        tensors = compare_dumps(self.folder / REFERENCE, self.folder / name).tensors
        self.floors[precision] = {
            (t.phase, str(t.name)): NoiseFloor(
                float(t.step_sqnr.min(initial=math.inf)),
                float(t.step_error.max(initial=0.0)),
                math.prod(t.shape),
            )
            for t in tensors
        }

    def candidate(self, compiled: Compiled, name: str | None = None) -> RunResult:
        """Run a backend on the tokens that PyTorch chose; ``name`` is the folder of its dump."""
        self._choices = []
        replay = replay_tokens(self.tokens, self._choices)
        return self._run(compiled, name or compiled.backend, replay)

    def own_choice(self) -> list[str] | None:
        """What the latest candidate would have said; ``None`` if the same, or without text."""
        import torch

        if not self._choices or not hasattr(self.processor, "batch_decode"):
            return None
        if len(self._choices) == len(self.tokens) and all(
            map(torch.equal, self._choices, self.tokens)
        ):
            return None
        tokens = torch.stack(self._choices, 1)
        texts: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def settings(
        self, chooser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """The flow's settings: generate the tokens of ``chooser``, or else the reference's."""
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
        """The input, as JSON values."""
        new = {"new_tokens": len(self.tokens)} if self.generates else {}
        return {**described_request(self.request), **new}


def described_request(request: Request) -> dict[str, Any]:
    """A request, as JSON values."""
    described: dict[str, Any] = {"prompts": [str(prompt) for prompt in request.prompts]}
    for kind in ("audio", "images"):
        if items := getattr(request, kind):
            described[kind] = [_described(item) for item in items]
    for name, value in (request.inputs or {}).items():
        array = np.asarray(value)
        described[name] = array.tolist() if name == "input_ids" else list(array.shape)
    return described


def processor_in(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer or processor in a folder; ``None`` where none can be loaded."""
    try:
        return load_processor(folder, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def check_request(
    request: Request | None, model: LoadedModel | Export, hooks: Hooks, trust_remote_code: bool
) -> tuple[Request | None, Mapping[str, torch.Tensor] | None]:
    """Check the request, and make its tensors, before anything is exported; ``None`` stays so.

    The tensors serve for all runs, so that a warning about an input (a sound at another rate) is
    given once.

    Raises:
        UsageError: The model does not take this input.
    """
    if request is None:
        return None, None
    if any(not str(prompt).strip() for prompt in request.prompts):
        raise UsageError("a prompt is empty", "Give some text, or token ids.")
    if request.images and not request.prompts and request.inputs is None:
        request = replace(request, prompts=(DEFAULT_QUESTION,))
    folder = model.processor_folder if isinstance(model, Export) else model.folder
    processor = processor_in(folder, trust_remote_code) if folder is not None else None
    if processor is None and folder is not None and request.prompts and request.inputs is None:
        load_processor(folder, trust_remote_code=trust_remote_code)  # raises; names what is missing
    return request, tensors_of(request, hooks, processor)


def complete_request(
    export: Export,
    request: Request | None,
    tensors: Mapping[str, torch.Tensor] | None,
    hooks: Hooks,
    processor: Any,
    live: Callable[[], Proxy],
) -> tuple[Request, Mapping[str, torch.Tensor]]:
    """The request, or the flow's example, and its tensors with the export's own options.

    Args:
        export: What runs.
        request: What `check_request` returned, as are its ``tensors``.
        tensors: See ``request``.
        hooks: Of the model type.
        processor: The tokenizer or processor.
        live: The parts in PyTorch, for an example without a processor.
    """
    if request is None:
        request = example_request(export, processor, live)
    defaults = export.settings.get("request_options", {})
    if tensors is None or defaults:
        tensors = tensors_of(request.with_defaults(defaults), hooks, processor)
    return request, tensors


def tensors_of(request: Request, hooks: Hooks, processor: Any) -> Mapping[str, torch.Tensor]:
    """The request's tensors, from the ``preprocess`` hook."""
    with quiet_loading():  # tokenizers warn of texts that are then refused
        return hooks.preprocess(processor=processor, request=request)


def _described(item: Any) -> Any:
    """A file's name, or the shape of an array."""
    if isinstance(item, str | Path):
        return str(item)
    shape = getattr(item, "shape", None)
    return list(shape) if shape is not None else type(item).__name__
