"""The expert all-to-all: how many bytes leave a rank over which links, how long that takes alone and beside
computation, and how uneven routing makes the fullest rank.

Node-limited routing as in the V3 report, section 3.2.2: a token goes once to every node that holds one of its experts,
over the scale-out link, and from there to its ranks over the scale-up link.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

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
    group lies evenly on its `domains`.
    """
    model = work.model
    element = (1 if work.dtype != "bf16" and work.stack.low_dispatch else 2) + 2
    payload = work.microbatch_tokens / work.tp * model.dim * element * work.imbalance
    nodes = domains(work, work.ep * work.etp)
    ranks = work.ep * work.etp / nodes
    if work.stack.copies:
        copies, total = payload * model.n_activated_experts, nodes * ranks
        return copies * (nodes - 1) / nodes, copies * (ranks - 1) / total
    out, every = (reached(model, places) for places in (nodes, work.ep))
    return payload * out * (nodes - 1) / nodes, payload * every * work.etp * (ranks - 1) / ranks


def domains(work: Workload, ranks: int) -> int:
    """Scale-up domains that the worst placed of groups of so many neighbouring ranks lies on. A job that fills whole
    domains has no rank to spare, so that a group that does not divide one may begin at its end."""
    domain = work.hardware.scale_up_devices
    filled = work.devices > domain and work.devices % domain == 0
    begins = domain - math.gcd(ranks, domain) if filled else 0
    return math.ceil((begins + ranks) / domain)


def reached(model: ModelConfig, places: int) -> float:
    """Nodes or ranks, of so many that hold the experts in order, that hold at least one of a token's, on average."""
    limited = model.n_limited_groups < model.n_expert_groups
    groups, limit = (model.n_expert_groups, model.n_limited_groups) if limited else (1, 1)
    return _places(model.n_routed_experts, model.n_activated_experts, groups, limit, places)


@lru_cache
def _places(experts: int, chosen: int, groups: int, limit: int, places: int) -> float:
    """All choices are equally likely: `limit` of the groups, and of each as many experts. (Groups are chosen by their
    best experts, so that of most a token takes some: V3's choice among random scores reaches 1 to 6% fewer places.)"""
    each, drawn = experts // groups, list(combinations(range(groups), limit))
    few, share = divmod(chosen / limit, 1)
    missed = 0.0
    for place in range(places):
        begin, end = place * experts // places, (place + 1) * experts // places
        held = [max(0, min(end, (group + 1) * each) - max(begin, group * each)) for group in range(groups)]
        misses = [(1 - share) * _miss(each, here, int(few)) + share * _miss(each, here, int(few) + 1) for here in held]
        missed += sum(math.prod(misses[group] for group in some) for some in drawn)
    return places - missed / len(drawn)


def _miss(experts: int, held: int, chosen: int) -> float:
    """Probability that so many different ones of these experts are all among those not held."""
    return math.comb(experts - held, chosen) / math.comb(experts, chosen) if chosen <= experts else 0.0


def all_to_all_s(work: Workload, sent_bytes: float, up_bytes: float, share: float) -> float:
    """Scale-out and scale-up links work at once; the slower one sets the pace."""
    ranks = min(work.ep * work.etp, work.hardware.scale_up_devices)
    return max(sent_bytes / (work.hardware.scale_out_gb_per_s * 1e9), up_bytes / scale_up_bytes_per_s(work.hardware,
                                                                                                     ranks)) / share


def scale_up_bytes_per_s(hardware: HardwareConfig, ranks: int) -> float:
    """Of one of so many ranks in a domain, one direction: without a switch it has a link to each of the others."""
    whole = hardware.scale_up_gb_per_s
    return 1e9 * (min(whole, max(1, ranks - 1) * hardware.peer_gb_per_s) if hardware.peer_gb_per_s else whole)
