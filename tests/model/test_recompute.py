"""Selective recompute: the same gradients bit for bit from fewer bytes, and no product or core twice that need not."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import GraphExecGroup

from model import ops
from model.config import Attention, ModelConfig, QKNorm
from model.fp8 import to_fp8
from model.quantize import Quantized
from model.recompute import CORES, keep_casts
from model.transformer import Transformer
from orchestrator.choices import Recompute
from tests.torch_memory import left_behind

SMALL = {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_dense_layers": 1, "inter_dim": 160, "n_heads": 4,
         "n_mtp_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "moe_inter_dim": 48, "n_shared_experts": 1}
MLA = ModelConfig(**SMALL, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
GQA = ModelConfig(**SMALL, attention=Attention.gqa, n_kv_heads=2, head_dim=16, qk_norm=QKNorm.head)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls["core" if operator in CORES else operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def trained(config: ModelConfig, precision: str, *, keep_less: bool) -> tuple[list, int, Counter]:
    """Loss and gradients of one step, bytes kept for its backward, calls of forward and backward together."""
    torch.manual_seed(0)
    network = Transformer(config).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for buffer in network.buffers():
        buffer.zero_()
    if precision == "fp8":
        to_fp8(network)
    if keep_less:
        network.keep_less()
    tokens = torch.randint(0, config.vocab_size, (2, 34))
    with Counted() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, size = left_behind(lambda: network(tokens, tokens).sum())
        loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters())], size, counted.calls


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("config", [MLA, GQA], ids=["MLA", "GQA"])
def test_selective_recompute_has_the_same_gradients_from_fewer_bytes(config, precision):
    plain, whole, _ = trained(config, precision, keep_less=False)
    again, less, _ = trained(config, precision, keep_less=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    print(f"{precision}: {less / whole:.3f} of {whole} bytes")
    assert less < 0.8 * whole


def test_weights_are_cast_once_for_all_microbatches_whose_backward_recomputes_in_another_thread():
    """As a GPU's does, in autograd's own."""
    network, tokens = Transformer(MLA).train(), torch.randint(0, 96, (2, 34))
    network.keep_less()
    with ThreadPoolExecutor(1) as other, torch.autocast("cpu", torch.bfloat16):
        other.submit(keep_casts, torch.device("cpu")).result()
        calls = []
        for _ in range(3):
            with Counted() as counted:
                loss = network(tokens, tokens).sum()
            calls.append(counted.calls["_to_copy"])
            other.submit(loss.backward).result()
    assert calls[0] > calls[1] == calls[2]


@pytest.mark.parametrize("config, per_block", [(MLA, 2), (GQA, 0)], ids=["MLA", "GQA"])
def test_products_other_than_up_projections_and_heads_and_the_core_run_once(config, per_block):
    """MLA's up-projections of queries, and of keys and values, run again, and what makes the logits."""
    plain, again = (trained(config, "fp32", keep_less=less)[2] for less in (False, True))
    blocks = config.n_layers + config.n_mtp_layers
    assert again["core"] == plain["core"] == blocks
    assert again["mm"] - plain["mm"] == per_block * blocks + 1 + config.n_mtp_layers
    assert again["_grouped_mm"] == plain["_grouped_mm"]


@pytest.mark.parametrize("how", Recompute)
def test_a_weight_is_quantised_once_for_all_microbatches(how):
    network, tokens = Transformer(MLA).train(), torch.randint(0, 96, (2, 34))
    to_fp8(network)
    network.recompute = how is Recompute.full
    if how is Recompute.selective:
        network.keep_less()
    with ops.weights_kept():
        made = []
        for _ in range(3):
            network(tokens, tokens).sum().backward()
            made.append(sum(t.nbytes for _, form in ops._made.values() if isinstance(form, Quantized) for t in form))
    assert made[0] == made[1] == made[2] > 0


@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_backward_in_two_parts_does_no_product_twice_but_what_is_made_again(precision, less):
    """Of products with weights; attention's core and the sums over tokens are no part of the second."""
    counted = []
    for split in (False, True):
        torch.manual_seed(0)
        stage = Transformer(MLA, layers=range(1, 2)).train()
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if precision == "fp8":
            to_fp8(stage)
        if less:
            stage.keep_less()
        x, tokens = torch.randn(2, 32, 64, requires_grad=True), torch.randint(0, 96, (2, 34))
        loss = stage(x, tokens).sum()
        with Counted() as backward:
            if split:
                _, groups = stage_backward_input([loss], None, [x], stage.parameters())
                with GraphExecGroup():
                    stage_backward_weight(stage.parameters(), groups)
            else:
                loss.backward()
        counted.append(backward.calls)
    whole, parts = counted
    blocks, heads = 1 + MLA.n_mtp_layers, 1 + MLA.n_mtp_layers
    assert parts["mm"] - whole["mm"] == (2 * blocks + heads if less else 0)
    assert parts["_grouped_mm"] == whole["_grouped_mm"] > 0
