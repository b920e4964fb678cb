"""Places on a Ray cluster of several nodes in one machine, which come and go; no training."""

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.cluster.places import Places
from tests.cluster_harness import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster():
    running = Cluster()
    try:
        for cpus in (1, 2, 2):
            running.add_node(num_cpus=cpus)
        ray.init(address=running.address, log_to_driver=False)
        yield running
    finally:
        ray.shutdown()
        running.shutdown()


def test_places_apart_stay_on_nodes_of_their_own_and_one_without_a_node_holds_up_no_other(cluster):
    places = Places([{"CPU": 1.0}] * 3, spread=True, apart=True)
    places.wait(60)
    first = places.nodes()
    assert sorted(first) == sorted(node["NodeID"] for node in ray.nodes())
    assert not any(places.renew(place) for place in range(3))

    lost = [node for node in cluster.list_all_nodes() if node.node_id in first][1:]
    where = [first.index(node.node_id) for node in lost]
    stays = ({0, 1, 2} - set(where)).pop()
    for node in lost:
        cluster.remove_node(node)
    for place in where:  # the node that stays may have room for another, but holds one place already
        wait_until(lambda place=place: places.renew(place), 60, "Ray has not seen that a node is gone")
    assert not any(places.renew(place) for place in range(3))
    assert places.nodes() == [node if place == stays else "" for place, node in enumerate(first)]

    @ray.remote(num_cpus=1)
    class Actor:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    actor = Actor.options(scheduling_strategy=places.strategy(stays)).remote()
    assert ray.get(actor.node.remote(), timeout=60) == first[stays]

    cluster.add_node(num_cpus=2)  # room for both, which ask at once: one of them has to leave it again

    def settled() -> list[str] | None:
        for place in where:
            places.renew(place)
        return nodes if len(set(nodes := places.nodes())) == 3 else None

    assert (found := wait_until(settled, 60, "two places on one node"))[stays] == first[stays] and "" in found
    cluster.add_node(num_cpus=1)
    found = wait_until(lambda: nodes if "" not in (nodes := settled() or [""]) else None, 60, "no place")
    assert sorted(found) == sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    waiting = Actor.options(scheduling_strategy=places.strategy(where[0])).remote()
    assert ray.get(waiting.node.remote(), timeout=60) == found[where[0]]
    places.remove()


@pytest.mark.parametrize("apart", [False, True])
def test_spares_are_where_there_is_room_beside_places_that_are_spread(cluster, apart):
    """More of them than nodes: they need no node of their own, and are not in the way of those that do."""
    places = Places([{"CPU": 1.5}] * 2, spread=True, apart=apart, spares=[{"CPU": 0.5}] * 4)
    places.wait(60)
    nodes = places.nodes()
    assert len(nodes) == 6 and "" not in nodes and nodes[0] != nodes[1]
    assert not any(places.renew(place) for place in range(6))

    @ray.remote(num_cpus=0.5)
    class Actor:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    actors = [Actor.options(scheduling_strategy=places.strategy(place)).remote() for place in (1, 2, 5)]
    assert ray.get([actor.node.remote() for actor in actors], timeout=60) == [nodes[1], nodes[2], nodes[5]]
    places.remove()
