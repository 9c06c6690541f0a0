"""Every check of the suite fails on a plugin that is made wrong for it, and says what to do.

A fault is a plugin, a suite, a flow or sessions that differ from sound ones in one thing. Faults
that show before anything is exported are not exported; those that show in a run borrow the sound
export.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from qeff_proxy import generic
from qeff_proxy.errors import ProxyError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import TensorSpec
from qeff_proxy.sites import Absent, Site
from qeff_proxy.testing import CAUSAL_LM, FamilySuite, random_weights
from qeff_proxy.testing.subject import Subject
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKS = {name.removeprefix("test_") for name in dir(FamilySuite) if name.startswith("test_")}


@dataclass(frozen=True)
class Fault:
    """What is wrong.

    Attributes:
        check: The check that must see it.
        says: What the failure must say, as a regular expression.
        hooks: Hooks in place of the sound plugin's.
        suite: Attributes and methods in place of the sound suite's.
        flow: A flow of `faulty_flows`, by name.
        session: Makes faulty sessions of sound ones.
        export: Changes a copy of the sound export.
    """

    check: str
    says: str
    hooks: dict[str, Any] = dataclasses.field(default_factory=dict)
    suite: dict[str, Any] = dataclasses.field(default_factory=dict)
    flow: str | None = None
    session: Callable[[Any, str], Any] | None = None
    export: Callable[[Any], Any] | None = None


# Sites


def where(path):
    return lambda model: Site(path)


def head_in_values(model):
    return Site("lm_head") if model.lm_head.weight.sum().item() else None


def nothing(reason):
    return lambda model: Absent(reason)


SITES = [
    Fault(
        "the_plugin_is_found_by_its_model_type",
        "no installed package claims model type 'xglm'",
        suite={"model_type": "xglm", "plugin": None},
    ),
    Fault(
        "the_plugins_hooks_can_be_used",
        "no hook 'locate_head'.*five hooks",
        hooks={"locate_head": where("lm_head")},
    ),
    Fault(
        "the_token_embedding_is_located",
        "says there is none.*Answer Site",
        hooks={"locate_embedding": nothing("sound goes in")},
    ),
    Fault(
        "that_there_is_no_token_embedding_is_said",
        r"gives Site.*Answer Absent\(reason\)",
        suite={"capabilities": replace(CAUSAL_LM, embedding=False)},
    ),
    Fault(
        "the_lm_head_is_located",
        "says there is none",
        hooks={"locate_lm_head": nothing("no head at all")},
    ),
    Fault(
        "that_there_is_no_lm_head_is_said",
        "gives Site",
        suite={"capabilities": replace(CAUSAL_LM, head=False)},
    ),
    Fault(
        "absent_has_a_reason_that_a_user_can_read",
        "reason for no embedding is 'none'",
        hooks={"locate_embedding": nothing("none")},
    ),
    Fault(
        "the_two_sites_are_different_modules",
        "both at lm_head",
        hooks={"locate_embedding": where("lm_head"), "locate_lm_head": where("lm_head")},
    ),
    Fault(
        "the_embedding_has_a_row_for_every_token",
        "wpe has 96 rows for 131 tokens",
        hooks={"locate_embedding": where("transformer.wpe")},
    ),
    Fault(
        "the_sites_are_told_from_the_architecture_alone",
        "meta",
        hooks={"locate_lm_head": head_in_values},
    ),
]


# Cut


def cut_like(change):
    """A ``build_proxy`` that changes what the sound one gives."""

    def build_proxy(model, embedding, lm_head, kind, options):
        proxy = generic.build_proxy(model, embedding, lm_head, kind)
        return change(proxy, model=model, kind=kind, options=options) or proxy

    return {"build_proxy": build_proxy}


def with_part(proxy, name, /, **changes):
    parts = [replace(part, **changes) if part.name == name else part for part in proxy.parts]
    return replace(proxy, parts=tuple(parts))


class Halved(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **tensors):
        return {name: value / 2 for name, value in self.module(**tensors).items()}


def halve_the_embedding(proxy, kind, **_):
    if kind == "split":
        return with_part(proxy, "embedding", module=Halved(proxy.part("embedding").module))
    return None


def halve_the_whole(proxy, kind, **_):
    if kind == "whole":
        return with_part(proxy, "model", module=Halved(proxy.part("model").module))
    return None


def change_the_model(proxy, model, **_):
    model.transformer.ln_f.weight.data.mul_(2)


def split_whatever_was_asked(proxy, kind, **_):
    return replace(proxy, kind="split")


def no_stubs(model, embedding, lm_head, kind):
    proxy = generic.build_proxy(model, embedding, lm_head, "whole" if kind == "stub" else kind)
    return replace(proxy, kind=kind)


class Renamed(nn.Module):
    """Gives an output another name."""

    def __init__(self, module, old, new):
        super().__init__()
        self.module, self.old, self.new = module, old, new

    def forward(self, **tensors):
        outputs = self.module(**tensors)
        return {self.new if name == self.old else name: v for name, v in outputs.items()}


class Shifted(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, hidden):
        return self.module(last_hidden_state=hidden)


def rename_the_heads_input(proxy, kind, **_):
    if kind == "split":
        body, head = proxy.part("body"), proxy.part("lm_head")
        hidden = replace(body.outputs[0], name="hidden")
        proxy = with_part(
            proxy,
            "body",
            outputs=(hidden, *body.outputs[1:]),
            module=Renamed(body.module, "last_hidden_state", "hidden"),
        )
        return with_part(proxy, "lm_head", inputs=(hidden,), module=Shifted(head.module))
    return None


def name_the_body_badly(proxy, kind, **_):
    return with_part(proxy, "body", name="Body 1")


def name_an_axis_badly(proxy, kind, **_):
    if kind == "split":
        spec = proxy.part("embedding").inputs[0]
        return with_part(proxy, "embedding", inputs=(replace(spec, shape=("Batch Size", "query")),))
    return None


def take_what_nobody_gives(proxy, kind, **_):
    if kind == "split":
        mystery = TensorSpec("mystery", "float32", ("batch", 3))
        return with_part(proxy, "body", inputs=(*proxy.part("body").inputs, mystery))
    return None


def keep_the_cache_short(proxy, kind, **_):
    if kind == "split":
        outputs = [
            replace(spec, shape=tuple("past" if a == "past + query" else a for a in spec.shape))
            for spec in proxy.part("body").outputs
        ]
        return with_part(proxy, "body", outputs=tuple(outputs))
    return None


def always_float32(proxy, kind, **_):
    if kind == "split":
        spec = replace(proxy.part("lm_head").outputs[0], dtype="float32")
        return with_part(proxy, "lm_head", outputs=(spec,))
    return None


def forget_an_option(proxy, options, **_):
    return replace(proxy, settings={**proxy.settings, "made": "anew" if options else "first"})


def settings_that_are_no_json(proxy, **_):
    return replace(proxy, settings={"layers": {1, 2}})


def zero_model(self):
    model = random_weights(FamilySuite.make_model(self))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def verified_by(flow):
    return cut_like(lambda proxy, **_: replace(proxy, flow=flow))


CUTS = [
    Fault("the_cut_is_verified", "do not equal the uncut model", cut_like(halve_the_embedding)),
    Fault(
        "the_verification_has_something_to_compare",
        "next to nothing.*random weights",
        suite={"make_model": zero_model},
    ),
    Fault(
        "the_verification_sees_a_fault_in_each_part",
        "verified an embedding part that gives",
        verified_by("faulty-unverified"),
    ),
    Fault("the_model_is_left_as_it_was", "ln_f.weight", cut_like(change_the_model)),
    Fault(
        "each_kind_is_what_was_asked_for",
        "asked for 'stub', build_proxy gave 'split'",
        cut_like(split_whatever_was_asked),
    ),
    Fault("the_whole_model_is_verified_too", "do not equal", cut_like(halve_the_whole)),
    Fault(
        "a_stub_reads_no_weight_of_the_vocabulary",
        "still reads.*EmbeddingStub",
        {"build_proxy": no_stubs},
    ),
    Fault(
        "the_ends_have_the_standard_names", r"takes \['hidden'\]", cut_like(rename_the_heads_input)
    ),
    Fault("names_follow_the_conventions", "not usable.*Body 1", cut_like(name_the_body_badly)),
    Fault("axes_follow_the_conventions", "Batch Size", cut_like(name_an_axis_badly)),
    Fault(
        "every_input_is_supplied", "nothing supplies 'mystery'", cut_like(take_what_nobody_gives)
    ),
    Fault(
        "each_cache_input_comes_back_one_step_longer",
        "present.0.key must be",
        cut_like(keep_the_cache_short),
    ),
    Fault(
        "specs_have_the_dtypes_of_the_model",
        "logits is float32 for a model in float16",
        cut_like(always_float32),
    ),
    Fault(
        "the_settings_lead_to_the_same_proxy", "lead to another proxy", cut_like(forget_an_option)
    ),
    Fault("the_settings_lead_to_the_same_proxy", "no JSON", cut_like(settings_that_are_no_json)),
]


# Export


class Copied(nn.Module):
    """A body that carries a table of the vocabulary's size along, and a head that copies one."""

    def __init__(self, module, table):
        super().__init__()
        self.module = module
        self.copy = nn.Parameter(table.detach().clone() + 1)

    def forward(self, **tensors):
        outputs = self.module(**tensors)
        first = next(iter(outputs))
        return {**outputs, first: outputs[first] + 0 * self.copy.sum()}


