"""Run a part on calibration inputs in float32, and record the range of each of its tensors."""

from __future__ import annotations

from pathlib import Path

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.session.axes import Sizes

from qeff_proxy_npu.fixed_shapes.calibration_samples import digest_of, samples_of
from qeff_proxy_npu.fixed_shapes.compiler_fixes import clean_graph
from qeff_proxy_npu.fixed_shapes.host_split import HostSplit, split_host
from qeff_proxy_npu.fixed_shapes.session import StaticSession
from qeff_proxy_npu.fixed_shapes.specialize import specialize
from qeff_proxy_npu.fixed_shapes.tensor_ranges import Ranges, RangeSession
from qeff_proxy_npu.qnn.options import LOWEST_MASK, QnnOptions

__all__ = ["Calibrator", "calibration_digest", "prepared"]


def prepared(export: Export, part: ExportedPart, sizes: Sizes) -> HostSplit:
    """A part of fixed shapes, ready for the compiler and for calibration."""
    split = split_host(specialize(export.folder / part.file, part, sizes))
    clean_graph(split.body)
    return split


def calibration_digest(chosen: QnnOptions) -> str | None:
    """A hash of the calibration inputs; ``None`` where nothing is calibrated.

    Raises:
        UsageError: The precision needs such inputs and there are none.
    """
    if not chosen.quantized:
        return None
    if chosen.calibration is None:
        raise UsageError(
            f"precision {chosen.precision} needs inputs to calibrate on",
            "Give --calibrate (in Python calibration=): a file of prompts, one a line, or the "
            "folder of a dump.",
        )
    return digest_of(Path(chosen.calibration))


class Calibrator:
    """Ranges of the tensors of parts, measured when they are first asked for.

    Args:
        options: Of the compilation, with all lengths.
        folder: Of the dumps whose inputs are run.
    """

    def __init__(self, options: CompileOptions, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._ranges: dict[str, Ranges] = {}

    def ranges_of(self, export: Export, part: ExportedPart) -> Ranges:
        """The ranges of a part's tensors, over all its fixed shapes: their names are the same.

        Raises:
            UsageError: There are no inputs for it.
            DumpError: The dumps are incomplete or damaged.
        """
        if part.name not in self._ranges:
            ranges: Ranges = {}

            def open_specialization(sizes: Sizes) -> RangeSession:
                return RangeSession(prepared(export, part, sizes), export.folder, ranges)

            with StaticSession(part, self._options, open_specialization, LOWEST_MASK) as session:
                for feeds in samples_of(self._folder, part, self._options):
                    session.run(feeds)
            self._ranges[part.name] = ranges
        return self._ranges[part.name]
