"""What torch's pipeline stage is kept from doing: greeting itself, and making buffers before there is a message."""

import torch

from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import layout_of
from tests.orchestrator.parallel.test_grid import SEQ_LEN, SEQUENCES, make_config


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
