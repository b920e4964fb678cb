"""A slow rank is named, on real gloo ranks with a scripted probe."""

import json

from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import straggler
from tests.orchestrator.train.test_loop import events, make_config, run, text, train  # noqa: F401  (a fixture)


def train_with_a_slow_rank(info: RankInfo, config, slow_from: int) -> None:
    """Rank 1's device takes three times as long from the probe `slow_from` on, and once before."""
    calls, original = [], straggler.probe_s

    def probe_s(device):
        calls.append(device)
        return 0.003 if info.rank == 1 and (len(calls) >= slow_from or len(calls) == 1) else 0.001

    straggler.probe_s = probe_s
    try:
        train(info, config)
    finally:
        straggler.probe_s = original


def test_a_rank_that_is_slower_than_the_rest_for_long_is_named_once(ranks, text, tmp_path):  # noqa: F811
    config = make_config(text, tmp_path, train__validate_every=0, train__steps=8, checkpoint__every=0,
                         checkpoint__memory_every=1)
    config.layout.dp = config.layout.ep = 2
    run(ranks, train_with_a_slow_rank, config, 4)
    named = events(tmp_path, "straggler")
    assert [(row["rank"], row["node"], row["step"]) for row in named] == [(1, 0, 6)]
    assert "3.0 times" in named[0]["cause"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["perf/slowest_rank"] for row in rows if row["perf/slowest_rank_over_median"] > 2] == [1] * 6
