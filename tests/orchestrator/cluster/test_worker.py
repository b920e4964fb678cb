"""What a rank's actor does without Ray: its device's number, and connections that nothing more is to be expected of."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import ray
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, TCPStore

from orchestrator.cluster import ranks
from orchestrator.cluster.group import Group
from orchestrator.cluster.worker import Worker, _is_lost_connection, device_index, hang_up
from orchestrator.train.control import Control


@pytest.mark.parametrize("name, visible, index", [
    ("3", None, 3), ("0", "", 0), ("5", "4,5", 1), ("GPU-b", "GPU-a,GPU-b", 1)])
def test_torch_counts_the_devices_that_are_visible(name, visible, index):
    assert device_index(name, visible) == index


def test_connections_to_lost_machines_are_shut_whatever_else_is_open():
    """Such as the nameless pair that an event loop wakes itself by."""
    pairs = [socket.socketpair() for _ in range(3)]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as ours:
        ours.connect(server.getsockname())
        theirs, _ = server.accept()
        hang_up({"10.1.2.3"})
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
        hang_up({"127.0.0.1"})
        assert ours.recv(1) == b""
        theirs.close()
    for one, other in pairs:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        one.close()
        other.close()


def test_a_rank_that_is_told_to_leave_does_not_wait_for_what_a_lost_one_was_to_write():
    """Frozen or killed between two words in the store, it would hold up every other rank until the start times out."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    waiting = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=60))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(waiting.get, "what nobody writes")
        rank = SimpleNamespace(control=Control(), store_at=("127.0.0.1", store.port))
        while not waits.done():
            Worker.leave(rank)
        with pytest.raises(DistNetworkError):
            waits.result()
    assert rank.control.must_leave


def test_a_rank_that_ray_ended_for_want_of_memory_says_so(monkeypatch):
    """It is none of Ray's errors of actors, and ends in advice on how to turn that off."""
    def get(ref):
        raise ray.exceptions.OutOfMemoryError("killed due to the node running low on memory\nSet the environment ...")

    monkeypatch.setattr(ranks.ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ranks.ray, "get", get)
    group = Group(["run"], [], {}, [{}], {}, 0.0)
    ranks.Ranks._collect(None, group, 0.0)
    assert group.ended[0]["dead"] and group.ended[0]["error"].startswith("out of memory")


@pytest.mark.parametrize("error, is_lost", [
    (DistNetworkError("x"), True), (DistBackendError("NCCL communicator was aborted"), True),
    (DistStoreError("timeout"), True), (ConnectionResetError("x"), True),
    (RuntimeError("Connection closed by peer"), True), (RuntimeError("shape mismatch"), False),
    (ValueError("Connection closed by peer"), False)])
def test_an_error_of_a_lost_connection_is_anothers_fault(error, is_lost):
    assert _is_lost_connection(error) == is_lost
