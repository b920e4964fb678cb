import contextlib
import json
import math
import os
import sys
import uuid
from types import SimpleNamespace

import fsspec
import pytest

from orchestrator.config import Config, WandbMode
from orchestrator.train import metrics, storage
from orchestrator.train.metrics import EVENT_KEYS, Mirror, append_event, open_tracker, read_lines

CANARIES = {"WANDB_API_KEY": "c" * 20 + "canarykey" + "0" * 11, "AWS_SECRET_ACCESS_KEY": "canary-in-the-environment"}
IN_ARGV = "token=canary-in-argv"


def config_for(run_dir, *, wandb=WandbMode.off):
    config = Config()
    config.run.name, config.run.dir = "test", str(run_dir)
    config.tracker.wandb = wandb
    return config


def row(step, **more):
    return {"step": step, "train/loss": 5.0 / step, "time/step_s": 0.5, "cost/device_hours": step * 2 / 3600,
            "tokens/total": step * 10, "cost/usd_total": step * 0.01} | more


def lines_of(run_dir, name="metrics.jsonl"):
    return read_lines(str(run_dir), name)


def test_rows_keep_full_precision_and_are_readable_while_the_run_goes_on(tmp_path):
    tracker = open_tracker(config_for(tmp_path))
    tracker.log(row(1, **{"train/loss": 0.1 + 0.2}))
    assert lines_of(tmp_path)[0]["train/loss"] == 0.1 + 0.2
    tracker.finish({})


def test_a_number_that_is_not_finite_is_null_since_json_has_no_nan(tmp_path):
    tracker = open_tracker(config_for(tmp_path))
    tracker.log(row(1, **{"train/loss": math.nan, "moe/tokens_per_expert": [[1, 2], [3, math.inf]]}))
    tracker.finish({})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["train/loss"] is None and json.loads(text)["moe/tokens_per_expert"] == [[1, 2], [3, None]]


def test_a_full_disk_costs_lines_but_not_the_run_and_is_said_once(small_disk):
    tracker = open_tracker(config_for(small_disk))
    filler = small_disk / "filler"
    tracker.log(row(1))
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for step in range(2, 9):
        tracker.log(row(step, **{"moe/tokens_per_expert": [[step] * 3000] * 2}))
        tracker.event("checkpoint_failed", step=step)
    filler.unlink()
    for step in (9, 10):
        tracker.log(row(step))
    tracker.finish({})
    steps = [line["step"] for line in lines_of(small_disk)]
    assert steps[0] == 1 and steps[-1] == 10 and sorted(set(steps)) == steps
    (said,) = tracker.failures
    assert said.startswith(f"notice: {small_disk}/") and "No space left on device; lines are left out until" in said
    assert open_tracker(config_for(small_disk), resumed_step=10).dropped.rows == 0


def test_events_carry_every_key_of_the_contract(tmp_path):
    tracker = open_tracker(config_for(tmp_path))
    tracker.event("checkpoint_saved", rank=0, step=3, bytes=12)
    tracker.finish({})
    append_event(str(tmp_path), "run_finished", cause="completed")
    first, second = lines_of(tmp_path, "events.jsonl")
    assert set(EVENT_KEYS) <= first.keys() and first["bytes"] == 12 and first["node"] is None
    assert (second["kind"], second["cause"]) == ("run_finished", "completed") and second["time"] >= first["time"] > 1e9


