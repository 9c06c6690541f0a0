"""Checks of the cut: the parts, their names and axes, and the verification itself."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qeff_proxy.common.messages import an
from qeff_proxy.cut.cut_model import cut_model, site_weights
from qeff_proxy.cut.model_snapshot import changes_between, snapshot_model
from qeff_proxy.errors import CutError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.load_model import with_options
from qeff_proxy.parts import Kind, Part, Proxy
from qeff_proxy.tensor_names import is_state
from qeff_proxy.testing.expectations import expect, needs

if TYPE_CHECKING:
    from qeff_proxy.testing.subject import Subject

_PART = re.compile(r"[a-z][a-z0-9_]*")
_TENSOR = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*", re.IGNORECASE)
_AXIS = re.compile(r"[a-z_][a-z0-9_]*( \+ [a-z_][a-z0-9_]*)*")
#: The inputs that the engine creates, besides masks and cache.
_HOST = {"padding_mask", "position_ids", "input_ids", "token_type_ids"}
_ENDS = {
    "embedding": (["input_ids"], ["inputs_embeds"]),
    "lm_head": (["last_hidden_state"], ["logits"]),
}
#: A fault, relative to the peak of a part's output, far above every tolerance.
_FAULT = 0.3


class _ReadTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the addresses of the tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.places |= {one.data_ptr() for one in leaves if isinstance(one, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def _disturb(_module: nn.Module, _inputs: Any, outputs: dict[str, torch.Tensor]) -> Any:
    """A part's outputs with a fault: each element is mixed with its neighbour."""
    return {
        name: value + _FAULT * torch.roll(value, 1, -1) if value.is_floating_point() else value
        for name, value in outputs.items()
    }


