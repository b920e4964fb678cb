"""Flipped bits in what several ranks hold alike: found before the next copy, the rank named, no copy made of it."""

import pytest
import torch

from orchestrator.errors import Drifted, PeerLost
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.parallel.shard import EMBEDDING
from orchestrator.train.drift import odd_ones
from orchestrator.train.loop import Trainer
from orchestrator.train.state import biases
from tests.orchestrator.train.runs import make_config, run, train


def train_with_a_flipped_bit(info: RankInfo, config, what: str, victim: int, at: int) -> tuple[str, str]:
    """The kind and text of the error that ends this rank."""
    original = Trainer._step

    def step(self, tokens):
        if info.rank == victim and self.progress.step == at:
            tensor = biases(self.pipeline)[0][1] if what == "bias" else next(
                shard.value.data for shard in self.pipeline.shards if shard.name == EMBEDDING)
            bits = tensor.view(torch.int32).view(-1)
            bits[tensor.view(-1).abs().argmax()] ^= 1 << 10  # the next update would round the last one away
        return original(self, tokens)

    Trainer._step = step
    try:
        train(info, config)
    except (Drifted, PeerLost) as error:
        return type(error).__name__, str(error)
    finally:
        Trainer._step = original
    return "-", "-"


@pytest.mark.parametrize("layout, what, victim, odd", [
    ("dp4_ep2", "bias", 2, [2]), ("pp2_ep2", "embedding", 3, [1, 3])])
def test_a_flipped_bit_is_found_before_the_next_checkpoint_and_its_rank_is_named(
        ranks, text, tmp_path, layout, what, victim, odd):
    config = make_config(text, tmp_path, layout, train__validate_every=0)
    ends = run(ranks, train_with_a_flipped_bit, config, what, victim, 2)
    assert [kind for kind, _ in ends] == ["Drifted" if rank in odd else "PeerLost" for rank in range(4)]
    assert f"of rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} differ" in ends[0][1]
    saved = [path.name[:13] for path in (tmp_path / "checkpoints").glob("step-*")]
    assert set(saved) <= {"step-00000002"}, "no checkpoint of a state that has drifted"


def test_the_odd_ones_are_those_that_differ_from_more_than_half():
    assert odd_ones({0: 5, 1: 5, 2: 5}) == [] and odd_ones({0: 5, 1: 5, 2: 6}) == [2]
    assert odd_ones({3: 5, 7: 6}) == [3, 7] and odd_ones({0: 1, 1: 1, 2: 2, 3: 2}) == [0, 1, 2, 3]
