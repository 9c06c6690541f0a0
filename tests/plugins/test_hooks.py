"""The owner answers, the generic plugin answers what the owner leaves, and failures are named."""

from __future__ import annotations

import types

import importlib_metadata
import pluggy
import pytest
from qeff_proxy import hookspecs
from qeff_proxy.errors import CutError, PluginError, UnsupportedModelError, UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Proxy
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site
from torch import nn

REQUEST = Request(prompts=["Hi"])


class Generic:
    """Answers everything, and can be told from an owner by its answers."""

    @hookimpl(trylast=True)
    def locate_embedding(self):
        return Site("generic.embedding")

    @hookimpl(trylast=True)
    def locate_lm_head(self):
        return Site("generic.head")

    @hookimpl(trylast=True)
    def build_proxy(self, kind):
        return Proxy(kind, "generic", ())

    @hookimpl(trylast=True)
    def preprocess(self):
        return {"input_ids": "generic"}

    @hookimpl(trylast=True)
    def decode(self):
        return ["generic"]


def hooks_of(owner, generic=None):
    plugins = Plugins()
    if owner is not None:
        plugins.register(owner, ["rnn"], name="acme")
    return plugins.hooks_for("rnn", generic=generic or Generic())


def plugin_with(**functions):
    plugin = types.SimpleNamespace()
    for name, function in functions.items():
        setattr(plugin, name, hookimpl(function))
    return plugin


def test_the_owner_answers_all_five_hooks():
    proxy = Proxy("split", "acme", ())
    seen = {}

    def build_proxy(model, embedding, lm_head, kind):
        seen.update(model=model, embedding=embedding, lm_head=lm_head, kind=kind)
        return proxy

    hooks = hooks_of(
        plugin_with(
            locate_embedding=lambda model, config: Site(f"{model}.{config}"),
            locate_lm_head=lambda: Absent("there is none"),
            build_proxy=build_proxy,
            preprocess=lambda processor, request: {"input_ids": (processor, request)},
            decode=lambda processor, outputs: [processor, outputs],
        )
    )
    assert hooks.locate_embedding("model", "config") == Site("model.config")
    assert hooks.locate_lm_head("model", "config") == Absent("there is none")
    assert hooks.build_proxy("m", Site("e"), Absent("none"), "split") is proxy
    assert seen == {
        "model": "m",
        "embedding": Site("e"),
        "lm_head": Absent("none"),
        "kind": "split",
    }
    assert hooks.preprocess("p", REQUEST) == {"input_ids": ("p", REQUEST)}
    assert hooks.decode("p", {"generated_ids": []}) == ["p", {"generated_ids": []}]


def test_what_the_owner_leaves_out_or_passes_on_the_generic_plugin_answers():
    hooks = hooks_of(
        plugin_with(locate_embedding=lambda: None, decode=lambda processor: None),
    )
    assert hooks.locate_embedding(None, None) == Site("generic.embedding")
    assert hooks.locate_lm_head(None, None) == Site("generic.head")
    assert hooks.decode(None, {}) == ["generic"]
    assert hooks.plugin == "acme"


def test_a_falsy_answer_is_an_answer():
    assert hooks_of(plugin_with(decode=lambda: "")).decode(None, {}) == ""


def test_an_owner_that_asks_to_be_last_still_comes_before_the_generic_plugin():
    owner = types.SimpleNamespace(
        locate_embedding=hookimpl(trylast=True)(lambda: Site("owner.embedding"))
    )
    assert hooks_of(owner).locate_embedding(None, None) == Site("owner.embedding")


def test_an_owner_can_add_to_the_generic_answer():
    @hookimpl(wrapper=True)
    def locate_lm_head():
        site = yield
        return Site(site.module, follows=("tanh",))

    owner = types.SimpleNamespace(locate_lm_head=locate_lm_head)
    assert hooks_of(owner).locate_lm_head(None, None) == Site("generic.head", follows=("tanh",))


def test_no_other_plugin_takes_part():
    plugins = Plugins()
    plugins.register(plugin_with(decode=lambda: ["acme"]), ["rnn"])
    plugins.register(plugin_with(decode=lambda: ["brand"]), ["ssm"])
    assert plugins.hooks_for("rnn", generic=Generic()).decode(None, {}) == ["acme"]
    assert plugins.hooks_for("ssm", generic=Generic()).decode(None, {}) == ["brand"]
    assert plugins.hooks_for("cnn", generic=Generic()).decode(None, {}) == ["generic"]


def test_hooks_say_whose_they_are(site_packages):
    source = """
        from qeff_proxy.hookspecs import hookimpl

        @hookimpl
        def decode():
            return ["acme"]
    """
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": source}, version="2.1")
    plugins = Plugins.discover({})
    owned = plugins.hooks_for("rnn", generic=Generic())
    assert (owned.plugin, owned.distribution, owned.version) == ("acme_rnn", "acme", "2.1")
    unowned = plugins.hooks_for("cnn", generic=Generic())
    assert (unowned.plugin, unowned.distribution) == ("generic", "qeff-proxy")
    assert unowned.version == importlib_metadata.version("qeff-proxy")


