"""qeff-proxy's conformance suite on a tiny Acme with random weights."""

from acme_models.model import AcmeConfig, AcmeScaledConfig
from qeff_proxy.testing import FamilySuite


class TestAcme(FamilySuite):
    model_type = "acme"

    def make_config(self):
        return AcmeConfig()


class TestAcmeScaled(FamilySuite):
    model_type = "acme-scaled"

    def make_config(self):
        return AcmeScaledConfig()
