"""Expert-parallel dispatch and combine: a copy of a token for each of its experts, straight to their ranks.

Dropless, by `all_to_all_single`. What the exchange returns is sorted by expert alone, so an expert sees its tokens in
(source rank, token) order, the order of the one-process run. `node_limited` sends fewer bytes between nodes.
Shapes: T tokens, D dim, K activated experts, E experts over all ranks, R rows that arrive here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.moe import Permutation, Routing, inverse_of, permute, unpermute
from model.ops import gather_rows
from orchestrator.parallel.exchange import Journey, as_experts_compute, precisions


@dataclass
class Exchange:
    """The rows' way to the experts, and what the way back needs: the local sort and the sort by expert after arrival.
    """

    journey: Journey
    ticket: Tensor
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
        rows, counts, permutation = permute(tokens, routing, self.n_routed_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        ranks = self.group.size()
        per_source = arriving.view(ranks, -1)
        sent, received = torch.stack([counts.view(ranks, -1).sum(1), per_source.sum(1)]).tolist()
        journey = Journey(self.group, sent, received, *precisions(self.fp8))
        ticket = journey.depart(as_experts_compute(rows, self.fp8))
        local = torch.arange(per_source.shape[1], device=tokens.device).repeat(ranks)
        order = local.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        return Exchange(journey, ticket, per_source.sum(0), permutation, order, inverse_of(order))

    def receive(self, handle: Exchange) -> tuple[Tensor, Tensor]:
        rows = handle.journey.arrive(handle.ticket)
        return gather_rows(rows, handle.order, handle.back), handle.counts

    def combine(self, out: Tensor, handle: Exchange) -> Tensor:
        home = handle.journey.home()
        ticket = home.depart(as_experts_compute(gather_rows(out, handle.back, handle.order), self.fp8))
        del out  # nobody waits for it while it is on its way
        return unpermute(home.arrive(ticket), handle.permutation)