# Failures


def fail(*arguments):
    raise LookupError("no such layer")


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("locate_embedding", (None, None)),
        ("locate_lm_head", (None, None)),
        ("build_proxy", (None, Site("a"), Site("b"), "split")),
        ("preprocess", (None, REQUEST)),
        ("decode", (None, {})),
    ],
)
def test_a_hook_that_raises_is_named_with_its_plugin_and_model_type(hook, arguments):
    hooks = hooks_of(plugin_with(**{hook: lambda: fail()}))
    with pytest.raises(PluginError) as caught:
        getattr(hooks, hook)(*arguments)
    message = str(caught.value)
    assert f"plugin 'acme' failed in {hook} for model type 'rnn'" in message
    assert "LookupError: no such layer" in message
    assert isinstance(caught.value.__cause__, LookupError)


def test_an_installed_plugin_that_raises_is_named_with_its_package(site_packages):
    source = """
        from qeff_proxy.hookspecs import hookimpl

        @hookimpl
        def decode():
            return {}["missing"]
    """
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": source})
    hooks = Plugins.discover({}).hooks_for("rnn", generic=Generic())
    with pytest.raises(PluginError, match="plugin 'acme_rnn' of package 'acme' failed in decode"):
        hooks.decode(None, {})


def test_a_failure_of_the_generic_plugin_is_not_blamed_on_the_owner():
    generic = Generic()
    generic.decode = hookimpl(trylast=True)(lambda: fail())
    hooks = hooks_of(plugin_with(decode=lambda: None), generic)
    with pytest.raises(PluginError, match="plugin 'generic' of package 'qeff-proxy' failed"):
        hooks.decode(None, {})


def test_an_error_of_the_project_passes_through_a_plugin_unchanged():
    error = CutError("they differ", "look at it")

    def build_proxy():
        raise error

    with pytest.raises(CutError) as caught:
        hooks_of(plugin_with(build_proxy=build_proxy)).build_proxy(None, None, None, "split")
    assert caught.value is error


def test_an_interrupt_passes_through():
    def decode():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hooks_of(plugin_with(decode=decode)).decode(None, {})


@pytest.mark.parametrize(
    ("hook", "arguments", "answer", "expected"),
    [
        ("locate_embedding", (None, None), "transformer.wte", "a str, not Site or Absent"),
        ("locate_lm_head", (None, None), True, "a bool, not Site or Absent"),
        ("build_proxy", (None, None, None, "split"), (), "a tuple, not Proxy"),
        ("preprocess", (None, REQUEST), [1], "a list, not Mapping"),
    ],
)
def test_an_answer_of_the_wrong_type_is_named(hook, arguments, answer, expected):
    hooks = hooks_of(plugin_with(**{hook: lambda: answer}))
    with pytest.raises(PluginError, match=f"'acme' answered {hook} for model type 'rnn' with"):
        getattr(hooks, hook)(*arguments)
    with pytest.raises(PluginError, match=expected):
        getattr(hooks, hook)(*arguments)


# Nobody knows


@pytest.fixture
def silent():
    """Hooks that nobody answers."""
    generic = types.SimpleNamespace(decode=hookimpl(trylast=True)(lambda: None))
    return hooks_of(None, generic)


def test_a_cut_that_no_plugin_knows_is_an_unsupported_model(silent):
    model = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"token embedding of Identity is .*'rnn'"):
        silent.locate_embedding(model, None)
    with pytest.raises(UnsupportedModelError, match=r"where the LM head of Identity is .*'rnn'"):
        silent.locate_lm_head(model, None)
    with pytest.raises(UnsupportedModelError, match=r"what a stub of Identity is .*'rnn'"):
        silent.build_proxy(model, Site("a"), Site("b"), "stub")


def test_a_request_that_no_plugin_takes_is_a_usage_error(silent):
    with pytest.raises(UsageError, match="makes no tensors of such a request"):
        silent.preprocess(None, REQUEST)


def test_outputs_that_no_plugin_decodes_stay_undecoded(silent):
    assert silent.decode(None, {}) is None


# The generic plugin


def test_a_generic_plugin_that_is_not_last_is_refused():
    with pytest.raises(ValueError, match="decode must be trylast"):
        hooks_of(None, plugin_with(decode=lambda: None))


def test_the_cores_generic_plugin_has_all_five_hooks_and_is_last():
    report = Plugins().check_generic()
    specs = pluggy.PluginManager("qeff_proxy")
    specs.add_hookspecs(hookspecs)
    assert report.state == "ok"
    assert report.hooks == tuple(sorted(vars(specs.hook)))
    assert Plugins().hooks_for("unheard-of").plugin == "generic"
