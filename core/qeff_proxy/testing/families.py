"""The conformance suite of families: inherit `FamilySuite` in a test file of a few lines.

::

    from qeff_proxy.testing import FamilySuite


    class TestMyFamily(FamilySuite):
        model_type = "my-model"

pytest runs some forty checks: the plugin is found, the sites are real, the cut is verified and the
verification sees faults, the body holds nothing of the vocabulary, names and axes follow the
conventions, and the exported parts give what the model gives, in steps, in chunks, padded, in
batches and on each backend. The model is exported once per class. What a family cannot do is said
with `Capabilities`; the checks that need it are then not there.
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

__all__ = ["FamilySuite"]

_NEW_TOKENS = 4


class FamilySuite(Family, SiteChecks, PartChecks, ExportChecks, RunChecks):
    """The checks of one family; what it declares is documented at `Family`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out the checks that the capabilities do not call for."""
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
        """The family's tiny model on its way through the flow; shared by all checks."""
        subject = Subject(cls(), tmp_path_factory.mktemp(cls.model_type.replace("/", "-")))
        yield subject
        subject.close()
