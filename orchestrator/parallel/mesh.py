"""Processes into a rank grid: device, process groups."""

import contextlib
import datetime
import fcntl
import ipaddress
import os
import resource
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from orchestrator.config import HardwareConfig
from orchestrator.errors import NotFit
from orchestrator.parallel.rank_info import RankInfo, restarts, under_torchrun
from orchestrator.plan.layout import Coordinate, Layout

SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address."""
FAR_AWAY = "192.0.2.1"
"""An address for documentation: whatever leads there leads to other nodes."""


@dataclass(frozen=True)
class Mesh:
    """The grid as one rank sees it. Groups are None along axes of degree one, where nobody is to be talked to."""

    layout: Layout
    info: RankInfo
    device: torch.device
    coordinate: Coordinate
    store: dist.Store | None
    world: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    ep: dist.ProcessGroup | None
    dp_mesh: DeviceMesh | None
    edp_mesh: DeviceMesh | None
    timeout: datetime.timedelta | None = None
    """Of every collective; None is torch's default."""
    hops: tuple[dist.ProcessGroup, ...] = ()
    """Where tokens go by node: this rank's group across the nodes of its expert group, then the one within a node."""

    def first_and_last_stage_group(self, last: int) -> dist.ProcessGroup | None:
        """The ranks of this data-parallel coordinate on pipeline ranks 0 and `last`; None if they are one rank."""
        if last == 0 or self.coordinate.pp not in (0, last):
            return None
        pair = [self.layout.rank(0, self.coordinate.dp), self.layout.rank(last, self.coordinate.dp)]
        return dist.new_group(pair, timeout=self.timeout, use_local_synchronization=True)

    def close(self) -> None:
        """Give the groups back. Their connections close with the last reference, and only then does a rank that waits
        for this one hear of it; torch's caches of sharded operations keep device meshes, and those their groups, as
        long as the process lives."""
        for mesh in (self.dp_mesh, self.edp_mesh):
            if mesh is not None:
                getattr(mesh._get_root_mesh(), "_pg_registry", {}).clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device(info: RankInfo, hardware: HardwareConfig) -> torch.device:
    """The rank's own GPU where there is one, else the CPU. Devices are never masked (ray#61073). hardware: what the run
    is to pay for."""
    if torch.cuda.is_available():
        if info.local_rank >= torch.cuda.device_count():
            raise NotFit(f"local rank {info.local_rank}: this machine has {torch.cuda.device_count()} GPUs; start as "
                         "many ranks, or set CUDA_VISIBLE_DEVICES='' to run on the CPU")
        device = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(device)
        return device
    if info.has_gpu or hardware.device == "cuda":
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise NotFit(f"local rank {info.local_rank}: was to train on {hardware.name} and would on the CPU, at that "
                     f"price: torch {torch.__version__} {build} and sees no GPU here; see what nvidia-smi says and "
                     "whether its driver is new enough for that CUDA, or use hardware=cpu")
    return torch.device("cpu")


def open_store(info: RankInfo, *, timeout_s: float) -> dist.Store | None:
    """The key-value store that all ranks share; None for a rank alone. torchrun's agent already serves one, with all
    that ranks have left there which it has started before these."""
    if info.world_size == 1:
        return None
    if info.rank == 0:
        _allow_connections()
    store = dist.TCPStore(info.master_addr, info.master_port, info.world_size,
                          timeout=datetime.timedelta(seconds=timeout_s),
                          is_master=info.rank == 0 and not under_torchrun(), multi_tenant=True,
                          master_listen_fd=info.listen_fd if info.listen_fd >= 0 else None)
    return dist.PrefixStore(f"restart/{restarts()}", store) if under_torchrun() else store


