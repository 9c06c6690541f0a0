"""A plugin that changes the model while it cuts is refused: the reference would be changed too."""

from __future__ import annotations

import pytest
import torch
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.cut.model_snapshot import changes_between, snapshot_model
from qeff_proxy.errors import PluginError
from qeff_proxy.families import generic
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing import random_weights, tiny_config
from transformers import AutoModelForCausalLM


@pytest.fixture
def model():
    return random_weights(AutoModelForCausalLM.from_config(tiny_config("llama")))


def scale_in_place(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)


def scale_behind_autograds_back(model):
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)


def exchange_a_module(model):
    model.model.layers[0].mlp = torch.nn.Identity()


def set_an_option(model):
    model.config.rms_norm_eps = 0.5


def leave_training_on(model):
    model.train()


CHANGES = {
    scale_in_place: "tensor model.norm.weight",
    scale_behind_autograds_back: "tensor model.layers.1.mlp.down_proj.weight",
    exchange_a_module: "module model.layers.0.mlp",
    set_an_option: "the config",
    leave_training_on: r"module \(the model\)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("hook", ["locate_embedding", "build_proxy"])
def test_a_plugin_that_changes_the_model_is_refused(model, change, hook):
    class Changing:
        @hookimpl
        def locate_embedding(self, model):
            if hook == "locate_embedding":
                change(model)

        @hookimpl
        def build_proxy(self, model, embedding, lm_head, kind):
            if hook == "build_proxy":
                change(model)
            return generic.build_proxy(model, embedding, lm_head, kind)

    plugins = Plugins()
    plugins.register(Changing(), ["llama"], name="changing")
    message = f"'changing' changed the model of type 'llama'.*: {CHANGES[change]}"
    with pytest.raises(PluginError, match=message):
        cut_model(wrap_model(model), plugins.hooks_for("llama"), "split")


def test_a_plugin_that_leaves_it_alone_passes(model):
    hooks = Plugins().hooks_for("llama")
    assert cut_model(wrap_model(model), hooks, "split").report is not None


def test_a_model_without_values_can_be_looked_at():
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 4)
    before = snapshot_model(empty)
    assert changes_between(before, snapshot_model(empty)) == []
    empty.bias = None
    assert "tensor bias" in changes_between(before, snapshot_model(empty))
