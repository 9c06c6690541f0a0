"""The result of a cut: parts with named tensors, and what the host must supply to run them.

Tensors are joined **by name**: an input that carries the name of an earlier part's output is
taken from it. The host supplies the other inputs: the request's own tensors
(``input_ids``), the attention masks (`MaskSpec`), ``position_ids`` and the cache
(``past_key_values.<layer>.key`` and ``.value``, which the part gives back, one step longer, as
``present.<layer>.key`` and ``.value``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from qeff_proxy.common.json_schema import Count, Text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Kind", "MaskKind", "MaskSpec", "Part", "Proxy", "TensorSpec"]

Kind = Literal["split", "stub", "whole"]
#: How an export holds its weights.
WEIGHTS = ("copy", "reference", "keep")
#: What users call the kinds: of a whole model there is no proxy.
PROXIES: dict[str, Kind] = {"split": "split", "stub": "stub", "none": "whole"}
MaskKind = Literal[
    "causal",
    "sliding",
    "chunked",
    "bidirectional",
    "bidirectional_sliding",
    "bidirectional_window",
]

#: The dtypes a model can be exported in.
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
#: What a layer can give as an extra output (`qeff_proxy.layers.taps`); each is also the end of the
#: output's name.
TAPS = {"layers": "", "attention": ".attention", "mlp": ".mlp"}
#: The same, of modules inside attention and MLP: these outputs are named by the module's path.
INNER_TAPS = ("q", "k", "v", "o", "norms", "gate", "up", "down")
_TAP_GLOB = re.compile(r"[\w.*?]*[.*?][\w.*?]*")


def is_tap(name: str) -> bool:
    """Whether a tap has this name; a glob of modules has a dot, an asterisk or a question mark."""
    return name in TAPS or name in INNER_TAPS or _TAP_GLOB.fullmatch(name) is not None


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor at the edge of a part.

    Attributes:
        name: The tensor's name in the ONNX graph.
        dtype: Its dtype as torch and NumPy spell it (``"float32"``, ``"int64"``, ``"bfloat16"``).
        shape: One entry per axis: a size, or the name of a dynamic axis (``"batch"``,
            ``"query"``, ``"past"``, ``"past + query"``).
    """

    name: Text
    dtype: str
    shape: tuple[Count | Text, ...]


@dataclass(frozen=True)
class MaskSpec:
    """An additive attention mask, ``[batch, 1, query, past + query]``, that the host builds.

    Attributes:
        name: The graph input that takes it.
        kind: Which keys a query may see, besides those that padding hides.
        size: Window or chunk in tokens, for the kinds that have one.
    """

    name: Text
    kind: MaskKind
    size: Count | None = None


@dataclass
class Part:
    """One graph to export.

    Attributes:
        name: ``"embedding"``, ``"body"``, ``"lm_head"``, ``"model"``, ``"encoder"``, ``"vision"``…
        module: Takes the inputs as keyword arguments, the dots of their names as double
            underscores, and returns a dict of the outputs by name, in order.
        inputs: Its inputs. Those that do not reach any output are dropped from the graph when it
            is traced.
        outputs: Its outputs, in order.
        weights: Stem of the file its weights go to: ``"body"``, ``"vocabulary"``, ``"model"``…
        masks: Which of the inputs are attention masks, and of what kind.
        trace_sizes: Sizes that dynamic axes have while the part is traced, where the defaults of
            `qeff_proxy.session.sample_inputs.TRACE_SIZES` don't serve.
        check_sizes: For each of `qeff_proxy.export.check_graph.CHECK_SIZES`, sizes of axes that are
            to differ from them or are not among them, where the finished graph is checked.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: str
    masks: tuple[MaskSpec, ...] = ()
    trace_sizes: Mapping[str, int] = field(default_factory=dict)
    check_sizes: tuple[Mapping[str, int], ...] = ()


@dataclass
class Proxy:
    """A model, cut.

    Attributes:
        kind: ``"split"``, ``"stub"`` or ``"whole"``.
        flow: How the parts are run: ``"causal-lm"`` (prefill and decode steps), ``"encoder"``
            (once per batch), or a flow that a plugin package registers.
        parts: In the order they run.
        settings: The settings of the flow; JSON values only.
    """

    kind: Kind
    flow: str
    parts: tuple[Part, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """The part called ``name`` (`KeyError` where there is none)."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)
