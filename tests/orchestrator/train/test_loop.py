"""The rank program on real gloo ranks: resume, stop, budget, money. Tiny model, a few files of text."""

import itertools
import json
import math
import signal
import time
from pathlib import Path

import pytest

from orchestrator.config import Config
from orchestrator.errors import BadRequest, NotTrustworthy
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import accounts, resume, tokens
from orchestrator.train.accounts import Accounts
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank
from orchestrator.train.rank import train_as_rank
from orchestrator.train.replica import Replicas
from tests.orchestrator.train.runs import checkpoint_of, events, losses, make_config, rows, run, train


def train_and_stop_after(info: RankInfo, config: Config, step: int) -> dict:
    control = Control()
    update = control.update

    def watched(**fields):
        update(**fields)
        if info.rank == 0 and fields.get("step") == step:
            control.request_stop("SIGTERM")

    control.update = watched
    return train(info, config, control)


def train_with_little_memory(info: RankInfo, config: Config) -> dict:
    """On one of the nodes."""
    free, resume.free_bytes = resume.free_bytes, lambda device: 1000 if info.rank == 1 else None
    try:
        return run_rank(config, info, control=Control(), placed_at=time.time(), replicas=Replicas())
    finally:
        resume.free_bytes = free


def test_validation_logs_loss_and_acceptance_of_each_mtp_depth(whole):
    validated = {step: row for step, row in rows(whole).items() if "validation/loss" in row}
    assert set(validated) == {3, 6}
    for row in validated.values():
        assert math.isfinite(row["validation/mtp_loss_1"])
        # A count over 16 sequences of 31 guesses each.
        guesses = row["validation/mtp_acceptance_1"] * 16 * 31
        assert 0 <= guesses <= 16 * 31 and guesses == pytest.approx(round(guesses), abs=1e-6)


def test_a_run_whose_fp8_products_are_emulated_says_so_among_its_events(ranks, text, whole, tmp_path):
    config = make_config(text, tmp_path)
    config.precision.fp8, config.train.steps, config.train.validate_every = True, 1, 0
    run(ranks, train, config)
    (said,) = events(tmp_path, "fp8_emulated")
    assert said["cause"] == "no FP8 tensor cores for these products on cpu"
    assert not events(whole, "fp8_emulated")


def test_same_config_and_seed_give_the_same_losses_bit_for_bit(ranks, text, whole, tmp_path):
    run(ranks, train, make_config(text, tmp_path, "pp2_ep2"))
    assert losses(tmp_path) == losses(whole)
    run(ranks, train, make_config(text, tmp_path / "other", "pp2_ep2", seed=1))
    assert losses(tmp_path / "other")[1] != losses(whole)[1]


def test_resume_is_bit_equal_to_the_uninterrupted_run(ranks, text, whole, tmp_path):
    config = make_config(text, tmp_path, "pp2_ep2")
    results = run(ranks, train_and_stop_after, config, 3)
    assert {result["status"] for result in results} == {"preempted"} and max(rows(tmp_path)) == 4
    config.resume = "auto"
    results = run(ranks, train, config)
    assert results[0]["status"] == "completed"
    assert {step: row[:4] for step, row in losses(tmp_path).items()} == {
        step: row[:4] for step, row in losses(whole).items()}
    assert losses(tmp_path)[6] == losses(whole)[6]
    assert events(tmp_path, "resumed")[0]["step"] == 4


