"""Expert-parallel dispatch and combine: tokens to the ranks that hold their experts, and back.

Dropless, with `all_to_all_single` and its autograd form. What the exchange returns is sorted by expert alone, so
an expert sees its tokens in (source rank, token) order, the order of the one-process run.
Shapes: T tokens, D dim, K activated experts, E experts over all ranks, R rows that arrive here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from model.moe import Permutation, Routing, inverse_of, permute, unpermute
from model.ops import gather_rows


@dataclass
class Exchange:
    """What the way back needs: the local sort, the sort by expert after arrival, and the row counts per rank."""

    permutation: Permutation
    order: Tensor
    back: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """Experts are sharded in equal consecutive shares over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, n_routed_experts: int):
        self.group = group
        self.n_routed_experts = n_routed_experts

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Exchange]:
        """tokens [T, D] -> rows [R, D] sorted by local expert, counts [E / ranks], handle."""
        rows, counts, permutation = permute(tokens, routing, self.n_routed_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        ranks = self.group.size()
        per_source = arriving.view(ranks, -1)
        sent, received = torch.stack([counts.view(ranks, -1).sum(1), per_source.sum(1)]).tolist()
        rows = all_to_all_single_autograd(rows, received, sent, self.group)
        local = torch.arange(per_source.shape[1], device=tokens.device).repeat(ranks)
        order = local.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        back = inverse_of(order)
        return gather_rows(rows, order, back), per_source.sum(0), Exchange(permutation, order, back, sent, received)

    def combine(self, out: Tensor, handle: Exchange) -> Tensor:
        """Expert outputs [R, D] -> weighted sums [T, D] at the tokens' own ranks."""
        rows = gather_rows(out, handle.back, handle.order)
        rows = all_to_all_single_autograd(rows, handle.sent, handle.received, self.group)
        return unpermute(rows, handle.permutation)
