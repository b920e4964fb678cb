"""Steps that are bad: skipped by all ranks, rolled back, too many of them. On real gloo ranks, as in test_loop.py."""

import json
import math
import time
import weakref

import pytest

from orchestrator.config import Config, OnSpike, Schedule
from orchestrator.errors import NotTrustworthy
from orchestrator.parallel.pipeline import Pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import data, loop
from orchestrator.train.control import Control
from orchestrator.train.loop import Trainer, run_rank
from orchestrator.train.replica import Replicas
from tests.orchestrator.train.runs import checkpoint_of, events, losses, make_config, rows, run, train


def train_with_bad_steps(info: RankInfo, config: Config, bad: list[int], in_memory: bool = False) -> dict:
    """The last rank's first expert gradient turns into NaN when it takes the steps `bad` (from 1), each entry once."""
    original, left, build, built, alive = Trainer._step, list(bad), loop.build_pipeline, [], []

    def build_and_count(*args):
        alive.append(sum(pipeline() is not None for pipeline in built))
        built.append(weakref.ref(pipeline := build(*args)))
        return pipeline

    def step(self, tokens):
        finish, due = type(self.pipeline).finish_grads, self.progress.step + 1 in left
        if due:
            left.remove(self.progress.step + 1)

        def poisoned():
            finish(self.pipeline)
            if due and info.rank == info.world_size - 1:
                next(s for s in self.pipeline.shards if s.is_expert).grad().fill_(math.nan)

        self.pipeline.finish_grads = poisoned
        return original(self, tokens)

    Trainer._step, loop.build_pipeline = step, build_and_count
    try:
        return run_rank(config, info, control=Control(), placed_at=time.time(),
                        replicas=Replicas() if in_memory else None) | {"earlier_models_alive": max(alive)}
    finally:
        Trainer._step, loop.build_pipeline = original, build


def train_without_samples(info: RankInfo, config: Config, first: int, num: int) -> dict:
    """As if the data held no samples [first, first + num)."""
    original = data.batch

    def batch(corpus, *, first_sample, **kwargs):
        return original(corpus, first_sample=first_sample + num * (first_sample >= first), **kwargs)

    data.batch = batch
    try:
        return train(info, config)
    finally:
        data.batch = original


def test_a_non_finite_step_is_skipped_by_all_ranks_and_counted(ranks, text, whole, tmp_path):
    results = run(ranks, train_with_bad_steps, make_config(text, tmp_path, "pp2_ep2"), [3])
    assert {result["skipped_steps"] for result in results} == {1}
    ours, expected = losses(tmp_path), losses(whole)
    assert ours[2] == expected[2] and ours[3][0] == expected[3][0]
    assert [row["train/skipped"] for row in rows(tmp_path).values()] == [0, 0, 1, 0, 0, 0]
    assert all(math.isfinite(row[0]) for row in ours.values())
    assert events(tmp_path, "step_skipped")[0]["step"] == 3
    assert results[0]["ledger"]["buckets_s"]["lost_work"] > 0


def train_with_spike(info: RankInfo, config: Config, at: int) -> dict:
    """The last rank's part of the loss jumps at step `at` (from 1); its gradients do not."""
    original = Trainer._reduce

    def reduce(self, summed):
        jumps = info.rank == info.world_size - 1 and self.progress.step + 1 == at
        return original(self, summed + 1e4 if jumps else summed)

    Trainer._reduce = reduce
    try:
        return train(info, config)
    finally:
        Trainer._reduce = original


