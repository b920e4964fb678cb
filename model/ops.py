"""Autograd functions that say what autograd's composition would, with fewer passes over memory or less of it kept; a
product of groups; and what is made of a weight, once.

Each equals the plain expression in its docstring, gradient included (tests/model/test_ops.py). On a CPU they are
worth a tenth of a training step: a scatter becomes a gather, a concatenation a write in place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.count import LOGITS_IN_FP32


def swiglu(hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(hidden[.., :F]) * hidden[.., F:] * weights, [.., 2F] and [.., 1] -> [.., F] (Shazeer 2020)."""
    return _SwiGLU.apply(hidden, weights)


def swiglu_backward(grad: Tensor, hidden: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden [.., 2F] and weights [.., 1] from that of swiglu(hidden, weights) [.., F]."""
    gate, up = hidden.chunk(2, dim=-1)
    out, grad_weights = torch.empty_like(hidden), None
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
    torch.mul(grad, up, out=grad_gate)
    if weights is not None:
        grad_weights = (grad_up * up).sum(-1, keepdim=True, dtype=weights.dtype)
        out.mul_(weights.to(out.dtype))
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return out, grad_weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    return _RMSNorm.apply(x, weight, eps)


def linear_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x.float() @ weight.float().T, [.., K] and [N, K] -> [.., N]; x is kept as it is."""
    return _LinearInFp32.apply(x, weight)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, again: bool = False) -> Tensor:
    """F.cross_entropy((x @ weight.T).float(), targets, reduction="sum"), [T, D], [V, D], [T] -> [1].

    Kept are the logits, in the dtype of products, or nothing if they are computed again; what is made of them in fp32
    is made of a few rows at a time.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, again)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """x[index // copies] for a permutation `index` of the `copies`-fold rows of x [N, D], with its inverse given.

    The gradient is again a gather, by `inverse`, summed over the copies in order: deterministic, no scatter-add.
    """
    return _GatherRows.apply(x, index, inverse, copies)


def sum_rows(x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """The way back from `gather_rows`: x[inverse] [N * copies, D] summed over each token's copies, [N, D]."""
    return _SumRows.apply(x, index, inverse, copies)


@contextlib.contextmanager
def weights_kept() -> Iterator[None]:
    """Within, what `of_weight` makes of a weight is made once. Autocast's casts are, but for those that are written
    out; these, and weights in FP8, would be made and held for backward by every microbatch in flight."""
    global _made
    _made = {}
    try:
        yield
    finally:
        _made = None


def of_weight(make: Callable, weight: Tensor, **options):
    """make(weight, **options), the same result each time within `weights_kept`; of the parameter itself, which a tensor
    saved for backward is not where hooks have packed it: autograd functions hold theirs in ctx."""
    if _made is None:
        return make(weight, **options)
    key = id(weight), make, *options.items()
    if key not in _made:
        _made[key] = weight, make(weight, **options)
    return _made[key][1]


def wanted(ctx) -> list[bool]:
    """Which tensors' gradients this pass of backward asks of an autograd function, in the order of its arguments.

    `ctx.needs_input_grad` names all that could be asked for, so that a backward in two parts would do both in each.
    The one place that touches torch's private question to the engine.
    """
    return [node is not None and _will_run(node) for node, _ in ctx.next_functions]


def _will_run(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf, whose gradient was asked for by name
        return True


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product of x comes out in: under autocast its dtype, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype), once."""
    return weight if weight.dtype == dtype else of_weight(Tensor.to, weight, dtype=dtype)


_made: dict[tuple, tuple[Tensor, object]] | None = None
"""By the weight's identity, which lasts as long as the weight is held here."""


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """torch's, group by group [R, K] x [E, K, N] -> [R, N] or [M, R] x [R, N] -> [E, M, N], for sizes of any number.

    torch wants rows of a multiple of 16 bytes: to others zeros are appended. Groups end at `offsets` [E], int32.
    """
    unit, unclean = 16 // a.element_size(), _leaves_empty_groups(a.device)
    if b.dim() == 3:
        if unclean and b.requires_grad:
            b = b.view_as(b)
            b.register_hook(lambda grad: _empty_groups_zeroed(grad, offsets))
        inner, outer = -b.shape[1] % unit, -b.shape[2] % unit
        if inner or outer:
            a, padded = F.pad(a, (0, inner)), F.pad(b.mT, (0, inner, 0, outer)).mT
            return F.grouped_mm(a, padded, offs=offsets)[:, : b.shape[2]]
        return F.grouped_mm(a, b, offs=offsets)
    rows, columns, size = -a.shape[0] % unit, -b.shape[1] % unit, (a.shape[0], b.shape[1])
    if rows or columns:
        a, b = F.pad(a.mT, (0, rows)).mT, F.pad(b, (0, columns))
    out = F.grouped_mm(a, b, offs=offsets)[:, : size[0], : size[1]]
    return _empty_groups_zeroed(out, offsets) if unclean else out


def _empty_groups_zeroed(products: Tensor, offsets: Tensor) -> Tensor:
    """products [E, M, N] with zeros in groups without rows."""
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return products.masked_fill((counts == 0)[:, None, None], 0)


@functools.cache
def _leaves_empty_groups(device: torch.device) -> bool:
    """Whether torch leaves a group's product over no rows as the memory was: on Blackwell (pytorch issue 172439)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (10, 0)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weights)
        gate, up = hidden.chunk(2, dim=-1)
        out = F.silu(gate).mul_(up)
        return out if weights is None else out.mul_(weights.to(out.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return swiglu_backward(grad, *ctx.saved_tensors)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grad.float()
        normed = x.float() * scale
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        # d/dx = scale * (g w - normed * mean(g w normed)); the mean is a matrix-vector product with the weight.
        mean = torch.mv(product.flatten(0, -2), weight.float()).div_(x.shape[-1]).view_as(scale)
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _LinearInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (to_x, to_weight), weight, grad_weight = wanted(ctx), ctx.weight, None
        if to_weight:
            (x,) = ctx.saved_tensors
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype)
        return (grad @ weight.float()).to(ctx.dtype) if to_x else None, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, again: bool) -> Tensor:
        x = x.to(autocast_dtype(x))
        logits = F.linear(x, cast_weight(weight, x.dtype))
        sums = torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(_rows_in_fp32(logits))])
        ctx.save_for_backward(x, targets, sums, None if again else logits)
        ctx.weight = weight
        return (sums - logits.gather(1, targets[:, None])).sum().reshape(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, targets, sums, logits), (to_x, to_weight, *_) = ctx.saved_tensors, wanted(ctx)
        weight_cast = cast_weight(ctx.weight, x.dtype)
        logits = F.linear(x, weight_cast) if logits is None else logits
        grads = torch.empty_like(logits)
        parts = (t.split(_rows_in_fp32(logits)) for t in (logits, grads, sums, targets[:, None]))
        for part, out, each, target in zip(*parts, strict=True):
            softmax = (part - each).exp_()
            softmax.scatter_add_(1, target, softmax.new_full(target.shape, -1))
            out.copy_(softmax.mul_(grad))
        return (grads @ weight_cast if to_x else None,
                (grads.T @ x).to(ctx.weight.dtype) if to_weight else None, None, None)


def _rows_in_fp32(logits: Tensor) -> int:
    return max(1, LOGITS_IN_FP32[logits.device.type] // logits.shape[1])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return _taken(x, index, copies)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sums(grad, *ctx.saved_tensors, ctx.copies), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.copies = copies
        return _sums(x, inverse, copies)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _taken(grad, *ctx.saved_tensors, ctx.copies), None, None, None


def _taken(x: Tensor, index: Tensor, copies: int) -> Tensor:
    return x[index if copies == 1 else index // copies]


def _sums(x: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """Each token's rows summed in order, in fp32 whatever they are in, as they are read: no copy of them is made."""
    if copies == 1 or not len(x):
        return x[inverse].view(-1, x.shape[-1])
    return F.embedding_bag(inverse.view(-1, copies), x.contiguous(), mode="sum")
