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

from model.fp8 import wire
from model.moe import Permutation, Routing, inverse_of, permute, unpermute
from model.ops import gather_rows
from model.quantize import pack, unpack


@dataclass
class Exchange:
    """What the way back needs: the local sort, the sort by expert after arrival, and the row counts per rank."""

    permutation: Permutation
    order: Tensor
    back: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """Experts are sharded in equal consecutive shares over the ranks of `group`.

    fp8: what goes to the experts travels in FP8, tokens in forward and gradients in backward, each row with its
    scales; what comes back in bf16 (V3 report section 3.3.3). Values are those of `model.fp8.Fp8LocalDispatcher`.
    """

    def __init__(self, group: dist.ProcessGroup, n_routed_experts: int, *, fp8: bool = False):
        self.group = group
        self.n_routed_experts = n_routed_experts
        self.fp8 = fp8

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Exchange]:
        """tokens [T, D] -> rows [R, D] sorted by local expert, counts [E / ranks], handle."""
        rows, counts, permutation = permute(tokens, routing, self.n_routed_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        ranks = self.group.size()
        per_source = arriving.view(ranks, -1)
        sent, received = torch.stack([counts.view(ranks, -1).sum(1), per_source.sum(1)]).tolist()
        rows = self._exchange(rows, received, sent, to_experts=True)
        local = torch.arange(per_source.shape[1], device=tokens.device).repeat(ranks)
        order = local.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        back = inverse_of(order)
        return gather_rows(rows, order, back), per_source.sum(0), Exchange(permutation, order, back, sent, received)

    def combine(self, out: Tensor, handle: Exchange) -> Tensor:
        """Expert outputs [R, D] -> weighted sums [T, D] at the tokens' own ranks."""
        rows = gather_rows(out, handle.back, handle.order)
        rows = self._exchange(rows, handle.sent, handle.received, to_experts=False)
        return unpermute(rows, handle.permutation)

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int], *, to_experts: bool) -> Tensor:
        if not self.fp8:
            if torch.is_autocast_enabled(rows.device.type):  # as the experts would: half the bytes
                rows = rows.to(torch.get_autocast_dtype(rows.device.type))
            return all_to_all_single_autograd(rows, received, sent, self.group)

        def in_fp8(x: Tensor, arriving: list[int], leaving: list[int]) -> Tensor:
            return unpack(self._send(pack(x), arriving, leaving), x.shape[-1]).to(x.dtype)

        def in_bf16(x: Tensor, arriving: list[int], leaving: list[int]) -> Tensor:
            return self._send(x.to(torch.bfloat16), arriving, leaving).to(x.dtype)

        there, back = (in_fp8, in_bf16) if to_experts else (in_bf16, in_fp8)
        return wire(rows, lambda x: there(x, received, sent), lambda grad: back(grad, sent, received))

    def _send(self, rows: Tensor, arriving: list[int], leaving: list[int]) -> Tensor:
        out = rows.new_empty(sum(arriving), rows.shape[-1])
        dist.all_to_all_single(out, rows.contiguous(), arriving, leaving, group=self.group)
        return out