def carry_tables_along(proxy, model, kind, **_):
    if kind == "split":
        body, head = proxy.part("body"), proxy.part("lm_head")
        table = model.transformer.wte.weight
        proxy = with_part(proxy, "body", module=Copied(body.module, table))
        return with_part(proxy, "lm_head", module=Copied(head.module, table))
    return None


def edited(change):
    """A change of the body's graph, in a copy of the sound export."""

    def edit(export):
        path = export.folder / "body.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model)
        onnx.save(model, path)
        return export

    return edit


def fix_an_axis(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def add_a_strange_operator(model):
    model.graph.node[0].domain = "com.acme"


def add_a_constant(model):
    table = onnx.numpy_helper.from_array(np.zeros((131, 2), np.float32), "table")
    model.graph.initializer.append(table)


def with_figures(export):
    return replace(export, cut={**export.cut, "graphs": {**export.cut["graphs"], "body": 0.5}})


def made_by_another(export):
    plugin = {**export.made_by["plugin"], "name": "another"}
    return replace(export, made_by={**export.made_by, "plugin": plugin})


def misfiled(export):
    """The body's weights where those of the vocabulary belong."""
    path = export.folder
    shutil.copyfile(path / "body.safetensors", path / "vocabulary.safetensors")
    return export


EXPORTS = [
    Fault(
        "no_vocabulary_sized_constant_is_in_a_graph",
        "body.onnx has .'table'",
        export=edited(add_a_constant),
    ),
    Fault("the_sites_are_in_the_vocabularys_file", "no part of a site", export=misfiled),
    Fault(
        "the_graphs_have_the_names_and_axes_of_the_parts",
        r"axes \['query'\] of inputs_embeds",
        export=edited(fix_an_axis),
    ),
    Fault(
        "the_graphs_use_standard_operators",
        "uses .'com.acme.",
        export=edited(add_a_strange_operator),
    ),
    Fault("the_graphs_give_what_pytorch_gives", "graphs and parts differ", export=with_figures),
    Fault("the_manifest_names_the_plugin", "another", export=made_by_another),
]


# Runs


class Wrapped:
    """A session that does something else than it is asked."""

    def __init__(self, session, change):
        self.session, self.change = session, change

    def run(self, feeds):
        return self.change(self.session, dict(feeds))

    def close(self):
        self.session.close()


def on(part, change):
    return lambda session, name: Wrapped(session, change) if name == part else session


def scaled(session, feeds):
    return {name: value * np.float32(1.01) for name, value in session.run(feeds).items()}


def positions_of_decode_steps_moved(session, feeds):
    if feeds["past_key_values.0.key"].shape[2]:
        feeds["position_ids"] = feeds["position_ids"] + 1
    return session.run(feeds)


def deaf(session, feeds):
    return {name: np.zeros_like(value) for name, value in session.run(feeds).items()}


def blind_to_earlier_chunks(session, feeds):
    past = feeds["past_key_values.0.key"].shape[2]
    if past and feeds["inputs_embeds"].shape[1] > 1:
        feeds["attention_mask"][..., :past] = np.finfo(np.float32).min
    return session.run(feeds)


def padding_is_seen(session, feeds):
    total = feeds["attention_mask"].shape[-1]
    query = feeds["attention_mask"].shape[-2]
    later = np.triu(np.ones((query, total), bool), total - query + 1)
    lowest = np.finfo(np.float32).min
    feeds["attention_mask"] = np.broadcast_to(
        np.where(later, lowest, np.float32(0)), feeds["attention_mask"].shape
    ).astype(np.float32)
    return session.run(feeds)


def rows_mixed(session, feeds):
    feeds["inputs_embeds"] = (
        feeds["inputs_embeds"].mean(0, keepdims=True).repeat(len(feeds["inputs_embeds"]), 0)
    )
    return session.run(feeds)


def noisy(session, feeds):
    noise = np.random.default_rng().standard_normal()
    return {name: value + np.float32(noise * 1e-3) for name, value in session.run(feeds).items()}


def preprocess_anything(processor, request):
    return {"input_ids": torch.ones(1, 3, dtype=torch.int64)}


def preprocess_ever_more(processor, request):
    """It keeps what it was asked, in the processor."""
    processor.model_max_length -= 1
    return {"input_ids": torch.ones(1, processor.model_max_length % 7 + 1, dtype=torch.int64)}


def decode_with_a_processor(processor, outputs):
    return processor.batch_decode(outputs["generated_ids"])


def reseed(proxy, **_):
    torch.manual_seed(torch.initial_seed() + 1)


RUNS = [
    Fault(
        "onnx_runtime_gives_what_pytorch_gives",
        "ONNX Runtime and PyTorch differ",
        session=on("lm_head", scaled),
    ),
    Fault(
        "prefill_and_decode_steps_equal_one_pass",
        "decode steps differ from one pass",
        session=on("body", positions_of_decode_steps_moved),
    ),
    Fault("the_input_matters", "two different inputs give the same", session=on("embedding", deaf)),
    Fault(
        "a_prompt_in_chunks_gives_the_same",
        "in chunks gives something else",
        session=on("body", blind_to_earlier_chunks),
    ),
    Fault(
        "padding_changes_nothing",
        "padding changes what a row gives",
        session=on("body", padding_is_seen),
    ),
    Fault(
        "a_batch_gives_what_its_rows_give_alone",
        "row 0 gives something else in a batch",
        session=on("body", rows_mixed),
    ),
    Fault(
        "a_batch_gives_what_its_rows_give_alone",
        "Let make_inputs give at least two",
        suite={"make_inputs": lambda self, model: FamilySuite.make_inputs(self, model)[:1]},
    ),
    Fault(
        "two_runs_give_the_same_bits",
        "the same run again gives something else",
        session=on("body", noisy),
    ),
    Fault(
        "a_dump_is_complete_and_can_be_read",
        "lacks .'last_hidden_state'.* of the lm_head part",
        flow="faulty-headless",
    ),
    Fault(
        "recorded_inputs_and_outputs_belong_together",
        "does not give its recorded outputs",
        flow="faulty-late",
    ),
    Fault("a_stub_is_not_decoded", "running a stub said 'nothing'", flow="faulty-careless"),
    Fault(
        "a_request_without_input_is_refused",
        "a request without input was run",
        {"preprocess": preprocess_anything},
    ),
    Fault(
        "every_backend_gives_the_same",
        "gives something else than ONNX Runtime",
        flow="faulty-unsteady",
    ),
    Fault(
        "the_processors_request_becomes_tensors",
        "other tensors when it is called again",
        {"preprocess": preprocess_ever_more},
    ),
    Fault(
        "outputs_become_what_the_user_wanted",
        "failed in decode.*NoneType",
        {"decode": decode_with_a_processor},
    ),
    Fault("outputs_become_what_the_user_wanted", "decode gave None", suite={"silent": True}),
    Fault("no_global_state_is_left", "torch's random seed", cut_like(reseed)),
]

FAULTS = [*SITES, *CUTS, *EXPORTS, *RUNS]


def plugin_of(hooks):
    """A plugin with these hooks; where it has none, the generic one answers."""

    class Plugin:
        pass

    for name, function in (hooks or {"locate_embedding": lambda: None}).items():
        setattr(Plugin, name, staticmethod(hookimpl(function)))
    return Plugin()


def subject_of(fault, sound, folder, suites):
    """A subject with the fault, and with the sound family's parts where those serve."""
    changes = {"plugin": plugin_of(fault.hooks), **fault.suite}
    suite = type("FaultySuite", (suites,), changes)
    subject = Subject(suite(), folder)
    runs = fault in RUNS or "make_inputs" in fault.suite
    if not fault.hooks.get("build_proxy") and (runs or fault.export or fault.session):
        borrowed = {"model": sound.model, "loaded": sound.loaded, "cut": sound.cut}
        subject.__dict__.update(borrowed, export=sound.export, sessions=sound.sessions)
    elif fault in RUNS or fault.check.startswith("a_stub_reads"):
        subject.__dict__.update(export=sound.export, sessions=sound.sessions)
    if fault.export is not None:
        copy = shutil.copytree(sound.export.folder, folder / "copy")
        subject.__dict__["export"] = fault.export(replace(sound.export, folder=copy))
    if fault.suite.get("silent"):  # nothing behind the plugin that would decode for it
        silent = types.SimpleNamespace(preprocess=generic.preprocess)
        subject.__dict__["hooks"] = subject.plugins.hooks_for("gpt2", generic=silent)
    if fault.flow is not None:
        subject.__dict__["export"] = replace(sound.export, flow=fault.flow)
    if fault.session is not None:
        subject.__dict__["sessions"] = {
            name: fault.session(one, name) for name, one in sound.sessions.items()
        }
    return subject


def run_check(name, subject, folder):
    check = getattr(FamilySuite, f"test_{name}")
    extra = {"tmp_path": folder} if "tmp_path" in check.__code__.co_varnames else {}
    check(subject.suite, subject, **extra)


def test_every_check_has_its_fault():
    assert {fault.check for fault in FAULTS} | SEEN_IN_A_FAULTY_EXPORT == CHECKS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.check)
