"""A plugin registered from Python serves the program that registered it, and no other."""

from __future__ import annotations

import types

import pytest
from qeff_proxy.errors import PluginError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.plugins.manager import Plugins


def make_plugin():
    return types.SimpleNamespace(decode=hookimpl(lambda: ["mine"]))


def test_it_serves_the_model_types_it_was_registered_for():
    plugins, plugin = Plugins(), make_plugin()
    loaded = plugins.register(plugin, ["rnn", "ssm"], name="mine")
    assert plugins.owner("rnn") is loaded
    assert plugins.owner("ssm") is loaded
    assert plugins.owner("cnn") is None
    assert (loaded.plugin, loaded.name, loaded.distribution) == (plugin, "mine", None)


def test_one_model_type_can_be_given_by_itself():
    plugins = Plugins()
    plugins.register(make_plugin(), "rnn")
    assert plugins.owner("rnn") is not None
    assert plugins.owner("r") is None


def test_it_comes_before_installed_packages_even_rivals(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"})
    site_packages.install("brand", {"rnn": "brand_rnn"})
    plugins = Plugins.discover({})
    plugins.register(make_plugin(), ["rnn"], name="mine")
    assert plugins.owner("rnn").name == "mine"
    states = {report.plugin: report for report in plugins.reports()}
    assert states["mine"].state == "ok"
    assert states["acme_rnn"].state == "listed"
    assert "rnn: served by 'mine'" in states["acme_rnn"].reason


def test_two_for_one_model_type_are_an_error_that_names_both():
    plugins = Plugins()
    plugins.register(make_plugin(), ["rnn"], name="first")
    with pytest.raises(PluginError, match=r"'second' and plugin 'first' .*'rnn'"):
        plugins.register(make_plugin(), ["ssm", "rnn"], name="second")
    assert plugins.owner("ssm") is None


def test_a_faulty_one_is_refused_at_once():
    plugin = types.SimpleNamespace(decod=hookimpl(lambda: None))
    with pytest.raises(PluginError, match="'SimpleNamespace' cannot be used: there is no hook"):
        Plugins().register(plugin, ["rnn"])


def test_nothing_of_it_is_shared_between_programs():
    Plugins().register(make_plugin(), ["rnn"])
    assert Plugins().owner("rnn") is None
    assert Plugins.discover({}).owner("rnn") is None
