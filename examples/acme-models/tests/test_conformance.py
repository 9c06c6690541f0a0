"""qeff-proxy's conformance suite on a tiny Acme with random weights."""

from acme_models.model import AcmeConfig
from qeff_proxy.testing import FamilySuite


class TestAcme(FamilySuite):
    model_type = "acme"

    def make_config(self):
        return AcmeConfig()
