"""A slow rank and a slow link are named, on real gloo ranks with scripted probes."""

import dataclasses
import json

import pytest

from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import straggler
from tests.orchestrator.train.runs import events, make_config, run, train


def train_with_a_slow_rank(info: RankInfo, config, slow_from: int) -> None:
    """Rank 1's device takes three times as long from the probe `slow_from` on, and once before."""
    calls = []

    def probe_s(device):
        calls.append(device)
        return 0.003 if info.rank == 1 and (len(calls) >= slow_from or len(calls) == 1) else 0.001

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straggler, "probe_s", probe_s)
        train(info, config)


def test_a_rank_that_is_slower_than_the_rest_for_long_is_named_once(ranks, text, tmp_path):
    config = make_config(text, tmp_path, train__validate_every=0, train__steps=8, checkpoint__every=0,
                         checkpoint__memory_every=1)
    config.layout.dp = config.layout.ep = 2
    run(ranks, train_with_a_slow_rank, config, 4)
    named = events(tmp_path, "straggler")
    assert [(row["rank"], row["node"], row["step"]) for row in named] == [(1, 0, 6)]
    assert "3.0 times" in named[0]["cause"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["perf/slowest_rank"] for row in rows if row["perf/slowest_rank_over_median"] > 2] == [1] * 6


def train_with_a_slow_link(info: RankInfo, config) -> None:
    """Each rank on a node of its own. What comes to rank 2 takes ten times as long from the third look on."""
    looks, original = [], straggler.link_s

    def link_s(mesh, shift):
        assert original(mesh, shift) > 0
        looks.append(shift)
        return 0.1 if info.rank == 2 and len(looks) >= 3 else 0.01

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straggler, "link_s", link_s)
        train(dataclasses.replace(info, node_rank=info.rank), config)


def test_a_link_slower_than_the_rest_is_named_once_with_both_its_ends(ranks, text, tmp_path):
    config = make_config(text, tmp_path, "pp2_ep2", train__validate_every=0, train__steps=7, checkpoint__every=0,
                         checkpoint__memory_every=1)
    run(ranks, train_with_a_slow_link, config)
    named = events(tmp_path, "slow_link")
    assert [(row["rank"], row["node"], row["source"], row["step"]) for row in named] == [(2, 2, 1, 5)]
    assert "from rank 1 on node 1 took 10.0 times as long as others between nodes, 3 times" in named[0]["cause"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["perf/slowest_link_to"] for row in rows if row["perf/slowest_link_over_usual"] > 5] == [2] * 5


def test_each_link_is_held_against_those_of_its_kind():
    seconds, inside = [1.0, 9.0, 1.0, 9.5, 1.1, 60.0], [True, False, True, False, True, False]
    ratios = straggler.over_usual(seconds, inside)
    assert ratios == pytest.approx([1.0, 1.0, 1.0, 9.5 / 9, 1.1, 60 / 9])
    assert straggler.over_usual([8.0, 1.0, 8.0, 1.0], [False] * 4) == [8, 1, 8, 1], "two of four, by one slow cable"
    assert straggler.over_usual([5.0], [True]) == [1]
