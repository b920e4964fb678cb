"""Ranks that are slower than the rest, found without asking who waits for whom.

In a step all ranks wait for the slowest one and look alike. So every `checkpoint.memory_every` steps each rank times a
small product on its own device, alone; one that takes half as long again as its peers several times running is named,
once. This finds a device that is throttled or shared, not a slow network.
"""

import statistics
import time

import torch
import torch.distributed as dist

from orchestrator.parallel.mesh import Mesh

SLOW, IN_A_ROW = 1.5, 3
SIZE, ROUNDS = 384, 3


class Stragglers:
    """All ranks call `look` after every step. `tell(kind, **fields)` hears of a straggler where it is not None."""

    def __init__(self, mesh: Mesh, every: int, tell):
        self.mesh, self.every, self.tell = mesh, every if mesh.world is not None else 0, tell
        self.slow = [0] * mesh.layout.world_size

    def look(self, step: int) -> dict:
        """Metrics, where it is time to look."""
        if not self.every or step % self.every:
            return {}
        table = torch.zeros(2, self.mesh.layout.world_size, dtype=torch.float64)
        table[:, self.mesh.info.rank] = torch.tensor([probe_s(self.mesh.device), self.mesh.info.node_rank])
        table = table.to(self.mesh.device)
        dist.all_reduce(table, group=self.mesh.world)
        seconds, nodes = table.tolist()
        usual = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            self.slow[rank] = self.slow[rank] + 1 if own > SLOW * usual else 0
            if self.slow[rank] == IN_A_ROW and self.tell is not None:
                self.tell("straggler", step=step, rank=rank, node=int(nodes[rank]),
                          cause=f"its device took {own / usual:.1f} times as long as the others' for the same product, "
                                f"{IN_A_ROW} times in a row")
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"perf/slowest_rank": slowest, "perf/slowest_rank_over_median": seconds[slowest] / usual}


def probe_s(device: torch.device) -> float:
    """Seconds that this device takes for a fixed product, the best of a few."""
    a, best = torch.ones(SIZE, SIZE, device=device), float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return best
