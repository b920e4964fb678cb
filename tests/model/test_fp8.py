"""Quantisation against DeepSeek's published definition and transformers' helpers, bit for bit; products and gradients
against products of what was quantised, written out."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import fp8
from model.config import ModelConfig
from model.fp8 import Fp8FeedForward, Fp8GroupedExperts, Fp8Linear, to_fp8
from model.moe import FeedForward, GroupedExperts
from model.quantize import (
    act_dequant,
    act_quant,
    pack,
    quant_over_tokens,
    unpack,
    weight_dequant,
    weight_quant,
    widened,
)
from model.transformer import Transformer

SHAPES = [(3, 256), (5, 128), (2, 2, 300), (1, 7), (0, 256)]


def test_every_e4m3_value_is_widened_exactly():
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = widened(data)
    torch.testing.assert_close(found, data.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() | found.isnan(), data.float().signbit() | found.isnan())
    assert torch.equal(widened(data[:64].view(8, 8).mT), found[:64].view(8, 8).mT)


def random(*shape: int, seed: int = 0, spread: float = 8.0) -> torch.Tensor:
    """Normal numbers whose magnitude varies from row to row by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (spread * (torch.rand(*shape[:-1], 1, generator=generator) - 0.5))
    return torch.randn(*shape, generator=generator) * magnitude


def published_act_quant(x: torch.Tensor, *, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's act_quant_kernel (inference/kernel.py), tile by tile on one flat row at a time; the scale's
    exponent in double precision, so that the logarithm of a power of two is whole."""
    data, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), []
    for row, out in zip(x.reshape(-1, x.shape[-1]), data.view(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), 128):
            tile = row[start : start + 128].float()
            amax = torch.maximum(tile.abs().max(), torch.tensor(1e-4))
            s = amax / 448.0
            if ue8m0:
                s = torch.tensor(2.0 ** math.ceil(math.log2(s.item())))
            out[start : start + 128] = (tile / s).to(torch.float8_e4m3fn)
            scales.append(s)
    return data, torch.tensor(scales)


def special(*, dtype: torch.dtype) -> torch.Tensor:
    """Tiles of zeros, of one huge or one tiny value, of exact powers of two, and at the edges of E4M3."""
    x = torch.zeros(8, 128)
    x[1, 5], x[2, 0], x[3, :4] = 3e38, 1e-30, torch.tensor([448.0, -448.0, 0.001953125, 0.0009765625])
    x[4], x[5, 7], x[6], x[7] = 2.0 ** -9, -1e-4, torch.linspace(-448, 448, 128), 1.75 * 2.0**20
    return x.to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_act_quant_is_the_published_one_bit_for_bit(power_of_two, dtype):
    for x in [random(*shape).to(dtype) for shape in SHAPES] + [special(dtype=dtype)]:
        found = act_quant(x, power_of_two=power_of_two)
        data, scale = published_act_quant(x, ue8m0=power_of_two)
        assert torch.equal(bits(found.data), bits(data)) and torch.equal(found.scale.flatten(), scale)
        assert found.scale.shape == (*x.shape[:-1], -(-x.shape[-1] // 128))


class DividesAsCuda(TorchDispatchMode):
    """Division by a number is multiplication by its reciprocal (ATen's BinaryDivTrueKernel.cu), as by a tensor of the
    CPU's that has one element."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and not isinstance(args[1], torch.Tensor):
            return args[0] * (torch.ones(()) / args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_are_to_the_last_bit_the_same_where_division_by_a_number_is_not(power_of_two):
    x, how = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)), {"power_of_two": power_of_two}
    kinds = act_quant, weight_quant, lambda x, **how: quant_over_tokens(x, None, 2, **how)
    wanted = [quant(x, **how) for quant in kinds]
    with DividesAsCuda():
        assert (torch.ones(1) * 169 / 13 != 13).all()
        found = [quant(x, **how) for quant in kinds]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))


