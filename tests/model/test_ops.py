"""The fused autograd functions equal the plain expressions they stand for, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from model import ops
from model.ops import gather_rows, grouped_mm, linear_cross_entropy, rms_norm, sum_rows, swiglu


def test_swiglu_equals_the_plain_expression_and_its_gradient():
    x = torch.randn(7, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(swiglu(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))
    weights = torch.randn(7, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.equal(swiglu(x, weights), F.silu(gate) * up * weights)
    assert torch.autograd.gradcheck(swiglu, (x, weights))


def test_a_swiglu_in_bf16_takes_weights_in_fp32():
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, n, generator=generator).bfloat16() for n in (48, 24))
    x, weights = x.requires_grad_(), torch.rand(64, 1, generator=generator, requires_grad=True)
    out = swiglu(x, weights)
    wide = [t.detach().double().requires_grad_() for t in (x, weights)]
    expected = swiglu(*wide)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=1e-3)
    ours, theirs = torch.autograd.grad(out, (x, weights), upstream), torch.autograd.grad(expected, wide, upstream)
    assert [grad.dtype for grad in ours] == [torch.bfloat16, torch.float32]
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.02, atol=0.05)


def test_rms_norm_equals_torch_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 16, generator=generator, requires_grad=True)
    weight = torch.randn(16, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 4, 16, generator=generator)
    ours = rms_norm(x, weight, 1e-6)
    theirs = F.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(torch.autograd.grad(ours, (x, weight), upstream),
                               torch.autograd.grad(theirs, (x, weight), upstream), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_gather_rows_sums_the_gradients_of_copies():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    index = torch.randperm(18, generator=generator)
    inverse = torch.argsort(index)
    plain = x[index // 3]
    assert torch.equal(gather_rows(x, index, inverse, 3), plain)
    upstream = torch.randn(18, 4, dtype=torch.float64, generator=generator)
    (ours,) = torch.autograd.grad(gather_rows(x, index, inverse, 3), x, upstream)
    (theirs,) = torch.autograd.grad(plain, x, upstream)
    torch.testing.assert_close(ours, theirs)
    rows = upstream.requires_grad_()
    torch.testing.assert_close(sum_rows(rows, index, inverse, 3), rows[inverse].view(6, 3, 4).sum(1))
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, index, inverse, 3), (rows,))
    assert sum_rows(rows[:0], index[:0], inverse[:0], 3).shape == (0, 4)


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
@pytest.mark.parametrize("again", [False, True])
def test_the_loss_of_a_linear_layer_is_torchs_with_its_gradients_and_keeps_no_logits_if_told(rows_at_a_time, again,
                                                                                            monkeypatch):
    monkeypatch.setitem(ops.LOGITS_IN_FP32, "cpu", 50 * rows_at_a_time)
    made = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=made, requires_grad=True) for n in (11, 50))
    targets = torch.randint(0, 50, (11,), generator=made)
    theirs = F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        kept = []
        ours = linear_cross_entropy(x, weight, targets, again=again)
    assert ((11, 50) in kept) is not again
    torch.testing.assert_close(ours[0], theirs)
    for retain in (True, False):  # a split backward comes twice
        mine, reference = (torch.autograd.grad(0.3 * loss.sum(), (x, weight), retain_graph=retain)
                           for loss in (ours, theirs))
        for one, other in zip(mine, reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class LikeBlackwell(torch.autograd.Function):
    """Weights [E, K, N] as they are; of a group without rows the gradient is what the memory was."""

    @staticmethod
    def forward(ctx, weights, offsets):
        ctx.save_for_backward(offsets)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        return grad.masked_fill((offsets.diff(prepend=offsets.new_zeros(1)) == 0)[:, None, None], float("nan")), None


def test_a_group_without_rows_has_no_gradient_where_torch_leaves_garbage(monkeypatch):
    made, real = torch.Generator().manual_seed(0), F.grouped_mm
    rows, weights = torch.randn(6, 8, generator=made), torch.randn(3, 8, 5, generator=made, requires_grad=True)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    (wanted,) = torch.autograd.grad(grouped_mm(rows, weights, offsets).sum(), weights)
    monkeypatch.setattr(ops.F, "grouped_mm", lambda a, b, offs: real(a, LikeBlackwell.apply(b, offs), offs=offs))
    monkeypatch.setattr(ops, "_leaves_empty_groups", lambda device: True)
    (found,) = torch.autograd.grad(grouped_mm(rows, weights, offsets).sum(), weights)
    assert torch.equal(found, wanted) and not found[1].any()
    monkeypatch.setattr(ops.F, "grouped_mm", lambda a, b, offs: LikeBlackwell.backward(
        type("", (), {"saved_tensors": (offs,)}), real(a, b, offs=offs))[0])
    assert torch.equal(grouped_mm(rows.mT, rows, offsets)[1], torch.zeros(8, 8))
