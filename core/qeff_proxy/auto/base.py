"""The base class of the faces: load, export, compile, run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qeff_proxy.artifact.export_folder import check_export_place
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.auto.checkpoint import load_checkpoint, remove_view, wrapped
from qeff_proxy.auto.on_disk import export_of_graphs
from qeff_proxy.auto.qefficient import (
    BUILD,
    COMPILE,
    EXPORT,
    FILES,
    GENERATE,
    LOAD,
    Transformed,
    without_ignored,
)
from qeff_proxy.auto.right_class import with_right_class
from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.common import arguments
from qeff_proxy.common.messages import type_named
from qeff_proxy.common.notebook import notebook_stages
from qeff_proxy.common.shown import Shown
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import ProxyError, UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.adapter_files import Adapters
from qeff_proxy.load.load_model import LoadedModel, as_in_memory, flow_as, load_config, with_options
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.load.tasks import Task
from qeff_proxy.parts import PROXIES, Kind
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult, run_compiled

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The values of ``proxy=``: the kinds, and "none" for no proxy.
KIND_NAMES: dict[str, Kind] = {**PROXIES, "whole": "whole"}
#: The weights of embedding and LM head in an export.
_VOCABULARY = "vocabulary.safetensors"


class ProxyModel(Transformed, Shown):
    """The base class of the faces."""

    task: ClassVar[Task]
    _config: PreTrainedConfig | None = None
    how: ClassVar[frozenset[str]] = frozenset({"runtime_ai100", "iteration"})

    def __init__(
        self,
        model: PreTrainedModel | LoadedModel,
        *,
        enable_proxy: bool = False,
        proxy: Kind | None = None,
        plugins: Plugins | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Wrap a model that is loaded already.

        Args:
            model: A transformers model, or the result of `qeff_proxy.load.load_model`.
            enable_proxy: Cut the token embedding and LM head out: the same as ``proxy="split"``.
            proxy: ``"split"``, ``"stub"`` or ``"whole"``, the default; overrides ``enable_proxy``.
            plugins: The plugins to use; by default the installed ones.
            options: Options of the family's ``build_proxy``.
            more: The same options by name, and QEfficient's arguments that mean nothing here.
        """
        if options is not None and not isinstance(options, Mapping):
            raise UsageError(f"options are {type_named(options)}", "Give values by name.")
        asked = {**more, **(options or {})}
        asked = without_ignored(asked, BUILD, type(self), understood=self.task.options)
        others = sorted(set(asked) - set(self.task.options))
        if others:
            own = ", ".join(sorted(self.task.options)) or "none"
            raise UsageError(
                f"{type(self).__name__} has no option {others[0]!r}", f"Its own options: {own}."
            )
        named = proxy if proxy is not None else "split" if enable_proxy else "whole"
        kind = KIND_NAMES.get(str(named).lower())
        if kind is None:
            raise UsageError(f"proxy is {proxy!r}", "It must be 'split', 'stub' or None.")
        if plugins is not None and not isinstance(plugins, Plugins):
            raise UsageError(f"plugins are {type_named(plugins)}", "Give qeff_proxy.Plugins.")
        loaded = model if isinstance(model, LoadedModel) else wrapped(model)
        self._loaded = with_options(loaded, asked)
        self._kind: Kind = kind
        self._plugins = plugins or Plugins.discover()
        self._hooks = self._plugins.hooks_for(loaded.model_type, task=flow_as(loaded, self.task))
        self._export: Export | None = None
        self._compiled: Compiled | None = None
        self._lent = self._loaded.folder is None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        enable_proxy: bool = False,
        proxy: Kind | None = None,
        dtype: Any = None,
        config: PreTrainedConfig | str | Path | None = None,
        num_hidden_layers: int | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        adapters: Adapters = (),
        adapter_as_input: bool = False,
        plugins: Plugins | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint.

        Args:
            pretrained_model_name_or_path: A local folder or a hub id.
            enable_proxy: Cut the token embedding and LM head out: the same as ``proxy="split"``.
            proxy: ``"split"``, ``"stub"`` or ``"whole"``; overrides ``enable_proxy``.
            dtype: ``"float32"``, which is the default, ``"float16"`` or ``"bfloat16"``; ``"auto"``
                for the checkpoint's own.
            config: The checkpoint's config with other values: fewer layers, a dtype …
            num_hidden_layers: Take the first layers only.
            trust_remote_code: Run Python code that comes with the checkpoint.
            allow_pickle: Read pickled weights, which can run code.
            adapters: LoRA adapters to merge into the weights: ``PATH[@WEIGHT]``, or by path.
            adapter_as_input: Take adapters like these as inputs, unmerged; run with the first.
            plugins: The plugins to use; by default the installed ones.
            options: Options of the family's ``build_proxy`` (``pooling`` …), ``revision``,
                ``cache_dir`` and ``token`` of a hub id, ``gguf_file``, and QEfficient's other
                arguments, of which those that mean nothing here are ignored with a warning.

        Raises:
            CheckpointError: It cannot be found, read or trusted.
            UsageError: An argument is unknown, or contradicts another.
            UnsupportedModelError: Its architecture is unknown, or of another task.
        """
        folder = arguments.path("the model's folder or hub id", pretrained_model_name_or_path)
        asked = without_ignored(options, LOAD, cls.from_pretrained, understood=cls.task.options)
        loading = {name: asked.pop(name) for name in FILES if name in asked}
        loaded, view, changed = load_checkpoint(
            "" if folder is None else str(pretrained_model_name_or_path),
            cls.task,
            {**loading, "config": config, "num_hidden_layers": num_hidden_layers},
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            adapters=adapters,
            adapter_as_input=arguments.flag("adapter_as_input", adapter_as_input),
        )
        try:
            model = cls(
                loaded, enable_proxy=enable_proxy, proxy=proxy, plugins=plugins, options=asked
            )
        except BaseException:
            remove_view(view)
            raise
        model._config = changed
        weakref.finalize(model, remove_view, view)
        return model

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        loaded = self._loaded
        return {
            "model": f"{loaded.source} ({loaded.model_type}, {loaded.dtype})",
            "proxy": self._kind,
            "export": self._export and self._export.folder,
            "compiled": self.qpc_path,
        }

    @property
    def model(self) -> PreTrainedModel:
        """The uncut transformers model; `export` takes it with what was changed in it."""
        self._lent = True
        return self._loaded.model

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config; the weights are not read for it."""
        loaded = self._loaded
        if loaded.folder is None or loaded.is_read:
            return loaded.model.config
        return self._config or load_config(loaded.folder)

    @property
    def onnx_path(self) -> Path | list[Path] | None:
        """The exported graph, or graphs, that do not hold the vocabulary; ``None`` before."""
        if self._export is None:
            return None
        parts = [part for part in self._export.parts if part.weights != _VOCABULARY]
        paths = [self._export.folder / part.file for part in parts]
        return paths[0] if len(paths) == 1 else paths

    @property
    def qpc_path(self) -> Path | None:
        """The folder of what was compiled last; ``None`` before."""
        return None if self._compiled is None else self._compiled.folder

    def export(
        self,
        export_dir: str | Path | None = None,
        *,
        force: bool = False,
        opset: int | None = None,
        taps: str | Sequence[str] = (),
        num_layers: int | str | None = None,
        weights: str = "copy",
        **ignored: Any,
    ) -> Path:
        """Export the parts to ONNX (`qeff_proxy.export.export_model`) and return their folder.

        Raises:
            UnsupportedModelError: The checkpoint is of another task; names the class for it.
        """
        others = without_ignored(ignored, EXPORT, self.export)
        if others:
            raise UsageError(f"export has no argument {min(others)!r}", "See its arguments.")
        folder = arguments.path("export_dir", export_dir)
        check_export_place(self._loaded.source, folder)
        try:
            with notebook_stages("exporting") as progress:
                self._export = export_model(
                    as_in_memory(self._loaded) if self._lent else self._loaded,
                    self._hooks,
                    self._kind,
                    output=folder,
                    opset=opset,
                    taps=taps,
                    num_layers=num_layers,
                    weights=weights,
                    force=force,
                    progress=progress,
                )
        except ProxyError as error:
            clear = with_right_class(error, self._loaded, self.task, self._plugins, self._kind)
            if clear is error:
                raise
            raise clear from error
        self._compiled = None
        return self._export.folder

    def compile(
        self,
        onnx_path: str | Path | None = None,
        *,
        backend: str = "onnxruntime",
        prefill_seq_len: int | None = None,
        ctx_len: int | None = None,
        seq_len: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_cores: int | None = None,
        force: bool = False,
        calibration: Any = None,
        **backend_options: Any,
    ) -> Path:
        """Compile the parts (`qeff_proxy.backends.compile_export`); exports first where needed.

        Args:
            onnx_path: An export of this model, by its folder or an ONNX file in it; by default the
                last one of this object.
            backend: Which backend to compile for.
            prefill_seq_len: Tokens of a prefill chunk; longer prompts are run in several.
            ctx_len: Most positions, prompt and generated tokens together.
            seq_len: A length, or several, that inputs of a single pass are padded to.
            batch_size: Rows of the batch, for backends of static shapes.
            num_cores: Cores to use.
            force: Compile again even if the compiled parts are up to date.
            calibration: Inputs to calibrate a quantized precision on: a list of prompts or
                requests, a file of prompts, or the folder of a dump (`qeff_proxy.run.calibration`).
            backend_options: Options of this backend. QEfficient's arguments that mean nothing to it
                (``mxfp6_matmul``, ``full_batch_size`` …) are ignored with a warning, unless their
                value asks for nothing.

        Returns:
            The folder of the compiled parts.
        """
        from qeff_proxy.backends.registry import load_backend

        chosen = without_ignored(
            backend_options,
            COMPILE,
            self.compile,
            understood=load_backend(backend).options,
            whose=f"means nothing to backend {backend!r} and ",
        )
        self.take_sizes(chosen)
        others = (chosen.pop(name, None) for name in ("vision_onnx_path", "lang_onnx_path"))
        named = [path for path in (onnx_path, *others) if path is not None]
        if named:
            self._export, self._compiled = export_of_graphs(named, self._loaded.model_type), None
        if self._export is None:
            self.export()
        assert self._export is not None  # noqa: S101 (export sets it)
        options = CompileOptions(
            batch_size=batch_size,
            prefill_seq_len=prefill_seq_len,
            ctx_len=ctx_len,
            seq_len=_lengths(seq_len),
            num_cores=num_cores,
            backend=chosen,
        )
        if calibration is not None:
            from qeff_proxy.run.calibration import with_calibration

            options = with_calibration(
                self._export,
                self._hooks,
                backend,
                options,
                calibration,
                trust_remote_code=self._loaded.trust_remote_code,
            )
        with notebook_stages("compiling") as progress:
            self._compiled = compile_export(
                self._export, backend, options, force=force, progress=progress
            )
        return self._compiled.folder

    def take_sizes(self, options: dict[str, Any]) -> None:
        """Take, from the options of `compile`, sizes of images; see the face that has images."""

    def run_request(
        self,
        request: Request,
        processor: Any,
        settings: Mapping[str, Any],
        *,
        write_io: bool,
        io_dir: str | Path | None,
        io_options: DumpOptions | None,
        run: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Run one request (`qeff_proxy.run.run_compiled`), as `how` says; compiles first."""
        run = run or {}
        times = arguments.whole_number("iteration", run.get("iteration") or 1)
        on_torch = arguments.flag("runtime_ai100", run.get("runtime_ai100", True)) is False
        if self._compiled is None:
            if request.prompts:  # what is wrong with them is said before the export
                self._hooks.preprocess(processor=processor, request=request)
            self.compile()
        made = self._compiled
        assert made is not None  # noqa: S101 (compile sets it)
        if (flow := made.export.flow) not in self.task.flows:
            raise UnsupportedModelError(
                f"{type(self).__name__} does not run {flow!r} models such as "
                f"{self._loaded.source} (model type {self._loaded.model_type})",
                f"Install the plugins for its task: pip install 'qeff-proxy[{self.task.extra}]'.",
            )
        if on_torch:
            made = compile_export(made.export, "torch", replace(made.options, backend={}))
        for _ in range(times - 1):
            run_compiled(made, self._hooks, request, processor=processor, settings=settings)
        return run_compiled(
            made,
            self._hooks,
            request,
            processor=processor,
            settings=settings,
            write_io=arguments.flag("write_io", write_io) or io_dir is not None,
            io_folder=arguments.path("io_dir", io_dir),
            io_options=io_options,
        )

    def how_to_run(self, runtime: Mapping[str, Any]) -> dict[str, Any]:
        """The ``run`` of `run_request`: what QEfficient's arguments of ``generate`` say of it.

        Raises:
            UsageError: An argument is none of ``generate``.
        """
        kept = without_ignored(runtime, GENERATE, self.generate)  # type: ignore[attr-defined]
        others = sorted(set(kept) - self.how)
        if others:
            raise UsageError(f"generate takes no {others[0]}", "See its arguments.")
        return kept

    def processor(self) -> Any:
        """The checkpoint's own tokenizer or processor.

        Raises:
            CheckpointError: It has none that can be loaded.
        """
        if self._loaded.folder is None:
            raise UsageError("a model made in memory has no tokenizer", "Pass tokenizer=.")
        return load_processor(self._loaded.folder, trust_remote_code=self._loaded.trust_remote_code)


def _lengths(seq_len: Any) -> tuple[int, ...] | None:
    if isinstance(seq_len, list | tuple):
        return tuple(seq_len)
    return None if seq_len is None else (seq_len,)
