"""Ranks and links that are slower than the rest, found without asking who waits for whom.

In a step all ranks wait for the slowest one and look alike. So every `checkpoint.memory_every` steps each rank times a
small product on its own device, alone, and then what it receives from one other rank, all ranks at the same time. A
device that takes half as long again as its peers, or a link that takes three times as long as others of its kind, is
named once, after several times running.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from orchestrator.parallel.mesh import Mesh
from orchestrator.train.replica import buddy_shift

IN_A_ROW = 3
SLOW_DEVICE, SLOW_LINK = 1.5, 3.0
"""Times as long as usual."""
SIZE, ROUNDS = 384, 3
LINK_BYTES, LINK_ROUNDS = 2 << 20, 2


@dataclass
class Streak:
    """How often in a row each rank has been slow at one thing."""

    factor: float
    times: dict[int, int] = field(default_factory=dict)

    def named(self, over_usual: list[float]) -> list[int]:
        """The ranks that have just been slow for the last time that is let pass."""
        self.times = {rank: self.times.get(rank, 0) + 1 for rank, ratio in enumerate(over_usual) if ratio > self.factor}
        return [rank for rank, count in self.times.items() if count == IN_A_ROW]


class Stragglers:
    """All ranks call `look` after every step. `tell(kind, **fields)` hears of a straggler where it is not None."""

    def __init__(self, mesh: Mesh, every: int, tell: Callable | None):
        self.mesh, self.every, self.tell = mesh, every if mesh.world is not None else 0, tell
        self.devices, self.links = Streak(SLOW_DEVICE), Streak(SLOW_LINK)
        self.nodes: list[int] = []
        self.shift = 0

    def look(self, step: int) -> dict:
        """Metrics, where it is time to look."""
        if not self.every or step % self.every:
            return {}
        if not self.nodes:
            self.nodes = [int(node) for node in self._of_all(self.mesh.info.node_rank)]
            self.shift = buddy_shift(self.nodes)
        return self._look_at_devices(step) | self._look_at_links(step)

    def _look_at_devices(self, step: int) -> dict:
        seconds = self._of_all(probe_s(self.mesh.device))
        usual = statistics.median_low(seconds)
        ratios = [own / usual for own in seconds]
        for rank in self.devices.named(ratios):
            self._tell("straggler", step, rank, f"its device took {ratios[rank]:.1f} times as long as the others' for "
                                                "the same product")
        slowest = _slowest(ratios)
        return {"perf/slowest_rank": slowest, "perf/slowest_rank_over_median": ratios[slowest]}

    def _look_at_links(self, step: int) -> dict:
        seconds = self._of_all(link_s(self.mesh, self.shift))
        sources = [(rank - self.shift) % len(seconds) for rank in range(len(seconds))]
        inside = [self.nodes[rank] == self.nodes[source] for rank, source in enumerate(sources)]
        ratios = over_usual(seconds, inside)
        for rank in self.links.named(ratios):
            where = f"rank {sources[rank]}" + ("" if inside[rank] else f" on node {self.nodes[sources[rank]]}")
            self._tell("slow_link", step, rank, f"what it received from {where} took {ratios[rank]:.1f} times as long "
                                                f"as others {'inside' if inside[rank] else 'between'} nodes",
                       source=sources[rank])
        slowest = _slowest(ratios)
        return {"perf/slowest_link_to": slowest, "perf/slowest_link_over_usual": ratios[slowest]}

    def _tell(self, kind: str, step: int, rank: int, cause: str, **fields) -> None:
        if self.tell is not None:
            self.tell(kind, step=step, rank=rank, node=self.nodes[rank], **fields,
                      cause=f"{cause}, {IN_A_ROW} times in a row")

    def _of_all(self, number: float) -> list[float]:
        """Every rank's number, by rank."""
        table = torch.zeros(self.mesh.layout.world_size, dtype=torch.float64)
        table[self.mesh.info.rank] = number
        table = table.to(self.mesh.device)
        dist.all_reduce(table, group=self.mesh.world)
        return table.tolist()


def over_usual(seconds: list[float], kinds: list) -> list[float]:
    """Each one over what is usual for its kind: the lower quartile, since a node with a slow cable has two links."""
    usual = {}
    for kind in set(kinds):
        alike = sorted(own for own, other in zip(seconds, kinds, strict=True) if other == kind)
        usual[kind] = alike[len(alike) // 4]
    return [own / usual[kind] for own, kind in zip(seconds, kinds, strict=True)]


def probe_s(device: torch.device) -> float:
    """Seconds that this device takes for a fixed product, the best of a few."""
    a, best = torch.ones(SIZE, SIZE, device=device), float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return best


def link_s(mesh: Mesh, shift: int) -> float:
    """Seconds that a block takes from the rank `shift` before this one, the best of a few. All ranks call it. A single
    byte goes before each block, so that a rank that is late is not taken for a slow link."""
    best, sizes = float("inf"), (1, LINK_BYTES)
    blocks = [[torch.zeros(size, dtype=torch.uint8, device=mesh.device) for _ in range(2)] for size in sizes]
    for _ in range(LINK_ROUNDS):
        for mine, theirs in blocks:
            seconds = _pass_on(mesh, shift, mine, theirs)
        best = min(best, seconds)
    return best


def _pass_on(mesh: Mesh, shift: int, mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Send `mine` on; seconds until `theirs` has come."""
    rank, world, began = mesh.info.rank, mesh.layout.world_size, time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, theirs, (rank - shift) % world, group=mesh.world),
                                    dist.P2POp(dist.isend, mine, (rank + shift) % world, group=mesh.world)])
    works[0].wait()
    theirs[0].item()  # on a GPU, only now it is here
    seconds = time.perf_counter() - began
    for work in works[1:]:
        work.wait()
    return seconds


def _slowest(ratios: list[float]) -> int:
    return max(range(len(ratios)), key=ratios.__getitem__)
