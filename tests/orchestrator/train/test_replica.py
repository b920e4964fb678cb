"""Copies of the ranks' state in memory, on real gloo ranks."""

import time
from dataclasses import replace

import pytest
import torch

from orchestrator.errors import NotTrustworthy
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank
from orchestrator.train.replica import Buddies, MemoryLoader, Replica, Replicas, buddy_shift, checksum
from tests.orchestrator.train.runs import make_config, run


def train_with_a_laggard(info: RankInfo, config) -> list[tuple[int, int]]:
    """Rank 1 is late for every stage of an exchange; what this rank holds at the end."""
    original, replicas = Buddies.advance, Replicas()

    def advance(self):
        if self.rank == 1 and self._packing is not None:
            self._packing.result()
            time.sleep(0.5)
        original(self)

    Buddies.advance = advance
    try:
        run_rank(config, info, control=Control(), placed_at=time.time(), replicas=replicas)
    finally:
        Buddies.advance = original
    return replicas.held()


@pytest.mark.parametrize("steps, kept", [(3, []), (4, [(0, 2), (1, 2)])])
def test_no_rank_leaves_in_the_middle_of_an_exchange(ranks, text, tmp_path, steps, kept):
    config = make_config(text, tmp_path, train__steps=steps, checkpoint__memory_every=2, train__validate_every=0,
                         checkpoint__every=0)
    config.layout.dp = config.layout.ep = 2
    assert run(ranks, train_with_a_laggard, config) == [kept, kept]


@pytest.mark.parametrize("at", [0, 40, 47, 50])  # in a word, in the last whole one, in what is left
def test_a_copy_whose_memory_was_damaged_is_refused(at):
    data = torch.randint(0, 256, (51,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    replica = Replica(3, 7, data, checksum(data))
    replica.check()
    data[at] ^= 16
    with pytest.raises(NotTrustworthy, match="rank 3's state after step 7 is damaged"):
        replica.check()
    with pytest.raises(NotTrustworthy, match="is damaged"):
        MemoryLoader(replica)


@pytest.mark.parametrize("nodes, shift", [
    ([0, 0, 1, 1], 2), ([0, 0, 1, 2], 2), ([0, 1, 2, 3], 1), ([0, 0, 0, 0], 1), ([0, 0, 0, 1], 1),
    ([0] * 8 + [1] * 8, 8), ([0] * 8 + [1] * 8 + [2] * 4, 8)])
def test_buddies_live_on_other_nodes_where_they_can(nodes, shift):
    assert buddy_shift(nodes) == shift


def train_on_uneven_nodes(info: RankInfo, config) -> list[tuple[int, int]]:
    """Two ranks on the first node, one on each of two others."""
    nodes, replicas = [0, 0, 1, 2], Replicas()
    info = replace(info, node_rank=nodes[info.rank], local_world_size=nodes.count(nodes[info.rank]))
    run_rank(config, info, control=Control(), placed_at=time.time(), replicas=replicas)
    return replicas.held()


def test_ranks_on_uneven_nodes_exchange_their_states(ranks, text, tmp_path):
    config = make_config(text, tmp_path, train__steps=4, checkpoint__memory_every=2, train__validate_every=0,
                         checkpoint__every=0)
    config.layout.dp, config.layout.ep = 4, 2
    assert run(ranks, train_on_uneven_nodes, config) == [
        [(0, 2), (2, 2)], [(1, 2), (3, 2)], [(0, 2), (2, 2)], [(1, 2), (3, 2)]]
