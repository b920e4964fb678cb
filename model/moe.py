"""Mixture of experts: the router, the grouped experts, and the local dispatcher (V3 report, section 2.1.2).

A dispatcher moves tokens to the experts that were chosen for them and brings the outputs back. The local one
only reorders; `orchestrator/parallel/dispatch.py` has the one that crosses ranks. It is no module: it holds no
parameter. Shapes: T tokens, D dim, E routed experts, K activated experts, R rows at the local experts.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig, ScoreFunc
from model.ops import autocast_dtype, cast_weight, gather_rows, grouped_mm, linear_in_fp32, sum_rows, swiglu
from model.recompute import again


class Routing(NamedTuple):
    """Which experts a token goes to, [T, K] each: index and weight of what the expert makes of it."""

    indices: Tensor
    weights: Tensor


class Dispatcher(Protocol):
    """`dispatch`, `receive`, `combine`, once per layer and microbatch. What is computed between the first two, and its
    backward, runs beside the rows' way to the experts."""

    def dispatch(self, tokens: Tensor, routing: Routing) -> object:
        """tokens [T, D] set out for their experts -> handle, which carries what the other two need."""

    def receive(self, handle: object) -> "Received":
        """What has arrived at the local experts."""

    def combine(self, out: Tensor, handle: object) -> Tensor:
        """Expert outputs, weighted, [R, D] -> their sums per token [T, D]."""


class Received(NamedTuple):
    """Rows [R, D] sorted by local expert, counts [local experts], the rows' weights [R, 1] in fp32."""

    rows: Tensor
    counts: Tensor
    weights: Tensor


class Permutation(NamedTuple):
    """How `copies` rows of each token were sorted by expert, and the way back, [T * K] each."""

    order: Tensor
    back: Tensor
    copies: int


class Sorted(NamedTuple):
    """The local dispatcher's handle."""

    received: Received
    permutation: Permutation


class LocalDispatcher:
    """All experts are here: sort by expert, dropless."""

    def __init__(self, n_routed_experts: int):
        self.n_routed_experts = n_routed_experts

    def dispatch(self, tokens: Tensor, routing: Routing) -> Sorted:
        return permute(tokens, routing, self.n_routed_experts)

    def receive(self, handle: Sorted) -> Received:
        return handle.received

    def combine(self, out: Tensor, handle: Sorted) -> Tensor:
        return unpermute(out, handle.permutation)


def permute(tokens: Tensor, routing: Routing, n_experts: int) -> Sorted:
    """Copy each token once per chosen expert and sort the copies by expert (stable, so that order is a fact)."""
    flat = routing.indices.flatten()
    order = flat.argsort(stable=True)
    back = inverse_of(order)
    counts = count_choices(flat, n_experts)
    copies = routing.indices.shape[1]
    weights = gather_rows(routing.weights.view(-1, 1), order, back)
    return Sorted(Received(gather_rows(tokens, order, back, copies), counts, weights), Permutation(order, back, copies))


def unpermute(out: Tensor, permutation: Permutation) -> Tensor:
    """Rows summed over each token's experts, in the experts' chosen order."""
    return sum_rows(out, *permutation)


