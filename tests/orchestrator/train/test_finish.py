import json
import math

import pytest

from model import count
from orchestrator.config import Config
from orchestrator.plan.cost import BUCKETS, Ledger
from orchestrator.train import finish as finish_module
from orchestrator.train.finish import finish_run, format_usd, headline, medians, read_summary

DEVICES, PEAK, PLACED = 4, 5e10, 1e9


def config_for(run_dir, *, usd_per_h=0.5, device="cpu"):
    config = Config()
    config.run.name, config.run.dir = "test", str(run_dir)
    config.train.seq_len = 128
    config.hardware.usd_per_h, config.hardware.device, config.hardware.name = usd_per_h, device, device
    return config


def result_of(config, *, price=0.5, **more):
    """What the loop returns after 100 s, of which it booked 90."""
    ledger = Ledger(DEVICES, price, PLACED)
    booked = {"startup": 20.0, "goodput": 60.0, "data": 1.0, "checkpoint": 4.0, "validation": 5.0}
    for bucket, seconds in booked.items():
        ledger.charge(bucket, seconds)
    return {"status": "completed", "steps": 50, "tokens": 102_400, "loss_train": 2.5, "loss_validation": 2.6,
            "bits_per_byte": {"validation": 3.1, "bigram": 3.6, "gzip": 2.7}, "tokens_per_s": 1700.0,
            "medians": {"step_time_s": 1.2}, "peak_flops_per_s": PEAK, "ledger": ledger.to_dict(PLACED + 100),
            "wandb_id": "abc", **more}


def finish(config, result, *, released_after=107.5):
    return finish_run(config, result, placed_at=PLACED, released_at=PLACED + released_after, devices=DEVICES,
                      attempts=1)


def test_one_step_is_said_as_one(tmp_path):
    config = config_for(tmp_path)
    assert headline(finish(config, result_of(config, status="budget") | {"steps": 1}))[0].startswith("budget: 1 step, ")


def test_the_summary_has_the_keys_that_scripts_lean_on(tmp_path):
    config = config_for(tmp_path)
    finish(config, result_of(config))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 50 and summary["tokens"] == 102_400
    assert summary["loss"] == {"train": 2.5, "validation": 2.6}
    assert summary["bits_per_byte"] == {"validation": 3.1, "bigram": 3.6, "gzip": 2.7}
    assert summary["layout"].items() >= {"pp": 1, "dp": 1, "ep": 1, "schedule": "1f1b", "microbatches": 1}.items()
    assert {"predicted", "measured", "attempts", "hardware", "run_dir", "tokens_per_s"} <= summary.keys()
    assert set(summary["buckets_s"]) == set(BUCKETS)


def test_every_device_second_until_release_is_charged_and_bucketed(tmp_path):
    summary = finish(config_for(tmp_path), result_of(config_for(tmp_path)))
    charged_s = summary["measured"]["charged_s"]
    assert charged_s == math.fsum(summary["buckets_s"].values()) == pytest.approx(DEVICES * 107.5, rel=1e-12)
    assert summary["device_hours"] == charged_s / 3600
    assert summary["buckets_s"]["idle"] == pytest.approx(DEVICES * 17.5)
    assert summary["usd_total"] == pytest.approx(DEVICES * 107.5 / 3600 * 0.5)
    assert summary["usd_per_million_tokens"] == pytest.approx(summary["usd_total"] / 0.1024)
    assert summary["goodput"] == pytest.approx(60 / 107.5)


