"""One SLURM for all tests of this folder."""

import pytest

from tests.slurm.cluster import Cluster, install, unavailable


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory):
    if reason := unavailable():
        pytest.skip(reason)
    install()
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started.start()


@pytest.fixture
def cluster(shared_cluster):
    """A cluster whose nodes are idle."""
    shared_cluster.wait_until_idle()
    yield shared_cluster
    shared_cluster.cancel_all()
