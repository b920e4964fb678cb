"""Three autograd functions that say what autograd's composition would, with fewer passes over memory; a product of
groups; and what is made of a weight, once.

Each equals the plain expression in its docstring, gradient included (tests/model/test_ops.py). On a CPU they are
worth a tenth of a training step: a scatter becomes a gather, a concatenation a write in place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(hidden: Tensor) -> Tensor:
    """silu(hidden[.., :F]) * hidden[.., F:], [.., 2F] -> [.., F] (Shazeer 2020)."""
    return _SwiGLU.apply(hidden)


def swiglu_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of hidden [.., 2F] from that of swiglu(hidden) [.., F]."""
    gate, up = hidden.chunk(2, dim=-1)
    out = torch.empty_like(hidden)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    return _RMSNorm.apply(x, weight, eps)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """x[index // copies] for a permutation `index` of the `copies`-fold rows of x [N, D], with its inverse given.

    The gradient is again a gather, by `inverse`, summed over the copies in order: deterministic, no scatter-add.
    """
    return _GatherRows.apply(x, index, inverse, copies)


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
    """make(weight, **options), the same result each time within `weights_kept`."""
    if _made is None:
        return make(weight, **options)
    key = id(weight), make, *options.items()
    if key not in _made:
        _made[key] = weight, make(weight, **options)
    return _made[key][1]


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
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index if copies == 1 else index // copies]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grad[inverse]
        return rows.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else rows, None, None, None