def test_resuming_drops_the_rows_that_will_be_computed_again_and_tells_their_cost(tmp_path):
    tracker = open_tracker(config_for(tmp_path))
    for step in range(1, 8):
        tracker.log(row(step))
    tracker.event("validated", step=7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train/lo')
    tracker.finish({})
    resumed = open_tracker(config_for(tmp_path), resumed_step=4)
    assert (resumed.dropped.rows, resumed.dropped.seconds) == (3, 1.5)
    assert resumed.dropped.charged_s == pytest.approx(14.0)
    resumed.log(row(5))
    resumed.finish({})
    assert [r["step"] for r in lines_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [r["kind"] for r in lines_of(tmp_path, "events.jsonl")] == ["validated"], "history is never rewritten"


def test_a_step_that_was_saved_before_its_row_was_written_has_the_row_of_its_checkpoint(tmp_path):
    config = config_for(tmp_path / "run")
    tracker = open_tracker(config)
    for step in range(1, 5):
        tracker.log(row(step))
    for resumed, steps in ((5, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (3, [1, 2, 3])):
        open_tracker(config, resumed_step=resumed, row=row(resumed)).finish({})
        assert [r["step"] for r in lines_of(tmp_path / "run")] == steps
    open_tracker(config_for(tmp_path / "other"), resumed_step=5, row=row(5)).finish({})
    assert lines_of(tmp_path / "other") == [], "another run's step"


def test_a_run_directory_in_an_object_store_has_everything_at_the_end_and_resumes(tmp_path):
    run_dir = f"memory://{uuid.uuid4()}/run"
    config = config_for(run_dir, wandb=WandbMode.offline)
    tracker = open_tracker(config, upload_every_s=0.0)
    for step in range(1, 6):
        tracker.log(row(step))
    tracker.finish({"status": "completed"})
    assert [r["step"] for r in lines_of(run_dir)] == [1, 2, 3, 4, 5]
    assert any(name.endswith(".wandb") for name in fsspec.filesystem("memory").find(run_dir))
    resumed = open_tracker(config, resumed_step=2)
    assert resumed.dropped.rows == 3 and resumed.wandb_id == tracker.wandb_id
    resumed.log(row(3))
    resumed.finish({"status": "completed"})
    assert [r["step"] for r in lines_of(run_dir)] == [1, 2, 3]


def test_files_that_take_long_to_upload_go_up_less_often_but_not_seldom(monkeypatch):
    clock, puts = [0.0], []
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    mirror = Mirror(f"memory://{uuid.uuid4()}", every_s=1.0)
    monkeypatch.setattr(mirror, "_put", lambda names: puts.append(clock[0]))
    for took_s, due_s in ((0.0, 1.0), (0.2, 4.0), (100.0, 10.0)):
        mirror.took_s, before = took_s, clock[0]
        for clock[0] in (before + due_s - 0.01, before + due_s):
            mirror.sync()
        mirror.upload.result()
        assert puts[-1] == clock[0]
    assert len(puts) == 3


def test_an_upload_that_fails_does_not_stop_the_run_and_the_last_one_keeps_the_files(monkeypatch):
    from orchestrator.errors import NotFit

    tracker = open_tracker(config_for(f"memory://{uuid.uuid4()}"), upload_every_s=0.0)

    def no_network(path, data, **_):
        raise NotFit(f"{path}: no route")

    monkeypatch.setattr(storage, "write_bytes", no_network)
    for step in range(1, 4):
        tracker.log(row(step))
    with pytest.raises(NotFit, match="they are in (.*), copy") as error:
        tracker.finish({})
    kept = str(error.value).split("they are in ")[1].split(",")[0]
    assert len(lines_of(kept)) == 3


@pytest.fixture
def secrets_around(monkeypatch):
    for key, value in CANARIES.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, IN_ARGV])


def test_wandb_offline_prints_nothing_and_continues_under_the_same_id(tmp_path, secrets_around, capfd):
    config = config_for(tmp_path, wandb=WandbMode.offline)
    first = open_tracker(config)
    first.log(row(1, **{"moe/tokens_per_expert": [[3, 5, 0], [1, 1, 6]], "validation/loss": None}))
    first.log(row(2, **{"moe/tokens_per_expert": [[1] * 600]}))
    first.finish({"status": "preempted", "loss": {"train": 2.5}})
    second = open_tracker(config, resumed_step=1)
    second.log(row(2))
    second.finish({"status": "completed", "usd_total": 0.5})
    assert second.wandb_id == first.wandb_id
    found = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert found and set(found) == {f"run-{first.wandb_id}.wandb"}
    recorded = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for key in (b"by_usd/train_loss", b"tokens/total", b"histogram", b"max_usd", b"preempted"):
        assert key in recorded, key
    assert capfd.readouterr() == ("", "")
    assert not lines_of(tmp_path, "events.jsonl"), "nothing failed"


def test_neither_environment_nor_command_line_is_recorded(tmp_path, secrets_around):
    tracker = open_tracker(config_for(tmp_path, wandb=WandbMode.offline))
    tracker.log(row(1))
    tracker.finish({"status": "completed"})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 4
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in (*CANARIES.values(), IN_ARGV)), path
        assert b"canary" not in content, path


def test_a_checkpoints_id_wins_over_a_new_one(tmp_path):
    tracker = open_tracker(config_for(tmp_path, wandb=WandbMode.offline), wandb_id="fromckpt")
    tracker.finish({})
    assert tracker.wandb_id == "fromckpt" and (tmp_path / "wandb/run_id").read_text() == "fromckpt"


def test_online_without_a_key_goes_on_offline_without_asking(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = open_tracker(config_for(tmp_path / "run", wandb=WandbMode.online))
    tracker.log(row(1))
    tracker.finish({})
    (event,) = lines_of(tmp_path / "run", "events.jsonl")
    assert event["kind"] == "tracker_failed" and "WANDB_API_KEY" in event["cause"]
    assert tracker.failures == [f"notice: {event['cause']}; all rows are in metrics.jsonl"]
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


def test_training_survives_wandb_and_says_so_once(tmp_path, monkeypatch):
    import wandb

    def fail(*args, **kwargs):
        raise ConnectionResetError("service is gone")

    tracker = open_tracker(config_for(tmp_path, wandb=WandbMode.offline))
    monkeypatch.setattr(wandb, "Histogram", fail)
    for step in range(1, 4):
        tracker.log(row(step, **{"moe/tokens_per_expert": [[1, 2]]}))
    tracker.finish({})
    assert len(lines_of(tmp_path)) == 3
    (event,) = lines_of(tmp_path, "events.jsonl")
    assert event["cause"] == "Weights & Biases: ConnectionResetError: service is gone"


def test_a_machine_without_wandb_trains_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(config_for(tmp_path, wandb=WandbMode.offline))
    tracker.log(row(1))
    tracker.finish({})
    assert [event["kind"] for event in lines_of(tmp_path, "events.jsonl")] == ["tracker_failed"]


def test_of_a_long_file_only_its_end_is_read(tmp_path):
    tracker = open_tracker(config_for(tmp_path))
    for step in range(1, 5):
        tracker.log(row(step))
    tracker.finish({})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text("not to be looked at\n" + whole)
    assert open_tracker(config_for(tmp_path), resumed_step=3).dropped.rows == 1
    assert (tmp_path / "metrics.jsonl").read_text() == "not to be looked at\n" + whole[: whole.rindex("{")]