def _allow_connections() -> None:
    """Two of each rank at the store's side: what a shell, systemd or Slurm allows, 1,024 files, is full with 500 ranks,
    and the others would wait until they give up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def meet(store: dist.Store | None, info: RankInfo, *, timeout_s: float) -> None:
    """Wait until every rank is there: some start later than a collective may take. All wait for one key, since the
    store would have to look for each of a key per rank on behalf of each rank."""
    if store is not None:
        if store.add("here", 1) >= info.world_size:
            store.set("all here", "")
        store.wait(["all here"], datetime.timedelta(seconds=timeout_s))


def connect(layout: Layout, info: RankInfo, device: torch.device, *, timeout_s: float,
            store: dist.Store | None = None) -> Mesh:
    """Join all ranks and form the groups of the grid. `timeout_s` bounds every collective from here on."""
    assert info.world_size == layout.world_size, (info, layout)
    coordinate = layout.coordinate(info.rank)
    if layout.world_size == 1:
        return Mesh(layout, info, device, coordinate, None, None, None, None, None, None)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = store or open_store(info, timeout_s=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo" and info.local_world_size < info.world_size:
        use_the_nodes_address(info)
    # Else gloo connects every rank of a group with every other, thousands of sockets for what two neighbours exchange.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    dist.init_process_group(backend, store=dist.PrefixStore("grid", store), rank=info.rank,
                            world_size=info.world_size, timeout=timeout)
    with _default_timeout(timeout):
        mesh = init_device_mesh(device.type, (layout.pp, layout.edp, layout.ep), mesh_dim_names=("pp", "edp", "ep"))
        dp_mesh = mesh["edp", "ep"]._flatten("dp")
        hops = _hops(mesh["ep"], layout.ep_per_node) if layout.ep > 1 and layout.ep_per_node else ()
    pp = mesh.get_group("pp") if layout.pp > 1 else None
    if pp is not None:
        # NCCL connects a group when all its ranks come to its first operation; a pipeline's are between some of them.
        dist.all_reduce(torch.zeros(1, device=device), group=pp)
    return Mesh(
        layout, info, device, coordinate, store, dist.group.WORLD, pp=pp,
        ep=mesh.get_group("ep") if layout.ep > 1 else None,
        dp_mesh=dp_mesh if layout.dp > 1 else None,
        edp_mesh=mesh["edp"] if layout.edp > 1 else None,
        timeout=timeout, hops=hops,
    )


def use_the_nodes_address(info: RankInfo) -> None:
    """gloo listens where the host's name points to, which is 127.0.1.1 on Debian as it is installed: no other node
    could connect. Then it is told the interface by which this node reaches the others, unless the user has said one."""
    if "GLOO_SOCKET_IFNAME" in os.environ or _is_loopback(info.master_addr, literally=True):
        return
    if not _is_loopback(socket.gethostname()):
        return
    for target in (info.master_addr, FAR_AWAY):  # the first may be this node's own name
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 1))  # sends nothing
            own = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex() if name != "lo" and _address_of(name) == own]
            if names:
                os.environ["GLOO_SOCKET_IFNAME"] = names[0]
                return


def _is_loopback(host: str, *, literally: bool = False) -> bool:
    try:
        if literally:
            return ipaddress.ip_address(host).is_loopback
        return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


def _address_of(interface: str) -> str | None:
    """Its IPv4 address."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return None


def _hops(ep_mesh: DeviceMesh, per_node: int) -> tuple[dist.ProcessGroup, ...]:
    """Groups of one rank are left out: nobody is to be talked to."""
    ranks = ep_mesh.size()
    nodes = ep_mesh._unflatten(0, (ranks // per_node, per_node), ("node", "in_node"))
    return tuple(nodes.get_group(name) for name in ("node", "in_node") if nodes[name].size() > 1)


@contextlib.contextmanager
def _default_timeout(timeout: datetime.timedelta) -> Iterator[None]:
    """The groups of a mesh do not inherit the timeout of the group of all ranks, and gloo keeps the one it is born
    with: half an hour unless torch's default is another meanwhile."""
    c10d = dist.distributed_c10d
    names = [name for name in ("default_pg_timeout", "default_pg_nccl_timeout") if getattr(c10d, name, None)]
    before = {name: getattr(c10d, name) for name in names}
    for name in names:
        setattr(c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)
