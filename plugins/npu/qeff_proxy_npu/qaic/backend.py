"""The ``qaic`` backend: Qualcomm Cloud AI 100, through the vendor's ``qaic-compile``.

Each part that does not hold the vocabulary becomes one binary with a prefill and a decode
specialization, by the command line that QEfficient uses; the others run on ONNX Runtime. The
compiler runs on any x86 machine that has the Cloud AI Apps SDK. Running the binary takes a card
and the vendor's platform SDK, and is done with the vendor's tools.

::

    <compiled>/body/
        specializations.json    the fixed shapes
        body.fp32.yaml          with a recipe: the outputs of nodes that stay in float32
        custom_io.yaml          dtype of the cache at the graph's edge
        mdp_ts_4.json           with num_devices=4: how the model is laid over the cards
        command.json            the command line, paths relative to this folder
        qpc/                    the binary
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.recipe import OPTION, wide_nodes_of
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError

from qeff_proxy_npu.fixed_shapes.backend import FixedShapesBackend
from qeff_proxy_npu.fixed_shapes.plan import Plan
from qeff_proxy_npu.qaic.files import (
    fp32_nodes,
    graph_beside_weights,
    write_custom_io,
    write_partition,
    write_specializations,
)
from qeff_proxy_npu.qaic.sdk import find_compiler, find_hardware_version, find_runner

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["QaicBackend"]

#: The default of QEfficient.
DEFAULT_CORES = 16
#: Options that are flags of the compiler, by the same name with dashes.
_FLAGS = {
    "aic_enable_depth_first": "schedule depth first, with the default memory size (default: false)",
    "allow_mxint8_mdp_io": "compress what goes between cards to mxint8 (default: false)",
    "mos": "effort to reduce on-chip memory, above 0 (default: none)",
    "ols": "factor of splitting operators, above 0 (default: the compiler's own)",
    "retained_state": "keep inputs on the card whose outputs are called <input>_RetainedState; "
    "the cache of these graphs goes in and out instead (default: false)",
    "node_precision_info": "a YAML file: nodes that stay in float32",
    "mdp_load_partition_config": "a JSON file: how the model is laid over the cards",
}


class QaicBackend(FixedShapesBackend):
    """Compiles with ``qaic-compile``."""

    options: Mapping[str, str] = {
        "mxfp6_matmul": "compress the weights of MatMul to mxfp6 (default: false)",
        "mxint8_kv_cache": "compress the cache to mxint8 (default: false: float16)",
        "num_devices": "cards to slice the model over (default: 1)",
        "convert_to_fp16": "compute in float16 (default: true, except for a bfloat16 export)",
        "aic_hw_version": "ai100 or ai200 (default: that of the first card, else ai100)",
        **_FLAGS,
        "recipe": "the file of a recipe: modules that stay in float32 (--recipe)",
        "compiler": "path of qaic-compile (default: that of the SDK, else on PATH)",
        "compiler_args": "more arguments for it, as one string",
        "timeout": "seconds that compiling a part may take (default: no limit)",
    }
    values: Mapping[str, Any] = {
        "mxfp6_matmul": bool,
        "mxint8_kv_cache": bool,
        "num_devices": int,
        "convert_to_fp16": bool,
        "recipe": str,
        "aic_enable_depth_first": bool,
        "timeout": int,
    }

    precisions: Mapping[str, Mapping[str, Any]] = {"fp16": {}}

    def versions(self) -> dict[str, str]:
        """Path, size and time of change of the compiler, which stand for its version."""
        try:
            compiler = find_compiler()
        except BackendError:
            return {"qaic-compile": "none"}  # compile says what is missing, or an option names it
        status = compiler.stat()
        return {"qaic-compile": f"{compiler} {status.st_size} {status.st_mtime_ns}"}

    def devices(self) -> list[str]:
        """The vendor's tools on this machine."""
        runner = find_runner()
        return [str(find_compiler())] + ([str(runner)] if runner is not None else [])

    def precision(self, options: CompileOptions) -> str:  # noqa: ARG002
        """Cards compute in float16."""
        return "float16"

    def untimed(self, options: CompileOptions) -> str:  # noqa: ARG002
        """Nothing runs here."""
        return "what it compiles is run by the vendor's tools, on a machine with a card"

    def check_options(self, name: str, options: CompileOptions) -> None:
        """Check the kind of hardware, too."""
        super().check_options(name, options)
        hardware = options.backend.get("aic_hw_version", "ai100")
        if not re.fullmatch(r"ai\d+", str(hardware)):
            raise UsageError(f"there is no hardware {hardware!r}", "Name ai100 or ai200.")
        if OPTION in options.backend and "node_precision_info" in options.backend:
            raise UsageError(
                "a recipe and node_precision_info both say what stays in float32", "Give one."
            )

    def write_nodes(self, graph: Path, nodes: Sequence[ir.Node], folder: Path) -> None:
        """The file of the option ``node_precision_info``, which names outputs of nodes."""
        (folder / f"{graph.stem}.fp32.yaml").write_text(fp32_nodes(nodes), "utf-8")

    def compile_part(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Write the files that the compiler reads, and have it write the binary.

        Raises:
            BackendError: There is no compiler, or it refuses the part or crashes.
            UsageError: A length is missing.
        """
        compiler = find_compiler(options.backend.get("compiler"))
        plan = Plan.of(part, options)
        specializations = plan.specializations()
        if not specializations:
            raise UsageError(
                f"the {part.name} part has the axes {', '.join(plan.axes)}, of unknown length",
                "Give the length of an input as seq_len.",
            )
        work = folder / part.name
        work.mkdir()
        graph = graph_beside_weights(export, part, work)
        write_specializations(part, specializations, work / "specializations.json")
        command = [str(compiler), *self._arguments(export, part, options, work, graph)]
        log = export.folder / "compiled" / "logs" / f"qaic-{part.name}.log"
        try:
            _run(command, work, log, options)
        except BackendError:
            if not _refuses_specializations(log):
                raise
            shutil.rmtree(work / "qpc", ignore_errors=True)
            write_specializations(part, specializations, work / "specializations.json", named=False)
            _run(command, work, log, options)
        graph.unlink()
        if part.weights is not None:
            (work / part.weights).unlink()
        shown = [argument.replace(f"{work}/", "") for argument in command[1:]]
        (work / "command.json").write_text(
            json.dumps([compiler.name, *shown], indent=1) + "\n", encoding="utf-8"
        )

    def open_part(
        self,
        export: Export,  # noqa: ARG002
        part: ExportedPart,
        options: CompileOptions,  # noqa: ARG002
        folder: Path,
    ) -> NoReturn:
        """Say where the binary is: it runs only with the vendor's tools.

        Raises:
            BackendError: Always.
        """
        qpc = folder / part.name / "qpc"
        runner = find_runner()
        how = f"{runner} -t {qpc}" if runner is not None else "qaic-runner of the platform SDK"
        raise BackendError(
            f"the {part.name} part is compiled, to {qpc}, and runs on a Cloud AI card only",
            f"Run it there with {how}; qeff-proxy convert writes a dump as its inputs.",
        )

    def _arguments(
        self, export: Export, part: ExportedPart, options: CompileOptions, work: Path, graph: Path
    ) -> list[str]:
        """The command line, in QEfficient's order."""
        chosen = options.backend
        cores = options.num_cores or DEFAULT_CORES
        bfloat16 = export.dtype == "bfloat16"
        hardware = chosen.get("aic_hw_version") or find_hardware_version()
        flags: dict[str, Any] = {
            "convert_to_fp16": chosen.get("convert_to_fp16", not bfloat16),
            "mxfp6_matmul": chosen.get("mxfp6_matmul", False),
            "aic_num_cores": cores,
            **{name: chosen[name] for name in _FLAGS if name in chosen},
        }
        if int(flags.get("mos", 1)) < 1:
            del flags["mos"]  # QEfficient's way of saying none
        if OPTION in chosen:
            nodes = work / f"{part.name}.fp32.yaml"
            nodes.write_text(fp32_nodes(wide_nodes_of(export, part, chosen)), encoding="utf-8")
            flags["node_precision_info"] = nodes
        arguments = ["-aic-hw", f"-aic-hw-version={hardware}", f"-m={graph}"]
        for name, value in flags.items():
            option = "-" + name.replace("_", "-")
            if value is True:
                arguments.append(option)
            elif value is not False:
                arguments.append(f"{option}={value}")
        arguments += shlex.split(str(chosen.get("compiler_args", "")))
        devices = chosen.get("num_devices", 1)
        if devices > 1 and "mdp_load_partition_config" not in chosen:
            partition = work / f"mdp_ts_{devices}.json"
            write_partition(devices, cores, partition)
            arguments.append(f"-mdp-load-partition-config={partition}")
        arguments.append(f"-network-specialization-config={work / 'specializations.json'}")
        cache = "mxint8" if chosen.get("mxint8_kv_cache") else "bfloat16" if bfloat16 else "float16"
        if write_custom_io(part, cache, work / "custom_io.yaml"):
            arguments.append(f"-custom-IO-list-file={work / 'custom_io.yaml'}")
        return [*arguments, f"-aic-binary-dir={work / 'qpc'}"]


def _run(command: list[str], work: Path, log: Path, options: CompileOptions) -> None:
    """Run the compiler with its output in a log, and check that it wrote the binary."""
    log.parent.mkdir(parents=True, exist_ok=True)
    limit = options.backend.get("timeout")
    with log.open("wb") as file:
        file.write(f"{shlex.join(command)}\n".encode())
        file.flush()
        try:
            done = subprocess.run(  # noqa: S603 (the user's own compiler, no shell)
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=limit, cwd=work
            )
        except subprocess.TimeoutExpired:
            _failed(work, log, f"took more than {limit} seconds")
        except OSError as error:
            _failed(work, log, f"cannot be started: {error.strerror}")
    if done.returncode < 0:
        _failed(work, log, f"was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[1:]
        last = said[-1].strip() if said else "it said nothing"
        _failed(work, log, f"refuses it with exit status {done.returncode}: {last}")
    if not (work / "qpc" / "programqpc.bin").is_file():
        _failed(work, log, "ended well, but wrote no programqpc.bin")


def _refuses_specializations(log: Path) -> bool:
    """Whether the compiler complains of them, as one does that does not know the named form."""
    said = log.read_text(encoding="utf-8", errors="replace").partition("\n")[2]
    return re.search(r"speciali[sz]ation|symbols", said, re.IGNORECASE) is not None


def _failed(work: Path, log: Path, what: str) -> NoReturn:
    raise BackendError(f"the {work.name} part: qaic-compile {what}", f"Its log: {log}")
