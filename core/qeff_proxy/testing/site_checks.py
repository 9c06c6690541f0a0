"""Checks of the plugin, and of its two ``locate`` hooks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from qeff_proxy.cut.locate_sites import locate_sites
from qeff_proxy.errors import PluginError
from qeff_proxy.sites import Absent, Site
from qeff_proxy.testing.expectations import expect, needs

if TYPE_CHECKING:
    from qeff_proxy.testing.subject import Subject

_MIN_WORDS = 3


class SiteChecks:
    """The plugin is found, and locates embedding and head."""

    def test_the_plugin_is_found_by_its_model_type(self, subject: Subject) -> None:
        """An installed package, or the suite's own ``plugin``, claims the model type."""
        suite = subject.suite
        named = suite.model_type if suite.task is None else f"{suite.model_type}/{suite.task}"
        expect(
            subject.hooks.plugin != "generic",
            f"no installed package claims model type {named!r}",
            'Name it under [project.entry-points."qeff_proxy.families"] and install the package '
            "again, or set the suite's `plugin` to the module that carries the hooks.",
        )

    def test_the_plugins_hooks_can_be_used(self, subject: Subject) -> None:
        """Names, arguments and version of the hooks are right."""
        try:
            plugin = subject.hooks.plugin
        except PluginError as error:
            plugin, reason = None, str(error)
        else:
            reason = ""
        expect(
            plugin is not None,
            f"the plugin cannot be used: {reason}",
            "qeff_proxy.hookspecs has the five hooks with their arguments; qeff-proxy plugins "
            "--check says the same for every installed plugin.",
        )

    @needs("embedding")
    def test_the_token_embedding_is_located(self, subject: Subject) -> None:
        """A model that takes token ids has an embedding."""
        site = locate_sites(subject.model, subject.hooks)["embedding"]
        expect(
            isinstance(site, Site),
            f"locate_embedding says there is none: {site}",
            "Answer Site(path of the module), or declare capabilities without `embedding`.",
        )

    @needs("no_embedding")
    def test_that_there_is_no_token_embedding_is_said(self, subject: Subject) -> None:
        """For a model without token ids as input, the plugin answers `Absent`."""
        site = locate_sites(subject.model, subject.hooks)["embedding"]
        expect(
            isinstance(site, Absent),
            f"locate_embedding gives {site}, though the suite declares no embedding",
            "Answer Absent(reason), or declare `embedding=True`.",
        )

    @needs("head")
    def test_the_lm_head_is_located(self, subject: Subject) -> None:
        """A model that computes logits has a head."""
        site = locate_sites(subject.model, subject.hooks)["lm_head"]
        expect(
            isinstance(site, Site),
            f"locate_lm_head says there is none: {site}",
            "Answer Site(path of the module), or declare capabilities without `head`.",
        )

    @needs("no_head")
    def test_that_there_is_no_lm_head_is_said(self, subject: Subject) -> None:
        """For a model without logits, the plugin answers `Absent`."""
        site = locate_sites(subject.model, subject.hooks)["lm_head"]
        expect(
            isinstance(site, Absent),
            f"locate_lm_head gives {site}, though the suite declares no head",
            "Answer Absent(reason), or declare `head=True`.",
        )

    def test_absent_has_a_reason_that_a_user_can_read(self, subject: Subject) -> None:
        """``inspect`` and ``export.json`` show the reason."""
        for name, site in locate_sites(subject.model, subject.hooks).items():
            if isinstance(site, Absent):
                expect(
                    len(site.reason.split()) >= _MIN_WORDS,
                    f"the reason for no {name} is {site.reason!r}",
                    "Say why the model has none, in words: 'samples of sound go in, not token "
                    "ids'.",
                )

    def test_the_two_sites_are_different_modules(self, subject: Subject) -> None:
        """Embedding and head are different modules."""
        sites = locate_sites(subject.model, subject.hooks).values()
        paths = [site.module for site in sites if isinstance(site, Site)]
        expect(
            len({id(subject.model.get_submodule(path)) for path in paths}) == len(paths),
            f"token embedding and LM head are both at {paths[0] if paths else ''}",
            "Tied weights are two modules that share a parameter: name each module.",
        )

    @needs("embedding")
    def test_the_embedding_has_a_row_for_every_token(self, subject: Subject) -> None:
        """The embedding is that of tokens, not of positions or token types."""
        site = locate_sites(subject.model, subject.hooks)["embedding"]
        module = subject.model.get_submodule(site.module) if isinstance(site, Site) else None
        rows = [len(one) for one in module.parameters() if one.dim() == 2] if module else []
        wanted = subject.suite.vocabulary(subject.model)
        expect(
            sum(rows) >= wanted,
            f"the table at {getattr(site, 'module', None)} has {sum(rows)} rows for "
            f"{wanted} tokens",
            "Name the table of token ids; positions and token types are no site. Override "
            "`vocabulary` where the config's vocab_size is not what counts.",
        )

    def test_the_sites_are_told_from_the_architecture_alone(self, subject: Subject) -> None:
        """The ``locate`` hooks work on a model on the meta device, which has no values."""
        real = locate_sites(subject.model, subject.hooks)
        empty = copy.deepcopy(subject.model).to("meta")
        found = locate_sites(empty, subject.hooks)
        places = {name: getattr(site, "module", site) for name, site in found.items()}
        expect(
            places == {name: getattr(site, "module", site) for name, site in real.items()},
            f"on the meta device the sites are {places}",
            "Don't look at values of parameters in a locate hook; go by modules and config.",
        )
