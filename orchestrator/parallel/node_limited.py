"""Node-limited dispatch: a token crosses to each node that holds one of its experts once, and goes on from there to the
ranks that hold them, once to each (V3 report, section 3.2.2).

On the way back each rank adds up what its experts made of a token, and each node what its ranks did, so that the bytes
are as few. Sums over experts are therefore taken in another order than in one process; what an expert sees is
the same. A place below is a node, a rank or, at the end, an expert; a token goes to each at most once, which is a pair.
Shapes: T tokens, D dim, K activated experts, N places, P pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.moe import Received, Routing
from orchestrator.parallel.exchange import Journey, as_experts_compute, precisions


class Pairs(NamedTuple):
    """Sorted by place, then by token, of which each pair has one, [P]."""

    place: Tensor
    token: Tensor
    by_token: Tensor
    """The pairs sorted by token, [P]."""
    starts: Tensor
    """Where each token's pairs begin among those, [T]."""


def pairs_of(wanted: Tensor, num: int, order: Tensor | None = None) -> Pairs:
    """wanted [T, N]: whether a token goes to a place. `num` times it does: a GPU that is not asked need not be waited
    for. order [T]: of tokens at a place, if not as they come."""
    place, token = (wanted if order is None else wanted[order]).T.nonzero_static(size=num).T.contiguous()
    token = token if order is None else order[token]
    per_token = wanted.sum(1)
    return Pairs(place, token, token.argsort(stable=True), per_token.cumsum(0) - per_token)


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
    """One hop's exchange: weights and rows under way; the experts that their tokens chose and the ranks these are of.
    """

    pairs: Pairs
    indices: Tensor
    origin: Tensor
    weights: Journey
    rows: Journey
    tickets: tuple[Tensor, Tensor]


class Hop:
    """From a rank to the others of `group`, each of which, or what lies behind it, has `share` experts in turn."""

    def __init__(self, group: dist.ProcessGroup, share: int, *, fp8: bool):
        self.group, self.share, self.fp8 = group, share, fp8

    def depart(self, tokens: Tensor, routing: Routing, origin: Tensor) -> Leg:
        """origin [T]: where the tokens come from, as far as hops so far tell."""
        wanted = _wanted(routing.indices // self.share, self.group.size())
        leaving = wanted.sum(0)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        sent, received = torch.stack([leaving, arriving]).tolist()
        pairs = pairs_of(wanted, sum(sent))
        chosen = torch.cat([origin[:, None], routing.indices], 1)[pairs.token].int()
        told = chosen.new_empty(sum(received), chosen.shape[1])
        dist.all_to_all_single(told, chosen, received, sent, group=self.group)
        source = torch.arange(self.group.size(), device=told.device).repeat_interleave(arriving, output_size=len(told))
        # Weights leave first, so that in backward, too, they are awaited after the rows, at whose side they travel.
        weights = Journey(self.group, sent, received, small=True)
        rows = Journey(self.group, sent, received, *precisions(self.fp8))
        tickets = (weights.depart(copied(routing.weights, pairs)),
                   rows.depart(as_experts_compute(copied(tokens, pairs), self.fp8)))
        return Leg(pairs, told[:, 1:].long(), told[:, 0] * self.group.size() + source, weights, rows, tickets)

    def arrive(self, leg: Leg) -> tuple[Tensor, Routing]:
        """Tokens, and which of this rank's experts they chose with which weights; -1 where one is elsewhere."""
        rows, weights = leg.rows.arrive(leg.tickets[1]), leg.weights.arrive(leg.tickets[0])
        here = leg.indices - self.group.rank() * self.share
        return rows, Routing(torch.where((here >= 0) & (here < self.share), here, -1), weights)

    def home(self, out: Tensor, leg: Leg) -> Tensor:
        """What was made of the tokens that arrived -> its sums at the ranks they came from."""
        way = leg.rows.home()
        return summed(way.arrive(way.depart(as_experts_compute(out, self.fp8))), leg.pairs)


@dataclass
class Trip:
    """The legs so far; at the end the pairs of token and local expert."""

    legs: list[Leg]
    pairs: Pairs | None = None


class NodeLimitedDispatcher:
    """Experts are sharded in equal consecutive shares over the ranks of an expert group, whose ranks are joined by
    `groups`, from the widest to the narrowest: across its nodes, then within a node (`Mesh.hops`).

    fp8: as in `AllToAllDispatcher`; but a sum is rounded to bf16 wherever it travels.
    """

    def __init__(self, groups: list[dist.ProcessGroup], n_routed_experts: int, *, fp8: bool = False):
        self.hops, self.share = [], n_routed_experts
        for group in groups:
            self.share //= group.size()
            self.hops.append(Hop(group, self.share, fp8=fp8))

    def dispatch(self, tokens: Tensor, routing: Routing) -> Trip:
        nowhere = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return Trip([self.hops[0].depart(tokens, routing, nowhere)])

    def receive(self, handle: Trip) -> Received:
        tokens, routing = self.hops[0].arrive(handle.legs[0])
        for hop in self.hops[1:]:
            handle.legs.append(hop.depart(tokens, routing, handle.legs[-1].origin))
            tokens, routing = hop.arrive(handle.legs[-1])
        wanted = _wanted(routing.indices, self.share)
        counts = wanted.sum(0)
        in_order = handle.legs[-1].origin.argsort(stable=True)  # as in one process: by source rank, then by token
        handle.pairs = pairs = pairs_of(wanted, int(counts.sum()), in_order)
        spread = routing.weights.new_zeros(len(tokens), self.share + 1).scatter(
            1, routing.indices.remainder(self.share + 1), routing.weights)
        return Received(copied(tokens, pairs), counts, spread[pairs.token, pairs.place, None])

    def combine(self, out: Tensor, handle: Trip) -> Tensor:
        out = summed(out, handle.pairs)
        for hop, leg in zip(reversed(self.hops), reversed(handle.legs), strict=True):
            out = hop.home(out, leg)
        return out


def _wanted(places: Tensor, num: int) -> Tensor:
    """places [T, K], -1 for none -> whether a token goes to each of `num` places, [T, num]."""
    wanted = torch.zeros(len(places), num + 1, dtype=torch.bool, device=places.device)
    return wanted.scatter_(1, places.remainder(num + 1), True)[:, :-1]
