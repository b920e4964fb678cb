"""The expert all-to-all: how many bytes leave a rank over which links, how long that takes alone and beside
computation, and how uneven routing makes the fullest rank.

Node-limited routing as in the V3 report, section 3.2.2: a token goes once to every node that holds one of its experts,
over the scale-out link, and from there to its ranks over the scale-up link.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from orchestrator.config import HardwareConfig
from orchestrator.plan.workload import Workload

NAMED = {"balanced": 1.0, "bias": 1.15, "unbalanced": 2.0}
"""Forced balance, as most benchmarks run; kept balanced by a bias (1.05 to 1.3 in print); no balancing (1.3 to 4)."""


@dataclass(frozen=True)
class Routing:
    """How evenly tokens reach the experts: a named distribution, or what a run counted."""

    name: str = "balanced"
    """One of `NAMED`, or the run."""
    counts: tuple[tuple[float, ...], ...] = ()
    """Tokens per expert, of each layer and step that was counted."""

    def imbalance(self, ep: int) -> float:
        """Load of the fullest of `ep` ranks over the mean; of counts the mean over them, since ranks wait for the
        fullest one in every layer. ValueError as of `imbalance_of`."""
        if ep == 1:
            return 1.0
        if not self.counts:
            return imbalance_of(self.name, ep)
        return sum(imbalance_of(each, ep) for each in self.counts) / len(self.counts)


def imbalance_of(tokens_per_expert: Sequence[float] | str, ep: int) -> float:
    """Load of the fullest of `ep` ranks over the mean, of a named distribution or of one histogram, whose experts are
    placed in order. ValueError if the counts do not go into `ep` ranks."""
    if isinstance(tokens_per_expert, str):
        if tokens_per_expert not in NAMED:
            raise ValueError(f"routing={tokens_per_expert}: must be one of {', '.join(NAMED)}, or counts per expert")
        return NAMED[tokens_per_expert]
    each, rest = divmod(len(tokens_per_expert), ep)
    if rest or not sum(tokens_per_expert):
        raise ValueError(f"routing: {len(tokens_per_expert)} counts do not go into {ep} ranks, or are all zero")
    loads = [sum(tokens_per_expert[rank * each:(rank + 1) * each]) for rank in range(ep)]
    return max(loads) * ep / sum(loads)


def dispatch_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that a rank sends in one layer's forward, out of the node and inside it.

    Dispatch is in FP8 unless `dtype=bf16`, combine in bf16. Uneven routing makes the fullest rank receive more. A
    group that is larger than a domain lies evenly on as few of them as hold it; a smaller one lies within one.
    """
    model, domain = work.model, work.hardware.scale_up_devices
    element = (1 if work.dtype != "bf16" and work.stack.low_dispatch else 2) + 2
    payload = work.microbatch_tokens / work.tp * model.dim * element * work.imbalance
    nodes = math.ceil(work.ep * work.etp / domain)
    ranks = work.ep * work.etp / nodes
    if work.stack.copies:
        copies, total = payload * model.n_activated_experts, nodes * ranks
        return copies * (nodes - 1) / nodes, copies * (ranks - 1) / total
    reached = nodes_reached(model, nodes)
    targets = _distinct(ranks, model.n_activated_experts / max(1.0, reached))
    return payload * reached * (nodes - 1) / nodes, payload * max(1.0, reached) * targets * (ranks - 1) / ranks


def nodes_reached(model: ModelConfig, nodes: int) -> float:
    """Nodes that hold at least one of a token's experts, on average, were all choices equally likely. Limited groups
    limit the nodes where a node holds a group or more; with fewer nodes than groups, even few groups lie on most."""
    experts, groups, limit = model.n_activated_experts, model.n_expert_groups, model.n_limited_groups
    reached = _distinct(nodes, experts)
    if limit >= groups:
        return reached
    if nodes >= groups:
        return min(reached, limit * _distinct(nodes / groups, experts / limit))
    missed = math.comb(groups - groups // nodes, limit) / math.comb(groups, limit)
    return min(reached, nodes * (1 - missed))


def _distinct(places: float, draws: float) -> float:
    """Different places that so many draws hit on average."""
    return places * (1 - (1 - 1 / places) ** draws)


def all_to_all_s(work: Workload, sent_bytes: float, up_bytes: float, share: float) -> float:
    """Scale-out and scale-up links work at once; the slower one sets the pace."""
    ranks = min(work.ep * work.etp, work.hardware.scale_up_devices)
    return max(sent_bytes / (work.hardware.scale_out_gb_per_s * 1e9), up_bytes / scale_up_bytes_per_s(work.hardware,
                                                                                                     ranks)) / share


def scale_up_bytes_per_s(hardware: HardwareConfig, ranks: int) -> float:
    """Of one of so many ranks in a domain, one direction: without a switch it has a link to each of the others."""
    whole = hardware.scale_up_gb_per_s
    return 1e9 * (min(whole, max(1, ranks - 1) * hardware.peer_gb_per_s) if hardware.peer_gb_per_s else whole)
