"""The executor of Ray against the conformance suite and lost nodes: `make test-ray`.

Two nodes are simulated on this machine, each with raylet, store and workers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from qeff_proxy.testing.executors import ExecutorSuite

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    """A cluster of two nodes with a CPU each; ``RAY_ADDRESS`` is its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    cluster.shutdown()


class TestRay(ExecutorSuite):
    executor = "ray"
