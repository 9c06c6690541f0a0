"""Names that other libraries keep private, and that any release of theirs may rename.

No other module imports such a name. `find` looks a group of them up; where one is missing it
returns ``None``, and whoever asked takes the public way that the group names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_EXPORTER = "torch.onnx._internal.exporter"
_PROMOTION = "torch.onnx._internal.fx.passes.type_promotion"

#: To decompose a traced graph in place. Else: ``torch.onnx.export`` traces it a second time.
DECOMPOSING = {
    "exporter": f"{_EXPORTER}._core",
    "prepare": f"{_EXPORTER}._core:_prepare_exported_program_for_export",
    "implemented": f"{_EXPORTER}._decomp:get_onnx_implemented_overloads",
    "is_composite": "torch._export.utils:_is_cia_op",
    "can_be_kept": "torch._export.utils:_check_valid_to_preserve",
    "operator_base": "torch._ops:OperatorBase",
    "overload": "torch._ops:OpOverload",
    "symbolic_config": "torch.fx.experimental._config:patch",
    "promotion": f"{_PROMOTION}:InsertTypePromotion",
    "promotion_interpreter": f"{_PROMOTION}:_TypePromotionInterpreter",
    "promotion_of_node": f"{_PROMOTION}:_TypePromotionInterpreter._maybe_promote_node",
    "promotion_rule": f"{_PROMOTION}:get_type_promotion_rule",
}
#: To share PyTorch's table of ONNX operators. Else: ``torch.onnx.export`` makes one for each graph.
OPERATOR_TABLE = {
    "registry": f"{_EXPORTER}._registration:ONNXRegistry",
    "from_torchlib": f"{_EXPORTER}._registration:ONNXRegistry.from_torchlib",
    "register": f"{_EXPORTER}._registration:ONNXRegistry._register",
    "clean": f"{_EXPORTER}._registration:ONNXRegistry._cleanup_registry_based_on_opset_version",
    "entry": f"{_EXPORTER}._registration:OnnxDecompMeta",
    "overload_named": f"{_EXPORTER}._registration:_get_overload",
    "of_pytorch": f"{_EXPORTER}._torchlib._torchlib_registry:get_torchlib_ops",
    "of_onnxscript": "onnxscript.function_libs.torch_lib.registration:default_registry",
    "onnxscript_operators": "onnxscript.function_libs.torch_lib.ops",
}
#: To try each rule of onnxscript's optimizer on the operators that it matches alone. Else:
#: ``onnxscript.optimizer.optimize`` tries every rule on every node.
FOLDING = {"rules": "onnxscript.rewriter:_DEFAULT_REWRITE_RULES"}
#: To trace without notes that nothing reads. Else: the trace takes a fifth longer.
TRACING = {
    "thread_config": "torch._dynamo.config:patch",
    "cached": "torch._dynamo.config:fake_tensor_cache_enabled",
    "fx_config": "torch.fx.config",
    "no_stacks": "torch.fx.config:do_not_emit_stack_traces",
}
_LEGACY_GGUF = "transformers.modeling_gguf_pytorch_utils"
#: To read a GGUF file tensor by tensor. Else: ``from_pretrained`` reads it whole.
GGUF = {
    "load": f"{_LEGACY_GGUF}:load_gguf_checkpoint",
    "weights_map": f"{_LEGACY_GGUF}:get_gguf_hf_weights_map",
    "processors": f"{_LEGACY_GGUF}:TENSOR_PROCESSORS",
    "processor": f"{_LEGACY_GGUF}:TensorProcessor",
}
#: Architectures that newer releases read in another way. Else: there are none.
GGUF_BLOCKS = {"is_supported": "transformers.integrations.gguf:is_gguf_arch_supported"}


def find(group: Mapping[str, str]) -> SimpleNamespace | None:
    """The objects that a group names; ``None`` where a library lacks one of them.

    Args:
        group: Name here → ``module`` or ``module:attribute.path``.
    """
    try:
        return SimpleNamespace(**{name: _import(path) for name, path in group.items()})
    except (ImportError, AttributeError):
        return None


def _import(path: str) -> Any:
    module, _, attributes = path.partition(":")
    value = importlib.import_module(module)
    for attribute in filter(None, attributes.split(".")):
        value = getattr(value, attribute)
    return value


def operators(names: Iterable[str]) -> frozenset[Any]:
    """PyTorch's operators of these names (``aten``'s), as many as there are."""
    import torch

    packets = [(getattr(torch.ops.aten, name.partition(".")[0], None), name) for name in names]
    overloads = (getattr(packet, name.partition(".")[2], None) for packet, name in packets)
    return frozenset(overload for overload in overloads if overload is not None)


def matched_operator(rule: Any) -> str | None:
    """The operator type of the last node that a rule of onnxscript's rewriter matches.

    ``None`` where it may be one of several, or cannot be known.
    """
    try:
        name: str = rule._target_pattern.output_nodes[0].op_type  # noqa: SLF001
    except AttributeError:
        return None
    return name if name.isidentifier() else None  # else it is a pattern of names


def model_classes(auto_class: str) -> Mapping[Any, Any]:
    """Config class → model class, or classes, of an auto class of transformers.

    The public way is the mapping's own name, which not all of them derive from the class's.
    """
    import transformers

    mapping = getattr(getattr(transformers, auto_class), "_model_mapping", None)
    if mapping is None:
        name = auto_class.removeprefix("Auto").replace("Seq2SeqLM", "SeqToSeqCausalLM")
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+", name)
        mapping = getattr(transformers, f"{'_'.join(words).upper()}_MAPPING", {})
    return mapping


def attention_of(model: PreTrainedModel) -> str | None:
    """The attention that a model runs, such as ``"eager"``; ``None`` where it cannot be known.

    There is a public way to set it, ``set_attn_implementation``, and none to read it.
    """
    return getattr(model.config, "_attn_implementation", None)


def build_model(architecture: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of an architecture with eager attention; its weights are not set.

    The public way is the constructor. The default dtype, which it takes, is the process's: call
    this within `qeff_proxy.common.shared_change.one_model_at_a_time`.
    """
    build = getattr(architecture, "_from_config", None)
    if build is not None:
        return build(config, dtype=dtype, attn_implementation="eager")
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: PreTrainedModel = architecture(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("eager")
    return model
