"""Experts on disk against experts in memory; packed weights against the libraries that define them."""

import pytest
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from model.cold_experts import Ahead, ColdExperts, HotExperts, Store, write_store
from model.config import ModelConfig
from model.count import forward_bytes
from model.moe import GroupedExperts, MoE, Router
from model.packed import FORMATS, Room, _torchao, pack, packed_bytes, unpack, unpacking_bytes
from tests.torch_memory import most_allocated

E, D, INNER = 6, 128, 64


@pytest.fixture
def experts() -> GroupedExperts:
    generator, found = torch.Generator().manual_seed(3), GroupedExperts(D, INNER, E)
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return found


def stores(experts: GroupedExperts, folder, form: str = "fp32") -> list[Store]:
    found = []
    for name, weight in experts.named_parameters():
        path = folder / f"{name}-{form}.safetensors"
        write_store(path, weight.detach(), number=E, shape=weight.shape[1:], form=form)
        found.append(Store(path))
    return found


@pytest.mark.parametrize("kept", [0, 2, 100])
def test_experts_on_disk_compute_what_experts_in_memory_do_within_their_limit(experts, tmp_path, kept):
    files = stores(experts, tmp_path)
    each = sum(store.expert_bytes for store in files)
    cold = ColdExperts(0, files, HotExperts(kept * each))
    generator = torch.Generator().manual_seed(4)
    visits = 0
    for _ in range(3):
        counts = torch.randint(0, 4, (E,), generator=generator)
        visits += int((counts > 0).sum())
        x = torch.randn(int(counts.sum()), D, generator=generator)
        weights = torch.rand(len(x), 1, generator=generator)
        torch.testing.assert_close(cold(x, counts, weights), experts(x, counts, weights), atol=1e-5, rtol=1e-5)
        assert cold.hot.bytes <= kept * each
    hits = visits - E if kept >= E else 0  # of two that are kept, each has made room when its turn comes again
    assert (cold.hot.hits, cold.hot.misses) == (hits, visits - hits)
    assert len(cold.hot.kept) == min(kept, E)


def test_experts_on_disk_hold_what_is_said(experts, tmp_path):
    """One expert at a time, which may be every token's: all tokens here choose the same."""
    config = ModelConfig(dim=D, moe_inter_dim=INNER, n_routed_experts=E, n_activated_experts=4, n_shared_experts=0,
                         n_dense_layers=0)
    layer = MoE(config).eval().requires_grad_(False)
    layer.router.gate.weight.zero_()
    files, x = stores(experts, tmp_path), torch.ones(1, 512, D)
    layer.experts = ColdExperts(0, files, HotExperts(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        layer(x)
    expert = sum(store.expert_bytes for store in files)
    around = 3 * 512 * D * 4  # the residual stream, which is not held here
    said = forward_bytes(config, 512, in_turn=True) - around
    assert 0.75 * said < most_allocated(recorded) - expert < said < forward_bytes(config, 512) - around


def test_the_least_recently_used_expert_makes_room(experts, tmp_path):
    files = stores(experts, tmp_path)
    hot = HotExperts(2 * sum(store.expert_bytes for store in files))
    for expert in (0, 1, 0, 2):
        hot.get(0, expert, files)
    assert list(hot.kept) == [(0, 0), (0, 2)] and (hot.hits, hot.misses) == (1, 3)


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_matrix_comes_back_within_its_format(experts, form):
    weight = experts.w13[0].detach()
    data = pack(weight, form)
    assert data.numel() == packed_bytes(*weight.shape, form)
    back = unpack(data, *weight.shape, form, torch.float32)
    worst = {"fp32": 0, "bf16": 2**-8, "fp8": 2**-4, "int4": 1 / 14}[form]
    assert (back - weight).abs().max() <= worst * weight.abs().max() * 1.01
    if form == "bf16":
        assert torch.equal(back, weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_all_that_unpacking_fills_is_in_its_room_and_counted(form, dtype):
    weight, room = torch.randn(256, 512), Room()
    data = pack(weight, form)
    unpack(data, *weight.shape, form, dtype, room)  # tables are made once, and so is the room
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as recorded:
        unpack(data, *weight.shape, form, dtype, room)
    assert most_allocated(recorded) < weight.numel() / 4, "but for scales"
    assert sum(tensor.nbytes for tensor in room.made.values()) == unpacking_bytes(*weight.shape, form, dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_one_room_takes_one_matrix_after_the_other_under_inference_mode_and_not(experts, form):
    room = Room()
    with torch.inference_mode():
        first = [unpack(pack(weight.detach(), form), *weight.shape, form, torch.float32, room).clone()
                 for weight in (experts.w13[0], experts.w2[0])]
    again = [unpack(pack(weight.detach(), form), *weight.shape, form, torch.float32, room)
             for weight in (experts.w13[1], experts.w2[1], experts.w13[0], experts.w2[0])]
    assert all(torch.equal(one, other) for one, other in zip(first, again[2:], strict=True))
    assert form == "fp32" or again[0] is again[2]


def test_a_matrix_of_any_size_comes_back_from_eight_bits():
    weight = torch.arange(15.0).view(3, 5)
    torch.testing.assert_close(unpack(pack(weight, "fp8"), 3, 5, "fp8", torch.float32), weight, rtol=2**-4, atol=0.01)


def test_four_bits_are_those_of_torchao(experts):
    pytest.importorskip("torchao")
    ao, weight, block = _torchao(), experts.w2[1].detach(), (1, 64)
    scale, zero = ao.choose_qparams_affine(weight, ao.MappingType.ASYMMETRIC, block, torch.uint8, quant_min=0,
                                           quant_max=15, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int32)
    values = ao.quantize_affine(weight, block, scale.float(), zero, torch.uint8, quant_min=0, quant_max=15)
    theirs = ao.dequantize_affine(values, block, scale.float(), zero, torch.uint8, quant_min=0, quant_max=15)
    assert torch.equal(unpack(pack(weight, "int4"), *weight.shape, "int4", torch.float32), theirs)
    assert packed_bytes(1024, 1024, "int4") * 8 / 2**20 == 4.375


def test_a_store_is_a_safetensors_file(experts, tmp_path):
    store = stores(experts, tmp_path, "bf16")[0]
    with safe_open(tmp_path / "w13-bf16.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == [str(i) for i in range(E)] and file.metadata()["format"] == "bf16"
        assert torch.equal(file.get_tensor("4"), store.read(4))


def test_a_store_that_lost_its_end_is_refused(experts, tmp_path):
    stores(experts, tmp_path, "bf16")
    path = tmp_path / "w13-bf16.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"w13-bf16\.safetensors: is not whole; delete"):
        Store(path)


def test_reading_ahead_changes_nothing_but_when_bytes_are_read(experts, tmp_path):
    config = ModelConfig(dim=D, n_routed_experts=E, n_activated_experts=2, moe_inter_dim=INNER)
    files, asked = stores(experts, tmp_path), []
    cold, following = (ColdExperts(layer, files, HotExperts(0)) for layer in (0, 1))
    following.expect = asked.extend
    router = Router(config).eval()
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(1))
    cold.ahead = Ahead(following, router)
    x, counts = torch.randn(4, D, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 0, 2, 0, 1, 0])
    weights = torch.ones(4, 1)
    torch.testing.assert_close(cold(x, counts, weights), experts(x, counts, weights), atol=1e-5, rtol=1e-5)
    assert set(asked) == set(router(x[None])[0].indices.flatten().tolist())
