"""Ranks onto nodes, as arithmetic over plain resource numbers: what to ask of Ray, what is missing, who is where."""

import contextlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from orchestrator.config import Config, LayoutConfig
from orchestrator.errors import BadRequest
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import check_run


@dataclass(frozen=True)
class Node:
    """Resources of one node."""

    name: str
    cpus: float
    gpus: float
    custom: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """`bundles` of `ranks_per_bundle` ranks; every rank takes one CPU and, if `gpu`, one GPU."""

    bundles: int
    ranks_per_bundle: int
    gpu: bool
    spread: bool
    """Each bundle on a node of its own."""
    custom: dict[str, float] = field(default_factory=dict)
    """Custom resources that every rank takes."""
    spares: int = 0
    """Ranks more, wherever there is room."""

    def bundle(self, ranks: int) -> dict[str, float]:
        """What so many ranks take, in Ray's names."""
        each = {"CPU": 1.0, **({"GPU": 1.0} if self.gpu else {}), **self.custom}
        return {name: number * ranks for name, number in each.items() if number}

    @property
    def ranks(self) -> int:
        return self.bundles * self.ranks_per_bundle


def nodes_of(config: Config) -> tuple[int, int]:
    """Nodes and ranks per node that a layout is spread over, as far as the config says; local default is one node."""
    ranks = config.layout.world_size
    nodes, per_node = config.cluster.nodes, config.cluster.ranks_per_node
    if nodes:
        return nodes, ranks // nodes
    return (ranks // per_node, per_node) if per_node else (1, ranks)


def request_of(config: Config, *, gpu: bool, simulated: bool) -> Request:
    """On a cluster, asking for nodes means as many real ones; simulated nodes are packed where there is room."""
    ranks = config.layout.world_size
    if (config.cluster.nodes or config.cluster.ranks_per_node) and not simulated:
        nodes, per_node = nodes_of(config)
        return Request(nodes, per_node, gpu, nodes > 1, config.cluster.resources, config.cluster.spares)
    return Request(ranks, 1, gpu, False, {} if simulated else config.cluster.resources, config.cluster.spares)


def request_for(config: Config, nodes: list[Node], *, gpu: bool, simulated: bool) -> Request:
    """What to ask of these nodes: if no shape is given, whole expert-parallel groups where they fit."""
    request, ep = request_of(config, gpu=gpu, simulated=simulated), config.layout.ep
    if simulated or request.ranks_per_bundle > 1 or request.spread:
        return request
    groups = replace(request, bundles=request.ranks // ep, ranks_per_bundle=ep)
    return request if what_is_missing(groups, nodes) else groups


def simulated_homes(config: Config) -> list[tuple[str, int]]:
    """Nodes by name for ranks that really share one machine, in rank order."""
    nodes, per_node = nodes_of(config)
    return [(f"node-{n:04d}", -1) for n in range(nodes) for _ in range(per_node)]


def what_is_missing(request: Request, nodes: list[Node]) -> str | None:
    """Why the request can never be met by these nodes; None if it can."""
    room = [min(int(_of(node, name) / number + 1e-9) for name, number in request.bundle(1).items()) for node in nodes]
    bundles = [ranks // request.ranks_per_bundle for ranks in room]
    fitting = sum(min(1, fits) for fits in bundles) if request.spread else sum(bundles)
    left = sum(room) - request.ranks
    if fitting >= request.bundles and left >= request.spares:
        return None
    wanted, wanted_by_one = (" and ".join(_amount(name, number, ranks) for name, number in request.bundle(1).items()
                                          if name != "CPU" or not request.gpu)
                             for ranks in (request.ranks_per_bundle, 1))
    have = ", ".join(f"{node.name}: " + ", ".join(f"{_of(node, name):g} {_unit(name)}" for name in request.bundle(1))
                     for node in nodes) or "no nodes"
    if fitting >= request.bundles:
        return (f"cluster.spares={request.spares} beside the {request.ranks} ranks want {wanted_by_one} each, {left} "
                f"can have that ({have})")
    if request.spread:
        return f"{request.bundles} nodes with {wanted} each are wanted, {fitting} such are there ({have})"
    return (f"{request.ranks} ranks want {wanted} each, {fitting * request.ranks_per_bundle} "
            f"can have that ({have})")


def environment(*, gpu: bool, beside_gpus: bool) -> dict[str, str]:
    """Variables of a rank's process; none where it can be avoided: with one of its own, an actor cannot take a process
    that Ray has ready. Devices are not masked (ray#61073). NCCL's watchdog, which ends the whole process once a peer is
    lost or late, and with it the state in its memory, leaves that to the controller."""
    if gpu:
        return {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
                "TORCH_NCCL_ENABLE_MONITORING": "0"}
    return {"CUDA_VISIBLE_DEVICES": ""} if beside_gpus else {}


def order_ranks(homes: list[tuple[str, int]], ep: int, ep_per_node: int = 0) -> list[int]:
    """The workers in rank order, by (node, device) of each. Ranks go node by node in the order of the nodes' names, so
    that pipeline neighbours are on the same or the next node; a node first takes as many whole expert-parallel groups,
    which are `ep` consecutive ranks, as it can hold, and what is left over makes up groups across nodes at the end: of
    `ep_per_node` ranks of a node each where these are there, then of any. Stable: the same homes give the same order.
    """
    in_order = sorted(range(len(homes)), key=lambda i: (_natural(homes[i][0]), homes[i][1], i))
    sizes, seen = Counter(node for node, _ in homes), Counter()
    groups, blocks, rest = [], [], []
    for i in in_order:
        node = homes[i][0]
        seen[node] += 1
        in_groups = sizes[node] // ep * ep
        in_blocks = in_groups + (sizes[node] - in_groups) // (ep_per_node or ep) * (ep_per_node or ep)
        (groups if seen[node] <= in_groups else blocks if seen[node] <= in_blocks else rest).append(i)
    return groups + blocks + rest


def _natural(name: str) -> list:
    """A key by which node2 comes before node10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _of(node: Node, name: str) -> float:
    return {"CPU": node.cpus, "GPU": node.gpus}.get(name, node.custom.get(name, 0.0))


def _unit(name: str) -> str:
    return f"{name}s" if name in ("CPU", "GPU") else name


def _amount(name: str, number: float, ranks: int) -> str:
    if name not in ("CPU", "GPU"):
        return f"{number * ranks:g} {name}"
    return f"{number * ranks:g} free {name}" + ("s" if ranks > 1 else "")


def rank_infos(homes: list[tuple[str, int]], master_addr: str, master_port: int) -> list[RankInfo]:
    """Torchrun's numbers for workers already in rank order."""
    nodes = list(dict.fromkeys(node for node, _ in homes))
    sizes = Counter(node for node, _ in homes)
    seen: Counter = Counter()
    infos = []
    for rank, (node, device) in enumerate(homes):
        local_rank = device if device >= 0 else seen[node]
        infos.append(RankInfo(rank, len(homes), local_rank, sizes[node], nodes.index(node), master_addr, master_port,
                              has_gpu=device >= 0))
        seen[node] += 1
    return infos


def layouts(config: Config) -> dict[int, LayoutConfig]:
    """The layouts that a run may go on with, by number of ranks, largest first: its own and, if `cluster.min_ranks`
    says so, those with a smaller data-parallel degree. Experts are spread over as many ranks as still divide it; the
    batch and the order of samples stay what they are."""
    full, found = config.layout, {config.layout.world_size: config.layout}
    for dp in range(full.dp - 1, 0, -1):
        if not config.cluster.min_ranks or full.pp * dp < config.cluster.min_ranks:
            break
        for ep in (ep for ep in range(min(full.ep, dp), 0, -1) if dp % ep == 0):
            smaller = replace(full, dp=dp, ep=ep, ep_per_node=full.ep_per_node and math.gcd(full.ep_per_node, ep))
            cluster = replace(config.cluster, nodes=0, ranks_per_node=0)
            with contextlib.suppress(BadRequest):
                check_run(replace(config, layout=smaller, cluster=cluster))
                found[full.pp * dp] = smaller
                break
    return found
