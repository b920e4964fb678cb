"""An all-to-all of rows, and in backward of their gradients, started in one place and awaited in another.

What is computed between runs beside it, and where two microbatches share a rank (`overlap`), so does the other one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.ops import autocast_dtype
from model.quantize import pack, unpack
from orchestrator.parallel.overlap import hand_over


class Precision(NamedTuple):
    """In which rows travel: what is sent of them, and of what arrived, D values wide, the rows again."""

    packed: Callable[[Tensor], Tensor]
    unpacked: Callable[[Tensor, int], Tensor]


AS_THEY_ARE = Precision(Tensor.contiguous, lambda sent, dim: sent)
BF16 = Precision(lambda rows: rows.to(torch.bfloat16).contiguous(), lambda sent, dim: sent)
FP8 = Precision(pack, unpack)


class Crossing:
    """One all-to-all under way."""

    def __init__(self, rows: Tensor, arriving: list[int], leaving: list[int], group: dist.ProcessGroup,
                 precision: Precision):
        self.dim, self.dtype, self.precision = rows.shape[-1], rows.dtype, precision
        self.sent = precision.packed(rows)
        self.arrived = self.sent.new_empty(sum(arriving), self.sent.shape[-1])
        self.work = dist.all_to_all_single(self.arrived, self.sent, arriving, leaving, group=group, async_op=True)

    def wait(self) -> Tensor:
        self.work.wait()
        del self.sent  # before there is another copy
        return self.precision.unpacked(self.arrived, self.dim).to(self.dtype)


@dataclass
class Journey:
    """Rows to other ranks of `group`, and their gradients back. `sent` and `received` count the rows by rank; what is
    `small` travels beside other rows and is not worth the other half's turn."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    there: Precision = AS_THEY_ARE
    back: Precision = AS_THEY_ARE
    small: bool = False
    crossing: Crossing | None = None

    def home(self) -> "Journey":
        """The way back for rows made of those that arrived."""
        return Journey(self.group, self.received, self.sent, self.back, self.there)

    def depart(self, rows: Tensor) -> Tensor:
        """A ticket, which has no elements and carries the graph from here to `arrive`."""
        return _Depart.apply(rows, self)

    def arrive(self, ticket: Tensor) -> Tensor:
        return _Arrive.apply(ticket, self)

    def awaited(self) -> Tensor:
        if not self.small:
            hand_over()
        crossing, self.crossing = self.crossing, None
        return crossing.wait()


def precisions(fp8: bool) -> tuple[Precision, Precision]:
    """Of rows to the experts and of their gradients back."""
    return (FP8, BF16) if fp8 else (AS_THEY_ARE, AS_THEY_ARE)


def as_experts_compute(rows: Tensor, fp8: bool) -> Tensor:
    """Under autocast in its dtype, half the bytes. Eight bits are made of the rows as they are."""
    return rows if fp8 else rows.to(autocast_dtype(rows))


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.crossing = Crossing(rows, journey.received, journey.sent, journey.group, journey.there)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return ctx.journey.awaited(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.awaited()

    @staticmethod
    def backward(ctx, grad: Tensor):
        journey = ctx.journey
        journey.crossing = Crossing(grad, journey.sent, journey.received, journey.group, journey.back)
        return grad.new_empty(0), None
