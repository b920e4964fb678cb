"""FP8 tensor-core kernels: what they compute, compiled where there is a GPU, by Triton's interpreter elsewhere
(conftest.py); and that they compile for Ada, Hopper and Blackwell into FP8 tensor-core instructions. Neither says how
fast they are."""

import itertools
import math
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model import fp8, quantize
from model.quantize import Quantized
from model.transformer import Transformer
from orchestrator.compose import compose_config

pytest.importorskip("triton", reason="Triton is there on Linux alone")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 5e-3 if DEVICE.type == "cuda" else 1e-6
"""Of the largest value: tensor cores keep some 14 bits of a sum of 128, and an emulated product may end in bf16."""


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """The kernels in place of emulated products."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 tensor cores")
    from model import fp8_kernels

    monkeypatch.setattr(fp8, "on_tensor_cores", lambda device: True)
    return fp8_kernels


def random(*shape: int, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=made) * 10.0 ** torch.randint(-3, 3, (*shape[:-1], 1), generator=made)
    return values.to(DEVICE)


def same(ours: Quantized, theirs: Quantized) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


COUNTS = [None, [150, 0, 50], [0, 0, 200], [1, 128, 71]]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_operands_are_quantised_to_the_same_bits(kernels, power_of_two):
    how = {"power_of_two": power_of_two}
    for x in (random(70, 300, seed=1), random(3, 128, seed=2), random(33, 7, seed=3).bfloat16(),
              torch.zeros(2, 128, device=DEVICE)):
        for floor in (quantize.AMAX_FLOOR, quantize.GRAD_AMAX_FLOOR):
            assert same(kernels.act_quant(x, floor=floor, **how), quantize.act_quant(x, floor=floor, **how))
    for weight in random(260, 300, seed=4), random(3, 130, 128, seed=5):
        wanted = quantize.weight_quant(weight, **how)
        assert same(kernels.weight_quant(weight, **how), wanted)
        assert same(kernels.weight_quant(weight, transposed=True, **how), Quantized(*(t.mT for t in wanted)))
    x, counts = random(200, 100, seed=6), torch.tensor([150, 0, 50], device=DEVICE)
    wanted = quantize.quant_over_tokens(x, *quantize.token_tiles(200, counts), **how)
    found = kernels.quant_over_tokens(x, kernels._tiles(200, counts, x.device)[0], **how)
    assert same(found, Quantized(wanted.data.flatten(0, 1).mT, wanted.scale.flatten(0, 1)))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_tile_with_what_is_not_finite_is_not_a_number(kernels, power_of_two):
    x = torch.ones(3, 256, device=DEVICE)
    x[0, 3], x[1, 200] = math.inf, math.nan
    back = quantize.act_dequant(kernels.act_quant(x, power_of_two=power_of_two))
    assert back[0, :128].isnan().all() and back[1, 128:].isnan().all() and back.isfinite().sum() == 4 * 128


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("inputs, outputs", [(300, 70), (64, 260)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_products_are_those_of_dequantised_operands(kernels, monkeypatch, counts, inputs, outputs, power_of_two):
    counts = None if counts is None else torch.tensor(counts, device=DEVICE)
    experts = () if counts is None else (3,)
    x, grad = random(200, inputs, seed=1), random(200, outputs, seed=2)
    weight = random(*experts, outputs, inputs, seed=3)

    def products() -> list[torch.Tensor]:
        how = {"power_of_two": power_of_two, "exact": power_of_two}
        rest = counts, power_of_two, power_of_two, torch.float32
        return [fp8._product(fp8._quantized(x, power_of_two), weight, counts, torch.float32, **how),
                fp8._input_gradient(grad, weight, *rest), fp8._weight_gradient(grad, x, *rest)]

    found = products()
    monkeypatch.setattr(fp8, "on_tensor_cores", lambda device: False)
    for one, wanted in zip(found, products(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


def test_no_rows_give_no_outputs_and_no_gradient(kernels):
    counts, nothing = torch.tensor([0, 0], device=DEVICE), torch.empty(0, 64, device=DEVICE)
    weight = kernels.weight_quant(random(2, 32, 64, seed=0))
    assert kernels.rows_product(kernels.act_quant(nothing), weight, counts, torch.bfloat16).shape == (0, 32)
    assert not kernels.weight_gradient(nothing, nothing, counts, False, False, torch.float32).any()


def step(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(tokens, tokens).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_whole_steps_loss_and_gradients_are_the_emulated_ones(kernels, monkeypatch):
    config = compose_config(["model=tiny", "model.n_layers=2"]).model
    made = torch.Generator().manual_seed(0)
    model = Transformer(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=made)
    fp8.to_fp8(model.to(DEVICE))
    tokens = torch.randint(0, config.vocab_size, (1, 48), generator=made).to(DEVICE)
    loss, found = step(model, tokens)
    monkeypatch.setattr(fp8, "on_tensor_cores", lambda device: False)
    emulated, wanted = step(model, tokens)
    torch.testing.assert_close(loss, emulated, rtol=max(1e-5, TOLERANCE / 5), atol=0)
    for name, grad in wanted.items():
        # Where the last bit of a sum differs, a value may be rounded to the next of E4M3's, a sixteenth away.
        difference = (found[name] - grad).norm() / (grad.norm() + 1e-12)
        assert difference < max(0.01, 10 * TOLERANCE), name


def test_the_check_at_the_start_passes_where_a_step_first_asks_for_it(kernels):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        kernels.check(DEVICE)


@pytest.mark.parametrize("product, call, what", [
    ("rows_product", 0, "rows"), ("rows_product", 1, "gradients"), ("weight_gradient", 0, "tokens")])
def test_the_check_at_the_start_refuses_wrong_products(kernels, monkeypatch, product, call, what):
    right, calls = getattr(kernels, product), itertools.count()
    monkeypatch.setattr(kernels, product, lambda *given: (1.01 if next(calls) == call else 1) * right(*given))
    with pytest.raises(ArithmeticError, match=f"a product over {what} is off by"):
        kernels.check(DEVICE)


@pytest.mark.parametrize("kernel, fails", [
    ("weight_quant", lambda weight, **how: how["power_of_two"]),
    ("weight_quant", lambda weight, **how: how.get("transposed", False)),
    ("act_quant", lambda x, **how: x.dtype == torch.bfloat16),
    ("rows_product", lambda rows, weight, counts, dtype: dtype == torch.bfloat16),
    ("rows_product", lambda rows, weight, counts, dtype: counts is None)])
def test_the_check_at_the_start_meets_every_kind_of_a_kernel(kernels, monkeypatch, kernel, fails):
    right = getattr(kernels, kernel)

    def called(*given, **how):
        if fails(*given, **how):
            raise RuntimeError("does not compile")
        return right(*given, **how)

    monkeypatch.setattr(kernels, kernel, called)
    with pytest.raises(RuntimeError, match="does not compile"):
        kernels.check(DEVICE)


@pytest.mark.parametrize("failure", [ArithmeticError("off by 3"), ImportError("triton")], ids=repr)
def test_a_device_whose_check_fails_emulates_and_says_why(monkeypatch, failure):
    def check(device):
        raise failure

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8, "_kernels", lambda: SimpleNamespace(check=check))
    fp8.why_emulated.cache_clear()
    try:
        assert not fp8.on_tensor_cores(torch.device("cuda:7"))
        assert fp8.why_emulated(torch.device("cuda:7")) == f"{type(failure).__name__}: {failure}"
    finally:
        fp8.why_emulated.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_fp8_tensor_cores_uses_them(kernels, monkeypatch):
    monkeypatch.undo()
    assert fp8.why_emulated(torch.device("cuda", torch.cuda.current_device())) is None


def test_the_benchmarks_call_of_torchs_own_product_has_the_layout_that_it_wants():
    """By torch's checks of shapes and strides, which need no GPU."""
    from benchmarks.fp8_products import SHAPES, scaled_mm

    for outputs, inputs in SHAPES.values():
        x, weight = (torch.empty(rows, inputs, device="meta", dtype=quantize.E4M3) for rows in (256, outputs))
        x_scale, weight_scale = (torch.empty(rows, inputs // 128, device="meta") for rows in (256, outputs // 128))
        assert scaled_mm(x, x_scale, weight, weight_scale).shape == (256, outputs)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model import fp8_kernels, quantize_kernels
CONSTANTS = {"BLOCK": fp8_kernels.BLOCK, "TILE": 128, "POWER_OF_TWO": True, "TRANSPOSED": True,
             "ROWS": quantize_kernels.ROWS, "COLUMNS": quantize_kernels.COLUMNS}
KINDS = dict.fromkeys(("rows", "weight", "left", "right", "data"), "*fp8e4nv") | dict.fromkeys(
    ("source", "expert", "ends"), "*i32") | {"x": "*bf16", "scale": "*fp32", "floor": "fp32"}

def compile(kernel, options, **kinds):
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    known = KINDS | kinds
    kinds = {name: known.get(name, "*fp32" if name.endswith("_scale") else "i32") for name in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values())
               if kind not in ("constexpr", "fp32")}  # as pointers and sizes are
    built = triton.compile(ASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", int(sys.argv[1]), 32),
                           options=options)
    assert built.asm["cubin"] and built.metadata.shared <= int(sys.argv[3]) * 1024, (kernel, built.metadata.shared)
    return built

products = {"num_warps": fp8_kernels.WARPS, "num_stages": fp8_kernels.STAGES}
for kernel, out in (fp8_kernels._rows_kernel, "*bf16"), (fp8_kernels._tokens_kernel, "*fp32"):
    assert sys.argv[2] in compile(kernel, products, out=out).asm["ptx"], kernel
compile(quantize_kernels._act_kernel, {}, rows="i32")
compile(quantize_kernels._weight_kernel, {}, weight="*fp32", rows="i32")
compile(quantize_kernels._token_kernel, {}, x="*fp32")
"""


@pytest.mark.parametrize("capability, instruction, shared_kib", [
    (89, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 99),
    (90, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", 227),
    (100, "tcgen05.mma.cta_group::1.kind::f8f6f4", 227)])
def test_kernels_compile_into_fp8_tensor_core_instructions(tmp_path, capability, instruction, shared_kib):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability), instruction, str(shared_kib)],
                          capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