def test_what_is_not_finite_does_not_pass_for_a_number():
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.ones(1, 256)
        x[0, 3] = bad
        for power_of_two in (False, True):
            back = act_dequant(act_quant(x, power_of_two=power_of_two))
            assert back[0, :128].isnan().all() and torch.equal(back[0, 128:], torch.ones(128))
        assert unpack(pack(x), 256)[0, :128].isnan().all(), "on its way to another rank"


def test_weight_quant_is_that_of_transformers_bit_for_bit():
    """With scales that are powers of two, where its multiplication by the reciprocal is exact as well."""
    helpers = pytest.importorskip("transformers.integrations.finegrained_fp8")
    quantizer = type("Quantizer", (), {"quantization_config": type("Config", (), {
        "weight_block_size": (128, 128), "scale_fmt": "ue8m0", "get": None})()})
    weight = random(384, 256)
    theirs = helpers.Fp8Quantize(quantizer)._quantize_one("a.weight", weight)
    ours = weight_quant(weight, power_of_two=True)
    assert torch.equal(bits(ours.data), bits(theirs["a.weight"]))
    assert torch.equal(ours.scale, theirs["a.weight_scale_inv"].float())


@pytest.mark.parametrize("shape", [(128, 256), (300, 200), (5, 130), (2, 140, 256)])
def test_weight_blocks_are_quantised_by_their_own_amax_and_come_back_as_in_transformers(shape):
    helpers = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = random(*shape)
    found = weight_quant(weight)
    assert found.scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for i in range(found.scale.shape[-2]):
        for j in range(found.scale.shape[-1]):
            block = (..., slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale = weight[block].abs().amax((-1, -2)).clamp(min=1e-4) / 448
            assert torch.equal(found.scale[..., i, j], scale)
            assert torch.equal(bits(found.data[block]),
                               bits((weight[block] / scale[..., None, None]).to(torch.float8_e4m3fn)))
    theirs = helpers._dequantize_fp8_weight(found.data, found.scale, [128, 128], torch.float32)
    assert torch.equal(weight_dequant(found), theirs)
    # E4M3 has three bits behind the point: half a step of the largest binade is 1/28 of the amax at most.
    assert ((weight_dequant(found) - weight).abs() <= weight.abs().amax() / 28 + 1e-6).all()


def over_tokens(x: torch.Tensor) -> torch.Tensor:
    """Quantised in tiles of 128 tokens, by the published function on the transposed matrix."""
    return act_dequant(act_quant(x.T.contiguous(), floor=1e-30)).T


def test_the_three_products_of_a_linear_layer_are_those_of_its_quantised_operands():
    layer = nn.Linear(192, 144)
    x = random(2, 150, 192, spread=2).requires_grad_()
    grad = random(2, 150, 144, seed=1, spread=2) * 1e-7
    layer.__class__ = Fp8Linear
    out = layer(x)
    out.backward(grad)
    weight, rows = weight_dequant(weight_quant(layer.weight)), act_dequant(act_quant(x)).double()
    torch.testing.assert_close(out.double(), rows @ weight.double().T + layer.bias, rtol=1e-5, atol=1e-4)
    grad_x = act_dequant(act_quant(grad, floor=1e-30)).double() @ weight.double()
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-12)
    grad_weight = over_tokens(grad.flatten(0, 1)).double().T @ over_tokens(rows.flatten(0, 1).float()).double()
    torch.testing.assert_close(layer.weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("dim, inner", [(96, 40), (90, 37)])
def test_experts_are_as_many_feed_forwards_whose_tiles_end_with_their_tokens(dim, inner):
    counts = [130, 0, 1, 256]
    x, grad = random(387, dim, spread=2), random(387, dim, seed=3, spread=2) * 1e-7
    experts = GroupedExperts(dim, inner, 4)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    experts.__class__, experts.power_of_two = Fp8GroupedExperts, True
    rows = x.clone().requires_grad_()
    out = experts(rows, torch.tensor(counts), torch.ones(387, 1))
    out.backward(grad)
    found = [out.split(counts), rows.grad.split(counts), experts.w13.grad, experts.w2.grad]
    for e, (mine, part) in enumerate(zip(x.split(counts), grad.split(counts), strict=True)):
        single, mine = FeedForward(dim, inner), mine.clone().requires_grad_()
        single.w13.weight, single.w2.weight = (nn.Parameter(w[e].detach().clone()) for w in experts.parameters())
        single.__class__, single.w13.__class__ = Fp8FeedForward, Fp8Linear
        single.power_of_two = single.w13.power_of_two = True
        expected = single(mine)
        expected.backward(part)
        for ours, theirs in zip([group[e] for group in found],
                                [expected, mine.grad, single.w13.weight.grad, single.w2.weight.grad], strict=True):
            largest = theirs.abs().max().item() if len(theirs) else 0.0
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * largest)


