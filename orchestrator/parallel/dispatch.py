"""Expert-parallel dispatch and combine: a copy of a token for each of its experts, straight to their ranks.

Dropless, by `all_to_all_single`. What the exchange returns is sorted by expert alone, so an expert sees its tokens in
(source rank, token) order, the order of the one-process run. `node_limited` sends fewer bytes between nodes.
Shapes: T tokens, D dim, K activated experts, E experts over all ranks, R rows that arrive here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.moe import Permutation, Received, Routing, inverse_of, permute, unpermute
from model.ops import gather_rows
from orchestrator.parallel.exchange import Journey, as_experts_compute, precisions


@dataclass
class Exchange:
    """The way of weights and rows to the experts, and what the way back needs: the local sort and the sort by expert
    after arrival."""

    weights: Journey
    rows: Journey
    tickets: tuple[Tensor, Tensor]
    counts: Tensor
    permutation: Permutation
    order: Tensor
    back: Tensor


class AllToAllDispatcher:
    """Experts are sharded in equal consecutive shares over the ranks of `group`.

    fp8: what goes to the experts travels in FP8, tokens in forward and gradients in backward, each row with its
    scales; what comes back in bf16 (V3 report section 3.3.3). Values are those of `model.fp8.Fp8LocalDispatcher`.
    """

    def __init__(self, group: dist.ProcessGroup, n_routed_experts: int, *, fp8: bool = False):
        self.group = group
        self.n_routed_experts = n_routed_experts
        self.fp8 = fp8

    def dispatch(self, tokens: Tensor, routing: Routing) -> Exchange:
        (leaving, counts, by_row), permutation = permute(tokens, routing, self.n_routed_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        ranks = self.group.size()
        per_source = arriving.view(ranks, -1)
        sent, received = torch.stack([counts.view(ranks, -1).sum(1), per_source.sum(1)]).tolist()
        # Weights leave first, so that in backward, too, they are awaited after the rows, at whose side they travel.
        weights = Journey(self.group, sent, received, small=True)
        rows = Journey(self.group, sent, received, *precisions(self.fp8))
        tickets = weights.depart(by_row), rows.depart(as_experts_compute(leaving, self.fp8))
        local = torch.arange(per_source.shape[1], device=tokens.device).repeat(ranks)
        order = local.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        return Exchange(weights, rows, tickets, per_source.sum(0), permutation, order, inverse_of(order))

    def receive(self, handle: Exchange) -> Received:
        rows, weights = handle.rows.arrive(handle.tickets[1]), handle.weights.arrive(handle.tickets[0])
        rows, weights = (gather_rows(t, handle.order, handle.back) for t in (rows, weights))
        return Received(rows, handle.counts, weights)

    def combine(self, out: Tensor, handle: Exchange) -> Tensor:
        home = handle.rows.home()
        ticket = home.depart(as_experts_compute(gather_rows(out, handle.back, handle.order), self.fp8))
        del out  # nobody waits for it while it is on its way
        return unpermute(home.arrive(ticket), handle.permutation)
