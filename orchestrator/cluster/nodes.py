"""What is known of a cluster's machines: those that live, those about to go, those that cannot be reached."""

import socket
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.exceptions import RayError

HEAD = "node:__internal_head__"
"""A resource that Ray's head alone has."""
KNOCK_S = 2.0
"""A machine that takes no connection for this long cannot be reached. Ray's own health check needs, by default, up to
half a minute to see that."""


def alive() -> list[dict]:
    """Ray's records of the nodes that it counts as living."""
    return [node for node in ray.nodes() if node["Alive"]]


def leaving() -> set[str]:
    """Ray's ids of the nodes that a preemption notice or `ray drain-node` has announced to go."""
    from ray._private import state  # Ray Train reads them there too; there is no public name

    try:
        return set(state.state.get_draining_nodes())
    except (AttributeError, RayError):
        return set()


def ground() -> set[str]:
    """Ray's ids of the nodes that a run cannot lose: that of this process and that of Ray's head."""
    return {node["NodeID"] for node in alive() if HEAD in node["Resources"]} | {
        ray.get_runtime_context().get_node_id()}


def ask_for(bundles: list[dict[str, float]]) -> None:
    """Tell an autoscaler, if the cluster has one, that there is to be room for these; it holds until the next call."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def unreachable(doors: dict[str, tuple[str, int]]) -> set[str]:
    """Of nodes by id, each with an address and port where it listens, those whose machine is gone: the kernel of one
    that lives takes a connection, or refuses it, whatever its processes are at."""
    with ThreadPoolExecutor(32) as pool:
        return {node for node, there in zip(doors, pool.map(_can_reach, doors.values()), strict=True) if not there}


def _can_reach(door: tuple[str, int]) -> bool:
    try:
        socket.create_connection(door, timeout=KNOCK_S).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return True