def count_choices(flat: Tensor, n_experts: int) -> Tensor:
    """How often each expert is among the indices [N] -> [E], int64. bincount would wait for a GPU to tell their range,
    twice a layer."""
    return flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class Router(nn.Module):
    """Scores experts and picks K of them for each token (eq. 12-16), in fp32.

    `expert_bias` takes part in the choice alone and is no parameter: `update_bias` moves it once a step.
    `tokens_per_expert` counts the choices of training since the last update.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)
        if config.expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_routed_experts, dtype=torch.int64),
                             persistent=False)
        self.balance_loss_sum = 0.0
        self.counting = True

    def forward(self, x: Tensor) -> tuple[Routing, Tensor | None]:
        """x [B, S, D] -> routing over the B * S tokens, and the balance loss summed over sequences (if weighed)."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = linear_in_fp32(x, self.gate.weight)
            sigmoid = config.score_func is ScoreFunc.sigmoid
            scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
            indices = self._choose(scores.detach())
            weights = scores.gather(-1, indices)
            if config.norm_topk and config.n_activated_experts > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * config.route_scale
            loss = None
            if self.training and torch.is_grad_enabled() and config.balance_loss_weight:
                loss = self._balance_loss(scores, indices)
        if self.training and self.counting:
            self.tokens_per_expert += count_choices(indices.flatten(), config.n_routed_experts)
            if loss is not None:
                self.balance_loss_sum = self.balance_loss_sum + loss.detach()
        return Routing(indices.flatten(0, 1), weights.flatten(0, 1)), loss

    def _choose(self, scores: Tensor) -> Tensor:
        """Indices [B, S, K] of the chosen experts; with groups, only those of the best groups compete.

        A group's score is the sum of its two best biased affinities (V3), or its best one where no bias is
        used (V2). Experts of dropped groups are masked with -inf, as DeepSeek's code does.
        """
        config = self.config
        if config.expert_bias:
            scores = scores + self.expert_bias
        if config.n_limited_groups < config.n_expert_groups:
            groups = scores.unflatten(-1, (config.n_expert_groups, -1))
            top2 = groups.topk(min(2, groups.shape[-1]), dim=-1).values
            best = top2.sum(-1) if config.expert_bias else top2[..., 0]
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
                -1, best.topk(config.n_limited_groups, dim=-1).indices, True)
            scores = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return scores.topk(config.n_activated_experts, dim=-1).indices

    def _balance_loss(self, scores: Tensor, indices: Tensor) -> Tensor:
        """Sequence-wise balance loss without its weight, summed over the B sequences (eq. 17-20).

        Eq. 18 counts the top K of the unbiased affinities, whatever the bias and the groups made of them.
        """
        config = self.config
        if config.expert_bias or config.n_limited_groups < config.n_expert_groups:
            indices = scores.detach().topk(config.n_activated_experts, dim=-1).indices
        seq_len = scores.shape[1]
        counts = torch.zeros_like(scores[:, 0]).scatter_add_(
            -1, indices.flatten(1), torch.ones_like(indices.flatten(1), dtype=scores.dtype))
        frequency = counts * (config.n_routed_experts / (config.n_activated_experts * seq_len))
        probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return (frequency * probability).sum()

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: Tensor) -> None:
        """One step of auxiliary-loss-free balancing: overloaded experts down by gamma, underloaded up.

        tokens_per_expert [E] are the step's counts over all microbatches and data-parallel ranks; call once a step.
        """
        counts = tokens_per_expert.double()
        self.expert_bias -= self.config.bias_update_speed * torch.sign(counts - counts.mean()).float()


class GroupedExperts(nn.Module):
    """The local experts' SwiGLU networks, one weight tensor per matrix, expert first.

    w13 [E, 2F, D]: gate rows, then up rows. w2 [E, D, F]. The routing weights multiply what w2 multiplies, so that
    their gradient needs no output: D numbers of each row are not kept.
    """

    keeps_less = False
    """SwiGLU's output is computed again in backward."""

    def __init__(self, dim: int, inter_dim: int, num_experts: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(num_experts, 2 * inter_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, inter_dim))

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """x [R, D] sorted by expert, counts [E] rows of each, weights [R, 1] -> weighted [R, D]."""
        offsets = counts.cumsum(0).to(torch.int32)
        dtype = autocast_dtype(x)
        hidden = grouped_mm(x.to(dtype), cast_weight(self.w13, dtype).transpose(1, 2), offsets)
        inputs = hidden, weights, offsets
        return again(self._down, *inputs) if self.keeps_less and self.training else self._down(*inputs)

    def _down(self, hidden: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return grouped_mm(swiglu(hidden, weights), cast_weight(self.w2, hidden.dtype).transpose(1, 2), offsets)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), with w1 and w3 stacked in one matrix (Shazeer 2020)."""

    keeps_less = False

    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inter_dim, bias=False)
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w13(x)
        return again(self._down, hidden) if self.keeps_less and self.training else self._down(hidden)

    def _down(self, hidden: Tensor) -> Tensor:
        return self.w2(swiglu(hidden))


class MoE(nn.Module):
    """Routed experts plus shared experts (eq. 12). `balance_scale` is alpha over the step's sequences."""

    def __init__(self, config: ModelConfig, num_local_experts: int | None = None):
        super().__init__()
        self.router = Router(config)
        self.experts = GroupedExperts(config.dim, config.moe_inter_dim, num_local_experts or config.n_routed_experts)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config.dim, config.moe_inter_dim * config.n_shared_experts)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)
        self.balance_scale = config.balance_loss_weight

    def forward(self, x: Tensor) -> Tensor:
        routing, balance_loss = self.router(x)
        handle = self.dispatcher.dispatch(x.flatten(0, 1), routing)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        out = self.dispatcher.combine(self.experts(*self.dispatcher.receive(handle)), handle).view_as(x)
        if shared is not None:
            out = out + shared
        if balance_loss is not None:
            out = AttachLoss.apply(out, balance_loss, self.balance_scale)
        return out


class AttachLoss(torch.autograd.Function):
    """Identity on x that feeds `scale` to a side loss in backward, so that a pipeline stage need not send it."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_meta = scale, (loss.dtype, loss.device, loss.shape)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dtype, device, shape = ctx.loss_meta
        return grad, torch.full(shape, ctx.scale, dtype=dtype, device=device), None