@pytest.mark.parametrize("source, layout", [("pp2_ep2", "one"), ("pp2_ep2", "dp4_ep2"), ("dp4_ep2", "pp4")])
def test_a_checkpoint_goes_on_under_another_layout(ranks, text, whole, tmp_path, source, layout):
    """Under dp=4 ep=2 a rank owns rows of its three experts, else whole ones."""
    saved = whole if source == "pp2_ep2" else tmp_path / "source"
    if saved != whole:
        run(ranks, train, make_config(text, saved, source))
    config = make_config(text, tmp_path, layout, resume=checkpoint_of(saved, 2))
    run(ranks, train, config)
    expected = losses(whole)
    assert set(rows(tmp_path)) == {3, 4, 5, 6}
    for step, row in losses(tmp_path).items():
        assert row[:3] == pytest.approx(expected[step][:3], rel=1e-5)
        assert row[3] == pytest.approx(expected[step][3], rel=1e-4)
        assert rows(tmp_path)[step]["moe/tokens_per_expert"] == rows(whole)[step]["moe/tokens_per_expert"]


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_continues(ranks, text, whole, tmp_path):
    config = make_config(text, tmp_path, "pp2_ep2")
    run(ranks, train, config)
    newest = checkpoint_of(tmp_path, 6)
    shard = next(Path(newest).glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    config.resume = "auto"
    run(ranks, train, config)
    resumed = events(tmp_path, "resumed")[0]
    assert resumed["step"] == 4 and resumed["skipped"] == [newest]
    assert f"{shard}: corrupt" in resumed["causes"][0]
    assert losses(tmp_path)[6] == losses(whole)[6]


def test_a_rank_publishes_what_the_run_is_to_be_told_of_its_data(text, tmp_path, monkeypatch):
    """And that it is at its data, from the first look at its files on, which may be many and far away."""
    (tmp_path / "a.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 400)
    control, find = Control(), tokens.find_files

    def find_slowly(path: str) -> dict:
        assert control.status()["phase"] == "data"
        return find(path)

    monkeypatch.setattr(tokens, "find_files", find_slowly)
    train(RankInfo(), make_config(text, tmp_path / "run", data__path=f"{text}/*.txt,{tmp_path}/a.txt", train__steps=1,
                                  train__validate_every=0), control)
    assert f"1 file is not UTF-8 ({tmp_path}/a.txt)" in control.status()["notices"][0]


def test_a_token_shard_that_is_altered_during_a_run_ends_it(text, tmp_path):
    config, control = make_config(text, tmp_path / "run", data__cache_dir=str(tmp_path / "cache")), Control()
    update = control.update

    def watched(**fields):
        update(**fields)
        if fields.get("step") == 2 and fields.get("loss"):
            (shard,) = (tmp_path / "cache").glob("*/train-00000.bin")
            with open(shard, "r+b") as file:
                file.write(bytes(shard.stat().st_size))

    control.update = watched
    with pytest.raises(NotTrustworthy, match=r"train-00000\.bin: its content is not what was written; delete") as found:
        train(RankInfo(), config, control)
    assert found.value.exit_code == 17 and max(rows(tmp_path / "run")) in (2, 3), "one batch is read ahead"


def test_resume_refuses_another_model_and_another_order_of_samples(text, whole, tmp_path):
    path = checkpoint_of(whole, 6)
    other = make_config(text, tmp_path, resume=path, model__dim=32)
    with pytest.raises(BadRequest, match="another model: model.dim=48 there, 32 here"):
        train(RankInfo(), other)
    with pytest.raises(BadRequest, match="seed=5.*was written with 0"):
        train(RankInfo(), make_config(text, tmp_path, resume=path, seed=5))
    with pytest.raises(BadRequest, match="nothing: no checkpoint here"):
        train(RankInfo(), make_config(text, tmp_path, resume=str(tmp_path / "nothing")))


def test_a_step_that_was_saved_but_not_told_is_in_the_rows_after_a_resume(text, tmp_path, monkeypatch):
    """Killed between the checkpoint of step 4 and its row."""
    config, log = make_config(text, tmp_path, checkpoint__background=False), Accounts.log

    def killed(self, row):
        if row["step"] == 4:
            raise RuntimeError("killed")
        log(self, row)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Accounts, "log", killed)
        train(RankInfo(), config)
    assert list(rows(tmp_path)) == [1, 2, 3]
    config.resume = "auto"
    train(RankInfo(), config)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4, 5, 6]


def test_no_copies_are_kept_in_memory_where_they_have_no_room(ranks, text, tmp_path):
    config = make_config(text, tmp_path, "dp4_ep2", checkpoint__memory_every=1)
    assert {result["status"] for result in run(ranks, train_with_little_memory, config)} == {"completed"}
    assert ["6 copies of the state of 4 ranks take" in event["cause"]
            for event in events(tmp_path, "memory_copies_off")] == [True]


