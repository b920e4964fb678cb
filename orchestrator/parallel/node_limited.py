"""Node-limited dispatch: a token crosses to each node that holds one of its experts once, and goes on from there to the
ranks that hold them, once to each (V3 report, section 3.2.2).

On the way back each rank adds up, weighted, what its experts made of a token, and each node what its ranks did, so that
the bytes are as few. Sums over experts are therefore taken in another order than in one process. A place below is a
node, a rank or, at the end, an expert; a token goes to each at most once, which is a pair.
Shapes: T tokens, D dim, K activated experts, N places, P pairs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.moe import Routing
from orchestrator.parallel.dispatch import as_experts_compute, precisions
from orchestrator.parallel.exchange import Journey


class Pairs(NamedTuple):
    """Sorted by place, then by token."""

    token: Tensor
    """Of each pair, [P]."""
    counts: Tensor
    """Pairs of each place, [N]."""
    by_token: Tensor
    """The pairs sorted by token, [P]."""
    starts: Tensor
    """Where each token's pairs begin among those, [T]."""


def pairs_of(wanted: Tensor) -> Pairs:
    """wanted [T, N]: whether a token goes to a place."""
    token = wanted.T.nonzero()[:, 1]
    per_token = wanted.sum(1)
    return Pairs(token, wanted.sum(0), token.argsort(stable=True), per_token.cumsum(0) - per_token)


def copied(tokens: Tensor, pairs: Pairs) -> Tensor:
    """tokens [T, D] -> one row for each pair, [P, D]."""
    return _Copied.apply(tokens, pairs)


def summed(rows: Tensor, pairs: Pairs) -> Tensor:
    """rows [P, D] -> their sums by token, [T, D], always in the same order."""
    return _Summed.apply(rows, pairs)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return tokens[pairs.token]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _sums(grad, ctx.pairs), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return _sums(rows, pairs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[ctx.pairs.token], None


def _sums(rows: Tensor, pairs: Pairs) -> Tensor:
    if not len(rows):
        return rows.new_zeros(len(pairs.starts), rows.shape[-1])
    return F.embedding_bag(pairs.by_token, rows.contiguous(), pairs.starts, mode="sum")


@dataclass
class Leg:
    """One hop's exchange: rows and weights under way, the experts that their tokens chose."""

    pairs: Pairs
    indices: Tensor
    rows: Journey
    weights: Journey
    tickets: tuple[Tensor, Tensor]


class Hop:
    """From a rank to the others of `group`, each of which, or what lies behind it, has `share` experts in turn."""

    def __init__(self, group: dist.ProcessGroup, share: int, *, fp8: bool):
        self.group, self.share, self.fp8 = group, share, fp8

    def depart(self, tokens: Tensor, routing: Routing) -> Leg:
        places = torch.where(routing.indices < 0, -1, routing.indices // self.share)
        pairs = pairs_of(_wanted(places, self.group.size()))
        arriving = torch.empty_like(pairs.counts)
        dist.all_to_all_single(arriving, pairs.counts, group=self.group)
        sent, received = torch.stack([pairs.counts, arriving]).tolist()
        chosen = routing.indices.new_empty(sum(received), routing.indices.shape[1])
        dist.all_to_all_single(chosen, routing.indices[pairs.token], received, sent, group=self.group)
        rows = Journey(self.group, sent, received, *precisions(self.fp8))
        weights = Journey(self.group, sent, received)
        tickets = (rows.depart(as_experts_compute(copied(tokens, pairs), self.fp8)),
                   weights.depart(copied(routing.weights, pairs)))
        return Leg(pairs, chosen, rows, weights, tickets)

    def arrive(self, leg: Leg) -> tuple[Tensor, Routing]:
        """Tokens, and which of this rank's experts they chose with which weights; -1 where one is elsewhere."""
        rows, weights = leg.rows.arrive(leg.tickets[0]), leg.weights.arrive(leg.tickets[1])
        here = leg.indices - self.group.rank() * self.share
        return rows, Routing(torch.where((here >= 0) & (here < self.share), here, -1), weights)

    def home(self, out: Tensor, leg: Leg) -> Tensor:
        """What was made of the tokens that arrived -> its sums at the ranks they came from. Gradients are weighted at
        the experts: eight bits would round them before that and after."""
        way = replace(leg.rows.home(), back=leg.rows.back)
        return summed(way.arrive(way.depart(as_experts_compute(out, self.fp8))), leg.pairs)


@dataclass
class Trip:
    """The legs so far; at the end the pairs of token and local expert, and their weights."""

    legs: list[Leg]
    pairs: Pairs | None = None
    weights: Tensor | None = None


class NodeLimitedDispatcher:
    """Experts are sharded in equal consecutive shares over the ranks of an expert group, whose ranks are joined by
    `groups`, from the widest to the narrowest: across its nodes, then within a node (`Mesh.hops`).

    fp8: as in `AllToAllDispatcher`; sums of what comes back are rounded to bf16 wherever they travel.
    """

    def __init__(self, groups: list[dist.ProcessGroup], n_routed_experts: int, *, fp8: bool = False):
        self.hops, self.share = [], n_routed_experts
        for group in groups:
            self.share //= group.size()
            self.hops.append(Hop(group, self.share, fp8=fp8))

    def dispatch(self, tokens: Tensor, routing: Routing) -> Trip:
        return Trip([self.hops[0].depart(tokens, routing)])

    def receive(self, handle: Trip) -> tuple[Tensor, Tensor]:
        tokens, routing = self.hops[0].arrive(handle.legs[0])
        for hop in self.hops[1:]:
            handle.legs.append(hop.depart(tokens, routing))
            tokens, routing = hop.arrive(handle.legs[-1])
        wanted = _wanted(routing.indices, self.share)
        handle.pairs = pairs_of(wanted)
        spread = routing.weights.new_zeros(len(tokens), self.share + 1).scatter(
            1, routing.indices.remainder(self.share + 1), routing.weights)
        handle.weights = spread[:, :-1].T[wanted.T]
        return copied(tokens, handle.pairs), handle.pairs.counts

    def combine(self, out: Tensor, handle: Trip) -> Tensor:
        out = summed(out * handle.weights[:, None].to(out.dtype), handle.pairs)
        for hop, leg in zip(reversed(self.hops), reversed(handle.legs), strict=True):
            out = hop.home(out, leg)
        return out


def _wanted(places: Tensor, num: int) -> Tensor:
    """places [T, K], -1 for none -> whether a token goes to each of `num` places, [T, num]."""
    wanted = torch.zeros(len(places), num + 1, dtype=torch.bool, device=places.device)
    return wanted.scatter_(1, places.remainder(num + 1), True)[:, :-1]
