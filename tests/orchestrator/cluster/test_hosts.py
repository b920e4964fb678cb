"""What runs on several nodes: a real Ray cluster, each node in its own namespaces, a client outside."""

import pytest

from tests.cluster_harness import hosts, why_no_hosts

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))]


@pytest.fixture(scope="module")
def cluster():
    with hosts(3, cpus=2) as running:
        yield running


def test_nobody_talks_to_the_cluster_without_its_token(cluster):
    assert cluster.get("/api/jobs/", authenticated=False)[0] == 401
    assert cluster.get("/api/jobs/") == (200, b"[]")
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0


def test_a_killed_node_is_missed_and_comes_back_with_its_address(cluster):
    *others, last = cluster.nodes
    last.kill()
    cluster.wait_for(others)
    cluster.boot(last)
    cluster.wait_for(cluster.nodes)
    assert last.processes("raylet") and last.run(["hostname"]).stdout.strip() == last.name
