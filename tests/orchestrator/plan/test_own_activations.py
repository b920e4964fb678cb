"""Predicted bytes against what torch allocates on a CPU, component by component, within 5%: parameters, gradients and
optimizer state by their storage, activations by the tensors that autograd saves, exchanges by what they are given."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model import count, ops
from model.config import Attention, ModelConfig, QKNorm
from model.quantize import Quantized
from orchestrator.config import Config
from orchestrator.parallel.dispatch import AllToAllDispatcher
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.activations import block_bytes, head_bytes
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.keeping import own
from orchestrator.plan.layout import layout_of
from orchestrator.plan.memory import GIB, memory_gib, state_bytes
from orchestrator.plan.own_activations import exchange_bytes
from orchestrator.plan.workload import Workload
from orchestrator.train.optim import build_optimizer, clip_and_step, moments

SEQUENCES, SEQ_LEN = 2, 128
MLA = ModelConfig(vocab_size=300, dim=192, n_layers=3, n_dense_layers=1, inter_dim=320, n_heads=4, q_lora_rank=48,
                  moe_inter_dim=96, n_routed_experts=4, n_mtp_layers=1, balance_loss_weight=1e-3)
EQUAL = replace(MLA, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64)
NORMED = replace(MLA, attention=Attention.gqa, n_kv_heads=2, qk_norm=QKNorm.head, n_mtp_layers=0)
DENSE = ModelConfig(vocab_size=300, dim=192, n_layers=2, n_dense_layers=2, inter_dim=320, attention=Attention.gqa,
                    n_kv_heads=4, n_routed_experts=0, n_shared_experts=0, n_activated_experts=0, moe_inter_dim=0,
                    expert_bias=False)


class Exchanged(TorchDispatchMode):
    """Bytes that all-to-alls of rows were given and gave back."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "c10d::alltoall_base_" and args[0].dim() == 2:
            self.total += args[0].nbytes + args[1].nbytes
        elif func._schema.name == "_c10d_functional::all_to_all_single":
            self.total += args[0].nbytes + out.nbytes
        return out


def is_cast_parameter(tensor: torch.Tensor) -> bool:
    node, steps = tensor.grad_fn, 0
    while node is not None and steps < 4 and len(node.next_functions) == 1 and node.name() != "EmbeddingBackward0":
        node, steps = node.next_functions[0][0], steps + 1
    return tensor.dtype == torch.bfloat16 and type(node).__name__ == "AccumulateGrad"


def allocated(info: RankInfo, model: ModelConfig, precision: str) -> dict[str, float]:
    config = Config(model=model)
    config.precision.fp8 = precision == "fp8"
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = build_optimizer(pipeline.shards, config.optim,
                                moments_dtype=torch.bfloat16 if precision == "fp8" else torch.float32)
    values = [shard.value for shard in pipeline.shards]
    ours = {value.untyped_storage().data_ptr() for value in values}
    saved, made = {}, {}

    def pack(tensor):
        made.update(ops._made)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved.setdefault(storage.data_ptr(), (storage.nbytes(), is_cast_parameter(tensor), tensor))
        return tensor

    tokens = torch.randint(0, model.vocab_size, (SEQUENCES, SEQ_LEN + 1 + model.n_mtp_layers),
                           generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.train_step(tokens, step_sequences=SEQUENCES)
    eight_bit = [part.nbytes for _, form in made.values() if isinstance(form, Quantized) for part in form]
    found = {"weights": sum(size for size, cast, _ in saved.values() if cast) + sum(value.nbytes for value in values)
                        + sum(eight_bit),
             "activations": sum(size for size, cast, _ in saved.values() if not cast),
             "gradients": sum(shard.grad().nbytes for shard in pipeline.shards)}
    clip_and_step(optimizer, pipeline.shards, norm=1.0, optim=config.optim, lr=1e-3)
    found["moments"] = sum(m.nbytes for shard in pipeline.shards for m in moments(optimizer, shard).values())
    found["communication"] = exchanged(pipeline, precision) if model.n_routed_experts else 0.0
    return found


def exchanged(pipeline, precision: str) -> float:
    """One MoE layer's exchanges, to a group of one rank: as many rows as tokens and choices."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        moe = pipeline.stages[0].layers["1"].moe
        moe.dispatcher = AllToAllDispatcher(dist.group.WORLD, pipeline.model.n_routed_experts, fp8=precision == "fp8")
        with Exchanged() as mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            moe(torch.randn(SEQUENCES, SEQ_LEN, pipeline.model.dim, generator=torch.Generator().manual_seed(0)))
        return mode.total
    finally:
        dist.destroy_process_group()


def planned(model: ModelConfig, precision: str) -> dict[str, float]:
    """The same by the planner."""
    work = Workload(model, catalogue()["cpu"], SEQ_LEN, SEQUENCES, 1, 1, 1, "1f1b", 1, dtype=precision,
                    keeping=own(precision, cpu=True))
    blocks = sum(block_bytes(work, model.is_moe(layer)) for layer in range(model.n_layers + model.n_mtp_layers))
    state = state_bytes(work, count.parameters(model, mtp=True).total, 0)
    return {"weights": memory_gib(work)["weights"] * GIB, "activations": blocks + head_bytes(work),
            "gradients": state["gradients"], "moments": state["moments"],
            "communication": exchange_bytes(work) if model.n_routed_experts else 0.0}


@pytest.mark.parametrize("model", [MLA, EQUAL, NORMED, DENSE], ids=["mla", "equal heads", "normed", "dense"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_predicted_bytes_are_what_torch_allocates(model, precision):
    found, predicted = allocated(RankInfo(), model, precision), planned(model, precision)
    assert predicted.keys() == found.keys()
    for name, size in predicted.items():
        print(f"{precision} {name}: predicted over allocated {size / found[name] - 1 if size else 0:+.1%}")
        assert size == pytest.approx(found[name], rel=0.05), name