def test_spares_are_charged_until_release_also_for_a_run_that_failed(tmp_path):
    config = config_for(tmp_path)
    kept = finish_run(config, result_of(config), placed_at=PLACED, released_at=PLACED + 107.5, devices=DEVICES,
                      attempts=1, spares=2)
    assert kept["measured"]["charged_s"] == pytest.approx(DEVICES * 107.5 + 2 * 7.5), "the ledger so far had none"
    row = {"step": 1, "time/step_s": 2.0, "cost/bucket_s/goodput": 2.0 * DEVICES, "cost/bucket_s/spares": 4.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    failed = finish_run(config, {"status": "failed"}, placed_at=PLACED, released_at=PLACED + 10.0, devices=DEVICES,
                        attempts=1, spares=2)
    assert failed["measured"]["charged_s"] == pytest.approx((DEVICES + 2) * 10.0)
    assert failed["buckets_s"]["spares"] == pytest.approx(4.0)


def test_mfu_and_dense_equivalents_follow_from_the_measured_rate(tmp_path):
    config = config_for(tmp_path)
    summary = finish(config, result_of(config))
    flops = count.training_flops(config.model, 128, mtp=True)
    assert summary["mfu"] == pytest.approx(1700 * flops / (DEVICES * PEAK))
    active, total = summary["dense"]["equal_active"], summary["dense"]["equal_total"]
    assert active["device_hours"] == pytest.approx(102_400 / 1700 * DEVICES / 3600), "its own productive time"
    assert total["device_hours"] > active["device_hours"] and total["usd"] == pytest.approx(total["device_hours"] * 0.5)
    assert "own MFU" in summary["dense"]["at"]


def test_a_model_without_experts_is_not_held_beside_itself(tmp_path):
    config = config_for(tmp_path)
    assert sum(line.startswith("dense") for line in headline(finish(config, result_of(config)))) == 2
    config.model = count.dense_equal_active(config.model)
    summary = finish(config, result_of(config))
    assert set(summary["dense"]) == {"at", "equal_total", "equal_active"}
    assert not any(line.startswith("dense") for line in headline(summary))


def test_the_peak_behind_mfu_is_named(tmp_path):
    config = config_for(tmp_path)
    assert finish(config, result_of(config))["measured"]["peak_source"] == "measured GEMM"
    config.hardware.bf16_tflops = 989.0
    assert finish(config, result_of(config) | {"peak_flops_per_s": 989e12})["measured"]["peak_source"] == "bf16 peak"


def test_gpu_hours_are_named_on_gpus_only(tmp_path):
    cpu = finish(config_for(tmp_path), result_of(config_for(tmp_path)))
    gpu = finish(config_for(tmp_path), result_of(config_for(tmp_path), device="cuda"))
    assert "gpu_hours" not in cpu and gpu["gpu_hours"] == gpu["device_hours"]


def test_an_unknown_price_leaves_dollars_unknown(tmp_path):
    summary = finish(config_for(tmp_path, usd_per_h=None), result_of(config_for(tmp_path), price=None))
    assert summary["usd_total"] is None and summary["usd_per_million_tokens"] is None
    assert summary["dense"]["equal_total"]["usd"] is None and summary["dense"]["equal_total"]["device_hours"] > 0
    assert "unknown" in "\n".join(headline(summary)) and "$" not in "\n".join(headline(summary))


def test_a_failed_run_is_summed_up_from_the_rows_it_left(tmp_path):
    rows = [{"step": step, "train/loss": 5.0 - step, "tokens/total": 100 * step, "tokens/per_s": 50.0,
             "time/step_s": 2.0, "validation/loss": 4.5 if step == 2 else None, "train/skipped": int(step == 3),
             "train/skipped_total": int(step == 3), "train/loss_spikes_total": 0, "train/rollbacks_total": 0,
             "cost/bucket_s/goodput": 2.0 * DEVICES * min(step, 2), "cost/bucket_s/startup": 3.0 * DEVICES,
             "cost/bucket_s/lost_work": 2.0 * DEVICES * (step == 3)}
            for step in (1, 2, 3)]
    rows[2]["tokens/per_s"] = 9000.0  # of a step that was not kept
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = finish(config_for(tmp_path), {"status": "failed"}, released_after=10.0)
    assert (summary["status"], summary["steps"], summary["tokens"], summary["loss"]) == (
        "failed", 3, 300, {"train": 2.0, "validation": 4.5})
    assert {name: seconds / DEVICES for name, seconds in summary["buckets_s"].items() if seconds} == pytest.approx(
        {"goodput": 4.0, "startup": 3.0, "lost_work": 2.0, "idle": 1.0})
    assert [summary["measured"][key] for key in ("skipped_steps", "loss_spikes", "rollbacks")] == [1, 0, 0]
    assert math.fsum(summary["buckets_s"].values()) == pytest.approx(DEVICES * 10.0)
    assert summary["tokens_per_s"] == pytest.approx(50.0) and summary["mfu"] is None


def test_a_run_that_was_complete_keeps_its_rate_when_it_is_started_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 50, "tokens/per_s": 80.0, "time/step_s": 2.0}) + "\n")
    config = config_for(tmp_path)
    summary = finish(config, result_of(config) | {"tokens_per_s": None, "medians": None})
    assert summary["tokens_per_s"] == 80.0 and summary["measured"]["step_time_s"] == 2.0
    assert summary["mfu"] > 0 and summary["dense"]["equal_total"]["usd"] > 0


