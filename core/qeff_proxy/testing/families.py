"""The conformance suite of families: inherit `FamilySuite` in a test file of a few lines.

::

    from qeff_proxy.testing import FamilySuite


    class TestMyFamily(FamilySuite):
        model_type = "my-model"

pytest runs about forty checks: the plugin is found, the sites exist, the cut is verified and the
verification detects faults, the body contains no weight of the vocabulary, names and axes follow
the conventions, and the exported parts compute what the model computes, in steps, in chunks,
padded, in batches and, within the tolerances of ``verify``, on each installed backend. The model,
which is so deep that layers repeat, is exported once per class, with layer taps, from a
checkpoint's folder. `Capabilities` declare what a family cannot do; the checks that need it are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qeff_proxy.testing.export_checks import ExportChecks
from qeff_proxy.testing.family import Family
from qeff_proxy.testing.part_checks import PartChecks
from qeff_proxy.testing.run_checks import RunChecks
from qeff_proxy.testing.site_checks import SiteChecks
from qeff_proxy.testing.subject import Subject

_NEW_TOKENS = 4


class FamilySuite(Family, SiteChecks, PartChecks, ExportChecks, RunChecks):
    """The checks of one family; `Family` documents what a subclass declares."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out the checks that need capabilities which the family does not have."""
        super().__init_subclass__(**kwargs)
        if cls.capabilities.cache and "settings" not in vars(cls) and not cls.settings:
            cls.settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
        for name in dir(FamilySuite):
            needed = getattr(getattr(FamilySuite, name), "needs", ())
            if needed and not all(getattr(cls.capabilities, one) for one in needed):
                setattr(cls, name, None)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        """The family's tiny model and its cut, export and runs; shared by all checks."""
        subject = Subject(cls(), tmp_path_factory.mktemp(cls.model_type.replace("/", "-")))
        yield subject
        subject.close()
