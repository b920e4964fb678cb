"""Ranks onto nodes, as arithmetic over plain resource numbers: what to ask of Ray, what is missing, who is where."""

from collections import Counter
from dataclasses import dataclass

from orchestrator.config import Config
from orchestrator.parallel.mesh import RankInfo


@dataclass(frozen=True)
class Node:
    """Free resources of one node."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Request:
    """`bundles` of `ranks_per_bundle` ranks; every rank takes one CPU and, if `gpu`, one GPU."""

    bundles: int
    ranks_per_bundle: int
    gpu: bool
    spread: bool
    """Each bundle on a node of its own."""

    @property
    def ranks(self) -> int:
        return self.bundles * self.ranks_per_bundle


def nodes_of(config: Config) -> tuple[int, int]:
    """Nodes and ranks per node that a layout is spread over, as far as the config says; local default is one node."""
    ranks = config.layout.pp * config.layout.dp
    nodes, per_node = config.cluster.nodes, config.cluster.ranks_per_node
    if nodes:
        return nodes, ranks // nodes
    return (ranks // per_node, per_node) if per_node else (1, ranks)


def request_of(config: Config, *, gpu: bool, simulated: bool) -> Request:
    """On a cluster, asking for nodes means as many real ones; simulated nodes are packed where there is room."""
    ranks = config.layout.pp * config.layout.dp
    if (config.cluster.nodes or config.cluster.ranks_per_node) and not simulated:
        nodes, per_node = nodes_of(config)
        return Request(nodes, per_node, gpu, spread=nodes > 1)
    return Request(ranks, 1, gpu, spread=False)


def simulated_homes(config: Config) -> list[tuple[str, int]]:
    """Nodes by name for ranks that really share one machine, in rank order."""
    nodes, per_node = nodes_of(config)
    return [(f"node-{n:04d}", -1) for n in range(nodes) for _ in range(per_node)]


def what_is_missing(request: Request, nodes: list[Node]) -> str | None:
    """Why the request can never be met by these nodes; None if it can."""
    kind = "GPU" if request.gpu else "CPU"
    room = [int(min(node.cpus, node.gpus) if request.gpu else node.cpus) // request.ranks_per_bundle for node in nodes]
    fitting = sum(min(1, fits) for fits in room) if request.spread else sum(room)
    if fitting >= request.bundles:
        return None
    have = ", ".join(f"{node.name}: {node.gpus:g} GPUs, {node.cpus:g} CPUs" if request.gpu
                     else f"{node.name}: {node.cpus:g} CPUs" for node in nodes) or "no nodes"
    if request.spread:
        return (f"{request.bundles} nodes with {request.ranks_per_bundle} free {kind}s each are wanted, "
                f"{fitting} such are there ({have})")
    return f"{request.ranks} ranks want one free {kind} each, {fitting * request.ranks_per_bundle} are there ({have})"


def order_ranks(homes: list[tuple[str, int]]) -> list[int]:
    """The workers in rank order, by (node, device) of each: node by node, fullest first, so that expert groups, which
    are consecutive ranks, stay inside a node where one can hold them. Stable: the same homes give the same order."""
    sizes = Counter(node for node, _ in homes)
    return sorted(range(len(homes)), key=lambda i: (-sizes[homes[i][0]], homes[i][0], homes[i][1], i))


def rank_infos(homes: list[tuple[str, int]], master_addr: str, master_port: int) -> list[RankInfo]:
    """Torchrun's numbers for workers already in rank order."""
    nodes = list(dict.fromkeys(node for node, _ in homes))
    sizes = Counter(node for node, _ in homes)
    seen: Counter = Counter()
    infos = []
    for rank, (node, device) in enumerate(homes):
        local_rank = device if device >= 0 else seen[node]
        infos.append(RankInfo(rank, len(homes), local_rank, sizes[node], nodes.index(node), master_addr, master_port))
        seen[node] += 1
    return infos