def test_a_step_is_measured_by_medians_over_one_window():
    """Not by its warm-up, steps that other load disturbed, that were not kept or that had a smaller batch."""
    rows = [{"step": step, "time/step_s": 2.0, "tokens/per_s": 50.0, "time/forward_backward_s": 1.8,
             "time/optimizer_s": 0.1} for step in range(9)]
    rows[0] |= {"time/step_s": 60.0, "tokens/per_s": 100 / 60}
    rows[1] |= {"tokens/per_s": 25.0, "time/step_s": 1.0}
    rows[2] |= {"train/skipped": 1, "time/step_s": 9.0}
    for row in rows[6:]:
        row |= {"time/step_s": 20.0, "tokens/per_s": 5.0, "time/forward_backward_s": 19.0}
    rows[7]["time/validation_s"] = 3.0
    assert medians(rows[:3]) == {"step_time_s": 1.0, "tokens_per_s": 25.0, "median_of_steps": 1,
                                 "forward_backward_s": 1.8, "optimizer_s": 0.1}
    rows.insert(3, rows[3])
    assert medians(rows) == {"step_time_s": 2.0, "tokens_per_s": 50.0, "median_of_steps": 7,
                             "forward_backward_s": 1.8, "optimizer_s": 0.1}
    assert medians(rows[:1])["step_time_s"] == 60.0 and medians([])["step_time_s"] is None


def test_what_all_steps_cost_is_measured_too(tmp_path):
    measured = finish(config_for(tmp_path), result_of(config_for(tmp_path)))["measured"]
    assert measured["steps_usd"] == pytest.approx(DEVICES * 60 / 3600 * 0.5)
    unpriced = finish(config_for(tmp_path, usd_per_h=None), result_of(config_for(tmp_path), price=None))
    assert unpriced["measured"]["steps_usd"] is None


def test_speed_and_mfu_of_the_last_attempt_say_so(tmp_path):
    resumed = finish(config_for(tmp_path), result_of(config_for(tmp_path), since_step=30))
    assert sum("since step 30" in line for line in headline(resumed)) == 3
    whole = finish(config_for(tmp_path), result_of(config_for(tmp_path), since_step=0))
    assert "since" not in "\n".join(headline(whole))


