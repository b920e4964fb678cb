"""bf16 is for the products of forward, and for the gradients that follow from them; weights are cast once a step."""

import pytest
import torch

from model import ops
from model.transformer import Transformer, moe_layers
from orchestrator.config import Config
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import Pipeline, build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import layout_of
from tests.orchestrator.parallel.test_grid import SEQ_LEN, SEQUENCES, TOLERANCE, VOCAB, make_config

TOKENS = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 2), generator=torch.Generator().manual_seed(0))


def build(config: Config, info: RankInfo = RankInfo()) -> Pipeline:
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    return build_pipeline(config, mesh, torch.bfloat16)


def alone(microbatches: int) -> Pipeline:
    config = make_config(1, 1, 1, "1f1b")
    config.layout.microbatches = microbatches
    return build(config)


def gradients(info: RankInfo, config: Config) -> list[tuple]:
    pipeline = build(config, info)
    pipeline.train_step(TOKENS, step_sequences=SEQUENCES)
    pipeline.finish_grads()
    return [(shard.name, shard.grad().clone().numpy()) for shard in pipeline.shards]


def test_a_split_backward_in_bf16_equals_the_one_process_run(ranks):
    """Its graphs, too, share the casts of all microbatches."""
    single, split = make_config(1, 1, 1, "1f1b"), make_config(2, 1, 1, "zbv")
    single.layout.microbatches = split.layout.microbatches
    whole = {name: torch.from_numpy(grad) for name, grad in gradients(RankInfo(), single)}
    for found in ranks.run(gradients, split, world=2):
        for name, grad in found:
            assert (torch.from_numpy(grad) - whole[name]).norm() <= TOLERANCE * whole[name].norm(), name


def test_gradients_are_those_of_a_backward_outside_autocast():
    """Inside, the fp32 products of a router's backward would be in bf16, too."""
    pipeline = alone(1)
    model = Transformer(pipeline.model).train()
    model.load_state_dict(pipeline.stages[0].state_dict())
    for _, moe in moe_layers(model):
        moe.balance_scale = pipeline.model.balance_loss_weight / SEQUENCES
    with torch.autocast("cpu", torch.bfloat16):
        main, deeper = model(TOKENS, TOKENS)[0]
    ((main + pipeline.model.mtp_loss_weight * deeper) / (SEQUENCES * SEQ_LEN)).backward()
    pipeline.train_step(TOKENS, step_sequences=SEQUENCES)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for shard in pipeline.shards:
        assert torch.equal(shard.grad(), expected[shard.name]), shard.name


@pytest.mark.parametrize("kind", ["moe.experts.w13", "attention.wo.weight"])
def test_microbatches_share_one_copy_of_a_weight(kind):
    """What autograd holds of a schedule's microbatches in flight: their graphs, not a copy of the weights each."""
    pipeline, kept = alone(4), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    weight = pipeline.stages[0].get_parameter(f"layers.1.{kind}")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.train_step(TOKENS, step_sequences=SEQUENCES)
    copies = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.dtype == torch.bfloat16
              and tensor.numel() == weight.numel() and is_cast_of(weight, tensor)}
    assert len(copies) == 1
    assert ops._made is None


def is_cast_of(weight: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are a weight's in bf16, transposed or not."""
    cast = weight.detach().to(torch.bfloat16)
    return any(tensor.shape == form.shape and torch.equal(tensor, form) for form in (cast, cast.mT))