def test_a_loss_spike_seen_by_one_rank_is_skipped_by_all_also_right_after_a_resume(ranks, text, tmp_path):
    spiky = {"train__spike_sigmas": 8.0, "train__spike_window": 4}
    run(ranks, train_with_bad_steps, make_config(text, tmp_path / "skipped", "pp2_ep2"), [5])
    results = run(ranks, train_with_spike, make_config(text, tmp_path / "spike", "pp2_ep2", **spiky), 5)
    assert {(result["skipped_steps"], result["loss_spikes"]) for result in results} == {(1, 1)}
    assert [row["train/skipped"] for row in rows(tmp_path / "spike").values()] == [0, 0, 0, 0, 1, 0]
    assert events(tmp_path / "spike", "step_skipped")[0]["cause"].startswith("loss spike")
    expected = losses(tmp_path / "skipped")[6]
    assert losses(tmp_path / "spike")[6] == expected, "as if step 5 had never been applied"
    again = make_config(text, tmp_path / "again", "pp2_ep2", **spiky, resume=checkpoint_of(tmp_path / "spike", 4))
    assert run(ranks, train_with_spike, again, 5)[0]["loss_spikes"] == 1
    assert losses(tmp_path / "again")[6] == expected


@pytest.mark.parametrize("in_memory, schedule", [(False, "1f1b"), (True, "1f1b"), (True, "dualpipev")],
                         ids=("from storage", "from memory", "from memory, first and last stage on one rank"))
def test_a_rollback_goes_on_behind_the_data_that_led_to_the_bad_step(ranks, text, tmp_path, in_memory, schedule):
    """Step 6 is bad; what was kept last is the state after step 4 on storage, or after step 3 in memory."""
    kept, again = (3, [4, 5, 6]) if in_memory else (4, [5, 6])
    config = make_config(text, tmp_path / "back", "pp2_ep2", train__steps=8, train__on_spike=OnSpike.rollback,
                         checkpoint__every=0 if in_memory else 4, checkpoint__memory_every=3)
    config.layout.schedule = Schedule[schedule]
    results = run(ranks, train_with_bad_steps, config, [6, 6], in_memory)
    assert {(result["rollbacks"], result["skipped_steps"]) for result in results} == {(1, 2)}
    assert {result["earlier_models_alive"] for result in results} == {0}, "there is no room for two"
    back = events(tmp_path / "back", "rolled_back")
    assert [(event["step"], event["cause"]) for event in back] == [(6, "non-finite loss or gradient")]
    assert events(tmp_path / "back", "resumed")[-1]["step"] == kept
    assert [json.loads(line)["step"] for line in (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()] \
        == [1, 2, 3, 4, 5, 6, 7, 8]
    other = make_config(text, tmp_path / "other", "pp2_ep2", train__steps=8, checkpoint__every=0)
    other.layout = config.layout
    run(ranks, train_without_samples, other, kept * 16, (6 - kept) * 16)
    ours, expected = losses(tmp_path / "back"), losses(tmp_path / "other")
    assert [ours[step][:3] for step in again] == [expected[step][:3] for step in again], "up to the second bad step"
    assert rows(tmp_path / "back")[6]["train/skipped"] == 1, "which is skipped: a step leads back once"
    ledger = results[0]["ledger"]  # what follows the last step is booked when the devices are released
    assert 0.5 * ledger["charged_s"] <= sum(ledger["buckets_s"].values()) <= ledger["charged_s"] * (1 + 1e-9)


def test_too_many_bad_steps_end_the_run_as_not_trustworthy(text, tmp_path):
    config = make_config(text, tmp_path, train__max_bad_steps=2)
    with pytest.raises(NotTrustworthy, match="2 steps in a row"):
        train_with_bad_steps(RankInfo(), config, [2, 3, 4, 5])
    assert max(rows(tmp_path)) == 3


def test_a_validation_that_is_not_finite_keeps_no_checkpoint_from_being_saved(text, tmp_path, monkeypatch):
    original = Pipeline.validate
    monkeypatch.setattr(Pipeline, "validate", lambda self, part: original(self, part) * math.nan)
    result = train(RankInfo(), make_config(text, tmp_path))
    assert result["checkpoint"]["step"] == 6 and result["checkpoint"]["error"] is None
    assert [event["step"] for event in events(tmp_path, "checkpoint_saved")] == [2, 4, 6]
    assert rows(tmp_path)[6]["validation/loss"] is None
    again = train(RankInfo(), make_config(text, tmp_path, resume="auto", train__steps=7, train__validate_every=0))
    assert again["steps"] == 7 and again["checkpoint"]["step"] == 7
