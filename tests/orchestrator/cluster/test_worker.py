"""What a rank's actor does without Ray: its device's number, and connections that nothing more is to be expected of."""

import socket

import pytest

from orchestrator.cluster.worker import device_index, hang_up


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
