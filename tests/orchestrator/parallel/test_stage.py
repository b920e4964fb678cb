"""What torch's pipeline stage is kept from doing: greeting itself, and recomputing for each group of parameters."""

from collections import Counter

import torch

from model.transformer import Block
from orchestrator.config import Recompute
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import layout_of
from tests.orchestrator.parallel.test_grid import SEQ_LEN, SEQUENCES, VOCAB, make_config


def greeted(info: RankInfo) -> list[tuple[int, int]]:
    """(this rank, whom it greets) of a V schedule, in which the middle stages are on one rank."""
    config = make_config(2, 1, 1, "zbv")
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.float32)
    runtime, _ = pipeline._make_runtime(torch.zeros(SEQUENCES, SEQ_LEN + 2, dtype=torch.int64))
    return [(info.rank, op.group_peer) for stage in runtime._stages for op in stage._get_init_p2p_neighbors_ops()]


def test_a_rank_greets_its_neighbours_and_not_itself(ranks):
    found = ranks.run(greeted, world=2)
    assert {pair for pairs in found for pair in pairs} == {(0, 1), (1, 0)}


def recomputed(info: RankInfo) -> list[tuple[int, float]]:
    """The stage of each of this rank's blocks, and how often it ran attention's middle for one microbatch."""
    config, calls = make_config(2, 1, 1, "zbv"), Counter()
    config.layout.recompute = Recompute.selective
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.float32)
    blocks = [(index, module) for index, stage in zip(pipeline.stage_ids, pipeline.stages, strict=True)
              for module in stage.modules() if isinstance(module, Block)]
    for number, (_, block) in enumerate(blocks):
        def counted(*args, attend=block.attention.attend, number=number):
            calls[number] += 1
            return attend(*args)

        block.attention.attend = counted
    tokens = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 2), generator=torch.Generator().manual_seed(0))
    pipeline.train_step(tokens, step_sequences=SEQUENCES)
    return [(index, calls[number] / config.layout.microbatches) for number, (index, _) in enumerate(blocks)]


def test_a_split_backward_recomputes_once_in_either_part(ranks):
    """The first stage, whose input has no gradient, has but one."""
    found = {each for rank in ranks.run(recomputed, world=2) for each in rank}
    assert found == {(0, 2), (1, 3), (2, 3), (3, 3)}