def test_a_check_fails_on_its_fault(fault, sound, tmp_path):
    subject = subject_of(fault, sound, tmp_path / "faulty", type(sound.suite))
    (tmp_path / "dump").mkdir()
    with pytest.raises((pytest.fail.Exception, ProxyError)) as caught:
        run_check(fault.check, subject, tmp_path / "dump")
    said = " ".join(str(caught.value).split())
    assert re.search(fault.says, said), said


# A plugin whose parts are wrong in a way that only the files show

SEEN_IN_A_FAULTY_EXPORT = {
    "no_vocabulary_sized_tensor_is_in_the_body",
    "every_weight_is_stored_once",
}


@pytest.fixture(scope="module")
def heavy(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heavy")
    fault = Fault("", "", cut_like(carry_tables_along))
    return subject_of(fault, sound, folder, type(sound.suite))


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("no_vocabulary_sized_tensor_is_in_the_body", "copy .131, 32., which is as large"),
        ("every_weight_is_stored_once", "weights take .* bytes, and the model has"),
    ],
)
def test_a_check_fails_on_a_faulty_export(check, says, heavy, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=says):
        run_check(check, heavy, tmp_path)


def test_a_sound_family_passes_every_check(sound, tmp_path):
    subject = subject_of(Fault("", ""), sound, tmp_path / "sound", type(sound.suite))
    subject.__dict__.update(
        model=sound.model, loaded=sound.loaded, cut=sound.cut, sessions=sound.sessions
    )
    subject.__dict__["export"] = sound.export
    unneeded = {"that_there_is_no_token_embedding_is_said", "that_there_is_no_lm_head_is_said"}
    by_whom = {"the_manifest_names_the_plugin"}  # the sound export was made by the generic plugin
    for name in sorted(CHECKS - unneeded - by_whom):
        folder = tmp_path / name
        folder.mkdir()
        run_check(name, subject, folder)