@pytest.mark.parametrize("place", ["s3", "memory"])
def test_a_run_saves_to_and_resumes_from_an_object_store(request, text, tmp_path, place):
    url = f"{request.getfixturevalue('s3') if place == 's3' else 'memory://loop'}/{tmp_path.name}/checkpoints"
    config = make_config(text, tmp_path / "a", checkpoint__dir=url)
    train_and_stop_after(RankInfo(), config, 3)
    config.resume = "auto"
    assert train(RankInfo(), config)["checkpoint"]["path"].startswith(url)
    alone = make_config(text, tmp_path / "b")
    train(RankInfo(), alone)
    assert losses(tmp_path / "a")[6] == losses(tmp_path / "b")[6]
    assert len(events(tmp_path / "a", "resumed")) == 1


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(text, tmp_path, small_disk):
    config = make_config(text, tmp_path, checkpoint__dir=str(small_disk), model__n_routed_experts=64)
    result = train(RankInfo(), config)
    failed = events(tmp_path, "checkpoint_failed")
    assert result["status"] == "completed" and max(rows(tmp_path)) == 6
    assert failed and "no space left" in failed[0]["cause"] + result["checkpoint"]["error"]
    assert not [path for path in small_disk.rglob("*") if path.name == "manifest.json"]


def test_a_model_that_has_diverged_and_a_budget_without_end_are_saved_all_the_same(text, tmp_path):
    """JSON, which a manifest is, has neither NaN nor infinity."""
    config = make_config(text, tmp_path, train__steps=2, optim__lr=1e99, budget__max_usd=math.inf)
    result = train(RankInfo(), config)
    assert math.isnan(result["loss_validation"]) and result["checkpoint"]["error"] is None
    assert checkpoint_of(tmp_path, 2)


def test_the_budget_ends_the_run_with_a_checkpoint_before_it_is_passed(text, tmp_path, monkeypatch):
    clock = itertools.count(time.time(), 0.05)
    monkeypatch.setattr(accounts, "steady", lambda: next(clock))
    config = make_config(text, tmp_path, train__steps=100_000, budget__max_usd=0.015)
    result = train(RankInfo(), config)
    assert result["status"] == "budget" and 0 < result["steps"] < 100_000
    assert result["ledger"]["usd"] <= 0.015
    assert checkpoint_of(tmp_path, result["steps"]) and events(tmp_path, "budget_reached")


def test_the_ledger_follows_the_clock_and_rows_carry_the_money(whole):
    row = rows(whole)[6]
    assert row["cost/usd_total"] == pytest.approx(row["cost/device_hours"] * 3.6)
    assert row["cost/usd_per_million_tokens"] == pytest.approx(row["cost/usd_total"] / row["tokens/total"] * 1e6)
    assert row["cost/dense_equal_total_usd"] > row["cost/dense_equal_active_usd"] > 0
    assert row["tokens/total"] == 6 * 16 * 32 and 0 < row["perf/mfu"] < 1
    totals = [r["cost/usd_total"] for r in rows(whole).values()]
    assert totals == sorted(totals)


def test_a_batch_ramp_counts_samples_and_resumes(ranks, text, tmp_path):
    ramp = dict(train__batch_start=8, train__batch_ramp_steps=3)
    run(ranks, train, make_config(text, tmp_path / "a", "one", layout__microbatches=2, **ramp))
    run(ranks, train, make_config(text, tmp_path / "b", "pp2_ep2", layout__microbatches=2, **ramp))
    ours, alone = rows(tmp_path / "b"), rows(tmp_path / "a")
    assert [r["tokens/total"] for r in ours.values()] == [r["tokens/total"] for r in alone.values()]
    assert ours[1]["tokens/total"] == 8 * 32
    for step, row in ours.items():
        assert row["train/loss"] == pytest.approx(alone[step]["train/loss"], rel=1e-5)


def test_a_long_validation_is_no_silence(text, tmp_path):
    """Each of its parts is a sign of progress: held out may be more than a step's time can take."""
    control, seen = Control(), []
    alive = control.alive

    def watched(**fields):
        seen.append(control.status()["phase"])
        alive(**fields)

    control.alive = watched
    train(RankInfo(), make_config(text, tmp_path, train__steps=1, train__validate_sequences=64), control)
    assert seen.count("validate") == 4


def test_setting_the_clock_costs_nothing(text, tmp_path, monkeypatch):
    """As torchrun starts a rank: its ledger, and what it was held for in all."""
    update, real = Control.update, time.time

    def watched(self, **fields):
        update(self, **fields)
        if fields.get("step") == 1:
            monkeypatch.setattr(time, "time", lambda: real() + 86400)

    monkeypatch.setattr(Control, "update", watched)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        summary = train_as_rank(make_config(text, tmp_path, train__steps=2, train__validate_every=0))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert summary["status"] == "completed" and sum(summary["buckets_s"].values()) < 3600
    assert summary["measured"]["charged_s"] < 3600
