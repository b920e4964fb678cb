"""One rank's device and the interface that it meets the others by, without any other rank."""

import os
import resource
import socket

import pytest
import torch.distributed as dist

from orchestrator.config import HardwareConfig
from orchestrator.errors import NotFit
from orchestrator.parallel import mesh
from orchestrator.parallel.rank_info import RankInfo


def test_a_rank_that_was_given_a_gpu_does_not_train_on_the_cpu_in_silence(monkeypatch):
    monkeypatch.setattr(mesh.torch.cuda, "is_available", lambda: False)
    assert mesh.pick_device(RankInfo(), HardwareConfig()).type == "cpu"
    for info, hardware in [(RankInfo(), HardwareConfig("h100", "cuda")), (RankInfo(has_gpu=True), HardwareConfig())]:
        with pytest.raises(NotFit, match=rf"was to train on {hardware.name} .* sees no GPU here; .*nvidia-smi.*or use"):
            mesh.pick_device(info, hardware)


@pytest.mark.parametrize("master, name_at, given, chosen", [
    ("10.0.0.1", "127.0.1.1", None, "eth0"), ("node1", "127.0.1.1", None, "eth0"), ("10.0.0.1", "10.0.0.2", None, None),
    ("127.0.0.1", "127.0.1.1", None, None), ("10.0.0.1", "127.0.1.1", "ib0", "ib0")])
def test_gloo_is_told_the_nodes_interface_where_its_name_is_loopbacks(monkeypatch, master, name_at, given, chosen):
    class Probe(socket.socket):
        def connect(self, address):
            self.own = "127.0.1.1" if address[0] == "node1" else "10.0.0.2"

        def getsockname(self):
            return self.own, 1

    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": given} if given else {})
    monkeypatch.setattr(mesh.socket, "socket", Probe)
    monkeypatch.setattr(mesh.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", (name_at, 0))])
    monkeypatch.setattr(mesh.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib1"), (3, "eth0")])
    monkeypatch.setattr(mesh, "_address_of", {"lo": "127.0.0.1", "ib1": "10.9.9.9", "eth0": "10.0.0.2"}.get)
    mesh.use_the_nodes_address(RankInfo(0, 2, local_world_size=1, master_addr=master))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_the_store_of_thousands_of_ranks_may_hold_their_connections(monkeypatch):
    monkeypatch.setattr(mesh.dist, "TCPStore", lambda *_, **__: resource.getrlimit(resource.RLIMIT_NOFILE))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert mesh.open_store(RankInfo(0, 2048), timeout_s=5) == (min(hard, 1 << 16), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_that_torchrun_has_started_anew_do_not_read_what_those_before_wrote(monkeypatch):
    """One store serves them all: who was there, which config and which checkpoint was meant."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        info = RankInfo(0, 2, master_addr="127.0.0.1", master_port=agents.port)
        ranks = [mesh.open_store(info, timeout_s=5) for _ in range(2)]
        assert not ranks[0].check(["config"]) and ranks[0].add("here", 1) == 1
        ranks[0].set("config", count)
        assert ranks[1].clone().get("config").decode() == count
