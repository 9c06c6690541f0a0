"""Each check of sites, cut and export fails on a plugin that is made wrong for it.

A fault is a plugin, a suite or a flow that differs from sound ones in one thing. Faults that show
before anything is exported are not exported.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conformance_faults import Fault, checks_of, cut_like, expect_seen, run_check, subject_of
from qeff_proxy.families import generic
from qeff_proxy.layers import find_layer_list, shorten
from qeff_proxy.parts import TensorSpec
from qeff_proxy.sites import Absent, Site
from qeff_proxy.testing import CAUSAL_LM, FamilySuite, random_weights
from qeff_proxy.testing.export_checks import ExportChecks
from qeff_proxy.testing.part_checks import PartChecks
from qeff_proxy.testing.site_checks import SiteChecks
from torch import nn


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


def keep_two_layers(model, embedding, lm_head, kind):
    """Right for a model of one or two layers."""
    short = shorten(model, find_layer_list(model), 2)
    return generic.build_proxy(short, embedding, lm_head, kind)


def look_at_the_last_layer(proxy, model, **_):
    """It breaks where that layer is not loaded."""
    model.transformer.h[-1].ln_1.weight.sum().item()


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
    Fault("the_cut_is_verified", "do not equal the uncut model", {"build_proxy": keep_two_layers}),
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

FAULTS = [*SITES, *CUTS, *EXPORTS]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.check)
def test_a_check_fails_on_its_fault(fault, sound, tmp_path):
    expect_seen(fault, sound, tmp_path)


# A plugin whose parts are wrong in a way that only the files show

SEEN_IN_A_FAULTY_EXPORT = {
    "the_layers_are_streamed",
    "no_vocabulary_sized_tensor_is_in_the_body",
    "every_weight_is_stored_once",
}


@pytest.fixture(scope="module")
def heavy(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heavy")

    def carry_and_look(proxy, **what):
        look_at_the_last_layer(proxy, **what)
        return carry_tables_along(proxy, **what)

    fault = Fault("", "", cut_like(carry_and_look))
    return subject_of(fault, sound, folder, type(sound.suite))


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("no_vocabulary_sized_tensor_is_in_the_body", "copy .131, 32., which is as large"),
        ("every_weight_is_stored_once", "weights take .* bytes, and the model has"),
        ("the_layers_are_streamed", "all layers had to be loaded: .*without its layers"),
    ],
)
def test_a_check_fails_on_a_faulty_export(check, says, heavy, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=says):
        run_check(check, heavy, tmp_path)


def test_every_check_has_its_fault():
    wanted = checks_of([SiteChecks, PartChecks, ExportChecks])
    assert {fault.check for fault in FAULTS} | SEEN_IN_A_FAULTY_EXPORT == wanted