def test_products_keep_their_inputs_in_fp8_and_a_swiglu_its_own_alone():
    kept = []
    layer = FeedForward(256, 128)
    layer.__class__, layer.w13.__class__ = Fp8FeedForward, Fp8Linear
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        layer(torch.ones(2, 5, 256, requires_grad=True))
    assert sorted(kept, key=str) == sorted([(torch.float8_e4m3fn, (10, 256)), (torch.float32, (10, 2))] * 2, key=str)


def test_a_small_gradient_is_quantised_like_a_large_one():
    """The floor of DeepSeek's act_quant would flush a mean loss's gradients; scaling by 2^-40 must change nothing."""
    grads = []
    for factor in (1.0, 2.0**-40):
        layer, x = Fp8Linear(128, 128, bias=False), random(130, 128, spread=2).requires_grad_()
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        layer(x).backward(random(130, 128, seed=1, spread=2) * factor)
        grads.append((x.grad / factor, layer.weight.grad / factor))
    assert all(torch.equal(small, large) for large, small in zip(*grads, strict=True))


def test_what_was_sent_in_fp8_is_quantised_again_without_a_further_error():
    rows = unpack(pack(random(64, 300)), 300)
    assert torch.equal(act_dequant(act_quant(rows, power_of_two=True, floor=1e-30)), rows)
    assert torch.equal(unpack(pack(rows), 300), rows)


def test_every_product_of_a_block_is_in_fp8_and_nothing_else():
    config = ModelConfig(q_lora_rank=16, n_mtp_layers=1)
    with torch.device("meta"):
        model = Transformer(config)
    names = list(model.state_dict())
    to_fp8(model)
    assert list(model.state_dict()) == names
    kinds = (nn.Linear, FeedForward, GroupedExperts)
    plain = {name for name, module in model.named_modules() if type(module) in kinds}
    gates = {f"layers.{i}.moe.router.gate" for i in range(1, 4)} | {"mtp.0.block.moe.router.gate"}
    assert plain == gates | {"lm_head", "mtp.0.proj"}
    assert model.layers["0"].attention.wo.power_of_two and not model.layers["0"].attention.wq_a.power_of_two


@pytest.mark.parametrize("experts", [False, True])
def test_with_scales_that_are_powers_of_two_products_in_bf16_are_those_in_fp32(experts, monkeypatch):
    """Up to the rounding of their results: what GPUs do, here on a CPU."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(fp8, "product_dtype", lambda device, exact, dtype=dtype: exact and dtype)
        layer = GroupedExperts(128, 64, 2) if experts else nn.Linear(128, 64, bias=False)
        layer.__class__, layer.power_of_two = Fp8GroupedExperts if experts else Fp8Linear, True
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        x = random(140, 128, spread=2)
        out = fp8._Product.apply(x, layer.w13 if experts else layer.weight,
                                       torch.tensor([100, 40]) if experts else None, True, True)
        out.sum().backward()
        found.append([out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    for wide, narrow in zip(*found, strict=True):
        assert torch.allclose(wide, narrow.float(), rtol=2**-7)