def test_a_failed_run_costs_no_less_than_its_last_row_showed(tmp_path):
    row = {"step": 9, "time/step_s": 2.0, "cost/device_hours": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    summary = finish(config_for(tmp_path), {"status": "failed", "ledger": None}, released_after=10.0)
    assert summary["device_hours"] == pytest.approx(0.5) and summary["usd_total"] == pytest.approx(0.25)


def test_a_run_that_failed_before_its_first_step_is_still_charged(tmp_path):
    summary = finish(config_for(tmp_path), {}, released_after=36.0)
    assert summary["status"] == "failed" and summary["steps"] == 0
    assert summary["usd_total"] == pytest.approx(DEVICES * 0.01 * 0.5)
    assert summary["usd_per_million_tokens"] is None and headline(summary)


def test_figures_that_are_not_finite_become_null(tmp_path):
    finish(config_for(tmp_path), result_of(config_for(tmp_path), loss_train=math.nan))
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_the_last_block_names_figures_beside_what_they_are_measured_by(tmp_path):
    lines = headline(finish(config_for(tmp_path), result_of(config_for(tmp_path))))
    text = "\n".join(lines)
    for part in ("completed: 50 steps, 102,400 tokens, 1 attempt", "3.100 bits per byte (bigram 3.600, gzip 2.700)",
                 "1,700 tokens/s", "measured GEMM", "goodput 56%", "per million tokens", "equal total", "this MFU"):
        assert part in text, part
    assert all(len(line) <= 120 for line in lines)


def test_dollars_show_three_significant_digits():
    assert [format_usd(x) for x in (None, 0, 0.000123456, 0.0123, 1.5, 99.999, 5576000)] == [
        "unknown", "$0.00", "$0.000123", "$0.0123", "$1.50", "$100.00", "$5,576,000.00"]


def test_attempts_that_failed_add_up(tmp_path):
    """The first held its devices an hour, the second ten minutes before any row, the third half an hour."""
    config, held = config_for(tmp_path), (3600, 600, 1800)
    for attempt, seconds in enumerate(held, 1):
        if attempt == 3:
            (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "cost/device_hours": 4.5}) + "\n")
        finish_run(config, {"status": "failed"}, placed_at=PLACED, released_at=PLACED + seconds, devices=DEVICES,
                   attempts=attempt)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["device_hours"] == pytest.approx(sum(held[:attempt]) * DEVICES / 3600)


def test_a_refused_request_takes_nothing_from_a_complete_run_but_money(tmp_path):
    config = config_for(tmp_path)
    before = finish(config, result_of(config))
    attempt = {"placed_at": PLACED + 200, "released_at": PLACED + 210, "devices": DEVICES, "attempts": 2}
    after = finish_run(config, {"status": "failed"}, refused=True, **attempt)
    assert after["measured"]["charged_s"] == pytest.approx(before["measured"]["charged_s"] + DEVICES * 10)
    assert after["usd_total"] > before["usd_total"] and after["attempts"] == 2
    assert {key: after[key] for key in ("status", "steps", "loss", "bits_per_byte", "mfu")} == {
        key: before[key] for key in ("status", "steps", "loss", "bits_per_byte", "mfu")}
    assert finish_run(config, {"status": "failed"}, **attempt)["status"] == "failed", "one that broke down is another"


@pytest.mark.parametrize("content", ["", '{"status": "comp', "[1]", "{}", None],
                         ids=["empty", "torn", "no object", "without keys", "gone"])
def test_a_bill_goes_on_behind_a_summary_that_is_damaged_or_gone(tmp_path, content):
    """What each end was charged stands in its event, too: `run_failed`, else `run_ended`."""
    config, charged = config_for(tmp_path), []
    for attempt, failure in enumerate([None, {"cause": "x", "rank": 1}, None, None], 1):
        summary = finish_run(config, {"status": "failed"}, placed_at=PLACED, released_at=PLACED + 100, devices=DEVICES,
                             attempts=attempt, failure=failure)
        charged.append(summary["measured"]["charged_s"])
        assert summary == json.loads((tmp_path / "summary.json").read_text())
        (tmp_path / "summary.json").write_text(content or "")
        if content is None:
            (tmp_path / "summary.json").unlink()
    assert charged == pytest.approx([DEVICES * 100 * attempt for attempt in (1, 2, 3, 4)])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["attempt"]) for event in events] == [
        ("run_ended", 1), ("run_failed", 2), ("run_ended", 3), ("run_ended", 4)]
    assert [event["charged_s"] for event in events] == charged and events[1]["cause"] == "x"


def test_the_end_of_an_attempt_reads_the_earlier_one_once(tmp_path, monkeypatch):
    config, read = config_for(tmp_path), []
    finish(config, result_of(config))
    monkeypatch.setattr(finish_module, "read_summary", lambda run_dir: read.append(run_dir) or read_summary(run_dir))
    finish_run(config, {"status": "failed"}, refused=True, placed_at=PLACED + 200, released_at=PLACED + 210,
               devices=DEVICES, attempts=2)
    assert read == [str(tmp_path)]
