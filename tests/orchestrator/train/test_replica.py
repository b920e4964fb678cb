"""Copies of the ranks' state in memory, on real gloo ranks."""

import time

import pytest

from orchestrator.parallel.mesh import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank
from orchestrator.train.replica import Buddies, Replicas
from tests.orchestrator.train.test_loop import make_config, run, text  # noqa: F401  (a fixture)


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
def test_no_rank_leaves_in_the_middle_of_an_exchange(ranks, text, tmp_path, steps, kept):  # noqa: F811
    config = make_config(text, tmp_path, train__steps=steps, checkpoint__memory_every=2, train__validate_every=0,
                         checkpoint__every=0)
    config.layout.dp = config.layout.ep = 2
    assert run(ranks, train_with_a_laggard, config) == [kept, kept]