class PartChecks:
    """The parts together equal the model."""

    def test_the_cut_is_verified(self, subject: Subject) -> None:
        """The parts together compute what the uncut model computes."""
        report = subject.cut.report
        expect(
            report is not None and report.max_difference <= report.tolerance * report.largest_value,
            f"the cut was not verified: {report}",
            "The flow's verify must compare the parts with the uncut model.",
        )

    def test_the_verification_has_something_to_compare(self, subject: Subject) -> None:
        """The model's outputs are not zeros, and have several positions, so that faults show."""
        report = subject.cut.report
        expect(
            report is not None and report.largest_value > 1e-3 and report.positions > 1,
            f"the uncut model gives next to nothing: {report}",
            "Give the tiny model random weights (qeff_proxy.testing.random_weights), and let the "
            "flow's verify compare several positions.",
        )

    def test_the_verification_sees_a_fault_in_each_part(self, subject: Subject) -> None:
        """A fault in any of the parts is detected."""
        cut = subject.cut
        for part in cut.proxy.parts:
            handle = part.module.register_forward_hook(_disturb)
            try:
                load_flow(cut.proxy.flow).verify(subject.model, cut.proxy, cut.sites)
            except CutError:
                continue
            finally:
                handle.remove()
            expect(
                False,
                f"flow {cut.proxy.flow!r} verified {an(part.name)} part that gives wrong numbers",
                "Its verify must run every part on inputs that reach its output, and compare with "
                "qeff_proxy.flows.equality.check_equal.",
            )

    def test_the_model_is_left_as_it_was(self, subject: Subject) -> None:
        """Cutting does not change the model: parts are new modules that share its submodules."""
        before = snapshot_model(subject.model)
        subject.cut_as("split", verify=False)
        subject.cut_as("stub", verify=False)
        changes = changes_between(before, snapshot_model(subject.model))
        expect(
            not changes,
            f"build_proxy changed the model: {', '.join(changes[:3])}",
            "Build parts from copies: qeff_proxy.layers.replace_modules exchanges submodules "
            "without touching the model.",
        )

    def test_each_kind_is_what_was_asked_for(self, subject: Subject) -> None:
        """``build_proxy`` returns the requested ``kind``."""
        kinds: tuple[Kind, ...] = ("split", "stub", "whole")
        for kind in kinds:
            found = subject.cut_as(kind, verify=False).proxy.kind
            expect(
                found == kind,
                f"asked for {kind!r}, build_proxy gave {found!r}",
                "Pass `kind` on to Proxy and build the parts of that kind.",
            )

    def test_the_whole_model_is_verified_too(self, subject: Subject) -> None:
        """``--proxy none`` exports the uncut model."""
        report = subject.cut_as("whole").report
        expect(report is not None, "the whole model was not verified", "See the flow's verify.")

    @needs("vocabulary")
    def test_a_stub_reads_no_weight_of_the_vocabulary(self, subject: Subject) -> None:
        """A stub reads no weights of embedding and head."""
        cut = subject.cut_as("stub", verify=False)
        parameters = dict(subject.model.named_parameters(remove_duplicate=False))
        names = {name for site in cut.sites.values() for name in site_weights(subject.loaded, site)}
        with _ReadTensors() as read:
            subject.run_on(subject.rows[0], proxy=cut.proxy)
        found = sorted(name for name in names if parameters[name].data_ptr() in read.places)
        expect(
            not found,
            f"the stub still reads {found[:1]}",
            "Put qeff_proxy.families.decoder.EmbeddingStub and HeadStub where the sites are.",
        )

    def test_the_ends_have_the_standard_names(self, subject: Subject) -> None:
        """The parts of a split have the usual names for their inputs and outputs."""
        for part in subject.proxy.parts:
            if part.name in _ENDS:
                inputs, outputs = _ENDS[part.name]
                found = ([one.name for one in part.inputs], [one.name for one in part.outputs])
                expect(
                    found == (inputs, outputs),
                    f"the {part.name} part takes {found[0]} and gives {found[1]}",
                    f"It takes {inputs} and gives {outputs}.",
                )

    def test_names_follow_the_conventions(self, subject: Subject) -> None:
        """Names can be used in dumps and comparisons, and are unique."""
        parts = subject.proxy.parts
        wrong = [part.name for part in parts if not _PART.fullmatch(part.name)]
        for part in parts:
            names = [spec.name for spec in (*part.inputs, *part.outputs)]
            wrong += [name for name in names if not _TENSOR.fullmatch(name)]
            for side in (part.inputs, part.outputs):
                given = [spec.name for spec in side]
                wrong += [name for name in given if given.count(name) > 1]
        wrong += [name for name in {p.name for p in parts} if _count(parts, name) > 1]
        expect(
            not wrong,
            f"these names are not usable, or come twice: {sorted(set(wrong))}",
            "Parts are words like 'body'; tensors like 'past_key_values.0.key', letters, digits "
            "and underscores, with dots between.",
        )

    def test_axes_follow_the_conventions(self, subject: Subject) -> None:
        """An axis is a size or a name, such as ``past + query``; text and sound have a batch."""
        for part in subject.proxy.parts:
            for spec in (*part.inputs, *part.outputs):
                wrong = [a for a in spec.shape if isinstance(a, str) and not _AXIS.fullmatch(a)]
                expect(
                    not wrong and len(spec.shape) > 0,
                    f"{part.name}.{spec.name} has axes {list(spec.shape)}",
                    "Name dynamic axes with small letters: batch, query, past, past + query, "
                    "sequence.",
                )
                # Positions may be of several axes: time, height and width.
                axis = len(spec.shape) == 3 and spec.name == "position_ids"
                if part.name in ("embedding", "body", "lm_head"):
                    expect(
                        spec.shape[axis] == "batch",
                        f"the first axis of {part.name}.{spec.name} is {spec.shape[0]!r}",
                        "It is called 'batch' and is dynamic.",
                    )

    def test_every_input_is_supplied(self, subject: Subject) -> None:
        """Each input is an output of an earlier part, or created by the host, or the user's."""
        given = set(subject.rows[0])
        known: set[str] = set(_HOST) | given
        for part in subject.proxy.parts:
            masks = {mask.name for mask in part.masks}
            for spec in part.inputs:
                cache = spec.name.startswith("past_key_values.")
                expect(
                    spec.name in known | masks or cache or subject.suite.supplies(spec.name),
                    f"nothing supplies {spec.name!r} of the {part.name} part",
                    "Give it in preprocess, name it as an earlier part's output is named, or "
                    "declare it a mask. Override `supplies` where your flow makes it.",
                )
            known |= {spec.name for spec in part.outputs}

    @needs("cache")
    def test_each_cache_input_comes_back_one_step_longer(self, subject: Subject) -> None:
        """Each ``past_key_values.N.key`` has a ``present.N.key``, each state one of its size."""
        parts = subject.proxy.parts
        inputs = {s.name: s.shape for p in parts for s in p.inputs}
        outputs = {s.name: s.shape for p in parts for s in p.outputs}
        caches = {n: s for n, s in inputs.items() if n.startswith("past_key_values.")}
        expect(caches, "no part takes a cache", "Name its inputs past_key_values.<layer>.key.")
        for name, shape in caches.items():
            present = name.replace("past_key_values", "present", 1)
            wanted = tuple("past + query" if axis == "past" else axis for axis in shape)
            expect(
                outputs.get(present) == wanted and ("past" in shape or is_state(name)),
                f"{name} {list(shape)} goes in, and {present} {outputs.get(present)} comes out",
                f"{present} must be {list(wanted)}.",
            )

    def test_specs_have_the_dtypes_of_the_model(self, subject: Subject) -> None:
        """In half precision the specs are half precision, and ids stay int64."""
        proxy = cut_model(subject.half_copy(), subject.hooks, "split", verify=False).proxy
        for part in proxy.parts:
            for spec in (*part.inputs, *part.outputs):
                expect(
                    spec.dtype in ("float16", "int64", "int32", "bool"),
                    f"{part.name}.{spec.name} is {spec.dtype} for a model in float16",
                    "Take the dtype from model.dtype.",
                )

    def test_the_settings_lead_to_the_same_proxy(self, subject: Subject) -> None:
        """Settings are JSON, and as options they build the same parts again."""
        proxy = subject.proxy
        try:
            json.dumps(proxy.settings)
        except TypeError as error:
            expect(
                False,
                f"the proxy's settings are no JSON: {error}",
                "Keep to numbers, strings, lists and dicts.",
            )
        again = cut_model(
            with_options(subject.loaded, proxy.settings), subject.hooks, "split", verify=False
        ).proxy
        expect(
            _shape_of(again) == _shape_of(proxy) and again.settings == proxy.settings,
            "the proxy's own settings, given back as options, lead to another proxy",
            "Write into `settings` what build_proxy needs to know, by the names of its options.",
        )


def _count(parts: Any, name: str) -> int:
    return sum(part.name == name for part in parts)


def _shape_of(proxy: Proxy) -> list[tuple[Any, ...]]:
    def of(part: Part) -> tuple[Any, ...]:
        return part.name, part.inputs, part.outputs, part.masks, part.weights

    return [of(part) for part in proxy.parts]
