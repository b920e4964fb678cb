"""The fault matrix against the real controller and policy, with dummy ranks (dummy.py): milliseconds each, no Ray."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.cluster import controller as controller_module
from orchestrator.cluster import ranks as ranks_module
from orchestrator.cluster.controller import Controller
from orchestrator.cluster.group import Group, state_of
from orchestrator.cluster.keeper import Keeper
from orchestrator.cluster.placement import layouts
from orchestrator.cluster.policy import NEXT, State
from orchestrator.config import Config, to_dict
from orchestrator.errors import NoProgress, NotFit, SparingError, Transient, public_kind
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import storage
from orchestrator.train.manifest import CorruptManifest, MissingTensor
from orchestrator.train.progress import Progress
from tests.cluster_harness import wait_until
from tests.orchestrator.cluster.dummy import Dummy, FailAt


def config_of(tmp_path: Path, **cluster) -> Config:
    config = Config()
    config.layout.pp, config.layout.dp, config.layout.ep, config.layout.microbatches = 1, 4, 2, 2
    config.run.dir = str(tmp_path)
    config.hardware.usd_per_h = 1.0
    config.cluster.start_timeout_s, config.cluster.step_timeout_s, config.cluster.save_timeout_s = 60, 30, 45
    for key, value in cluster.items():
        setattr(config.cluster, key, value)
    return config


def play(tmp_path: Path, *script: FailAt, nodes: int = 3, **cluster) -> tuple[Dummy, dict | SparingError, Controller]:
    """Run the script to its end: the ranks, the summary or the error, the controller."""
    config = config_of(tmp_path, **cluster)
    ranks = Dummy(config, *script, nodes=nodes)
    controller = Controller(config, 1, Progress(lambda line: None), clock=lambda: ranks.now)
    ranks.signal = lambda: setattr(controller, "stop_cause", "SIGTERM")
    try:
        end = controller.run(lambda: ranks)
    except SparingError as error:
        end = error
    assert ranks.released and controller.state is State.ended
    return ranks, end, controller


def decisions(ranks: Dummy) -> list[str]:
    return [event["action"] for event in ranks.logged if event["kind"] == "decision"]


@pytest.mark.parametrize("kind, within_s, actions", [
    ("killed", 0.4, ["replace"]), ("killed_after_others_told", 0.4, ["replace"]), ("error", 0.4, ["replace"]),
    ("drifted", 0.4, ["replace"]),
    ("node_lost", 0.4, ["replace"]), ("connection_lost", 0.4, ["retry"]),
    ("frozen", 31, ["replace"]), ("frozen_in_start", 31, ["replace"]),
    ("hang_in_step", 31, ["replace"]), ("hang_in_save", 46, ["replace"])])
@pytest.mark.parametrize("rank", range(4))
def test_the_rank_at_fault_is_named_in_time_and_the_run_goes_on(tmp_path, kind, within_s, actions, rank):
    ranks, end, _ = play(tmp_path, FailAt(rank, 7, kind))
    assert end["status"] == "completed" and end["steps"] == 30 and decisions(ranks) == actions
    told = ranks.logged[0]
    assert told["found_at"] - 1000 - 7 * 0.35 <= within_s + 0.4 and told["step"] == 7 and told["cause"]
    if kind == "node_lost":
        assert told["lost"] == [rank // 2 * 2, rank // 2 * 2 + 1]
    elif kind != "connection_lost":
        assert (told["rank"], told["node"], told["lost"]) == (rank, str(rank // 2), [rank])
        assert [event["rank"] for event in ranks.logged[1:]] == [rank] and ranks.logged[1]["silent_s"] >= 0
    assert (tmp_path / "stacks-1.txt").exists() == kind.startswith(("frozen", "hang"))


def test_a_rank_that_never_starts_is_found_within_the_timeout_of_the_start(tmp_path):
    ranks, end, _ = play(tmp_path, FailAt(3, 0, "hang_in_start"))
    assert end["status"] == "completed" and "phase start" in ranks.logged[0]["cause"] and ranks.logged[0]["rank"] == 3
    assert ranks.logged[0]["found_at"] - 1000 < 31, "those that wait for it are in a step already"


@pytest.mark.parametrize("script, error, code", [
    ([FailAt(1, 5, "no_disk")], NotFit, 3),
    ([FailAt(1, 5, "no_storage", always=True)], Transient, 33),
    ([FailAt(1, 5, "error", always=True)], SparingError, 1),
    ([FailAt(1, 5, "killed", always=True)], NoProgress, 93),
    ([FailAt(1, 5, "connection_lost", always=True)], NoProgress, 93),
    ([FailAt(1, 5, "sigterm"), FailAt(1, 5, "killed")], Transient, 33)])
def test_what_nobody_can_help_ends_the_run_with_its_exit_code(tmp_path, script, error, code):
    _, end, _ = play(tmp_path, *script)
    assert isinstance(end, error) and end.exit_code == code
    failed = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()][-1]
    assert failed["kind"] == "run_failed" and failed["rank"] is not None and failed["cause"]
    assert failed["charged_s"] == json.loads((tmp_path / "summary.json").read_text())["measured"]["charged_s"]


def test_a_run_that_fails_tells_of_no_decision_that_its_ranks_have_told(tmp_path):
    play(tmp_path, FailAt(1, 5, "killed"), FailAt(1, 9, "no_disk"))
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["run_failed"]


def test_ranks_that_lost_only_a_connection_are_formed_again_once_then_one_is_replaced(tmp_path):
    ranks, end, _ = play(tmp_path, FailAt(1, 5, "connection_lost"), FailAt(1, 6, "connection_lost"))
    assert end["status"] == "completed" and decisions(ranks) == ["retry", "retry"]
    twice = play(tmp_path, FailAt(1, 5, "connection_lost", always=True))[0]
    assert decisions(twice) == ["retry", "replace"]


def test_a_lost_node_without_room_elsewhere_ends_a_run_of_fixed_size_resumable(tmp_path):
    ranks, end, _ = play(tmp_path, FailAt(1, 15, "node_lost"), nodes=2)
    assert isinstance(end, Transient) and "2 ranks have a place, the run needs 4" in str(end)
    assert "resume=auto" in str(end)


def test_who_asks_while_a_run_waits_for_a_place_is_told_so(tmp_path, monkeypatch):
    written, asked = [], []
    monkeypatch.setattr(controller_module, "STATUS_EVERY_S", -1.0)
    monkeypatch.setattr(Controller, "_write", lambda self, name, text, *, wait: written.append(json.loads(text)))
    monkeypatch.setattr(time, "time", lambda: asked.append(1) or len(asked))
    play(tmp_path, FailAt(1, 15, "node_lost"), nodes=2, replace_timeout_s=40)
    told = [status for status in written if status["waiting"]]
    assert [status["waiting"] for status in told] == ["a place for rank 0, 1 (its process died), 40 s at most"] * 2
    assert [status["state"] for status in told] == ["refilling"] * 2 and told[0]["time"] < told[1]["time"]
    assert [row["host"] for row in told[0]["ranks"]] == ["node-0", "node-0", "node-1", "node-1"], "as they were"


def test_an_elastic_run_shrinks_to_what_is_left_and_grows_back_without_losing_a_step(tmp_path):
    ranks, end, controller = play(tmp_path, FailAt(1, 15, "node_lost"), FailAt(0, 18, "node_returns"), nodes=2,
                                  min_ranks=2)
    assert end["status"] == "completed" and decisions(ranks) == ["resize", "resize"] and ranks.sizes == [4, 2, 4]
    shrunk, grown = [event for event in ranks.logged if event["kind"] == "decision"]
    assert (shrunk["ranks"], shrunk["lost"], shrunk["step"]) == (2, [0, 1], 15)
    assert (grown["ranks"], grown["lost"], grown["step"]) == (4, [], 19) and "room for 4" in grown["cause"]
    assert [(ranks, spares) for _, ranks, spares in controller.held] == [(4, 0), (2, 0), (4, 0)]
    assert isinstance(play(tmp_path, FailAt(1, 15, "node_lost"), FailAt(0, 16, "node_lost"), nodes=2, min_ranks=2)[1],
                      Transient)


def test_a_drained_node_ends_a_run_of_fixed_size_with_a_checkpoint_and_an_elastic_one_moves_off_it(tmp_path):
    _, end, controller = play(tmp_path, FailAt(1, 15, "node_drained"))
    assert (end["status"], end["steps"]) == ("preempted", 16) and "node-0 is being drained" in controller.stop_cause
    ranks, end, _ = play(tmp_path, FailAt(1, 15, "node_drained"), nodes=2, min_ranks=2)
    assert end["status"] == "completed" and ranks.sizes == [4, 2] and ranks.leaving == {"node-0"}
    assert ranks.logged[0]["lost"] == [0, 1] and ranks.logged[0]["step"] == 16, "no step is lost"


@pytest.mark.parametrize("min_ranks", [0, 2])
def test_a_drained_node_of_the_head_or_the_controller_ends_any_run_with_a_checkpoint(tmp_path, min_ranks):
    _, end, controller = play(tmp_path, FailAt(1, 15, "head_drained"), min_ranks=min_ranks)
    assert (end["status"], end["steps"]) == ("preempted", 16) and "head is being drained" in controller.stop_cause


def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path):
    _, end, _ = play(tmp_path, FailAt(0, 9, "sigterm"))
    assert (end["status"], end["steps"]) == ("preempted", 10)


def test_a_run_that_nobody_reads_of_any_more_goes_on(tmp_path):
    def unread(line: str) -> None:
        raise BrokenPipeError

    config = config_of(tmp_path)
    ranks = Dummy(config, FailAt(1, 15, "killed"), nodes=3)
    end = Controller(config, 1, Progress(unread), clock=lambda: ranks.now).run(lambda: ranks)
    assert end["status"] == "completed" and decisions(ranks) == ["replace"]


def test_a_run_whose_reader_has_stopped_reading_goes_on(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)  # as a shell makes it: to print would wait for ever
    config = config_of(tmp_path)
    ranks = Dummy(config, FailAt(1, 15, "killed"), nodes=3)
    with open(reader, "rb"), open(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        progress = Progress(lambda line: pytest.fail("would wait"))
        end = Controller(config, 1, progress, clock=lambda: ranks.now).run(lambda: ranks)
    assert end["status"] == "completed" and decisions(ranks) == ["replace"]


def test_layouts_to_go_on_with_keep_the_pipeline_and_the_batch(tmp_path):
    config = config_of(tmp_path, min_ranks=1)
    shapes = {size: (layout.pp, layout.dp, layout.ep) for size, layout in layouts(config).items()}
    assert shapes == {4: (1, 4, 2), 2: (1, 2, 2), 1: (1, 1, 1)}, "a batch of 16 cannot be cut into three"
    config.layout.ep_per_node = 2
    assert {size: layout.ep_per_node for size, layout in layouts(config).items()} == {4: 2, 2: 2, 1: 1}
    assert list(layouts(config_of(tmp_path))) == [4] and list(layouts(config_of(tmp_path, min_ranks=2))) == [4, 2]


def test_every_state_is_reached_and_every_path_ends():
    assert set().union(*NEXT.values()) | {State.placing} == set(State)
    assert all(State.ended in following for state, following in NEXT.items() if state is not State.ended)


def test_the_table_of_faults_names_tests_that_exist():
    root = Path(__file__).parents[3]
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", (root / "docs" / "faults.md").read_text(), re.MULTILINE)
    there = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(rows) >= 11 and not [name for name in rows if f"def {name}(" not in there]


def test_storage_that_stands_still_keeps_nobody_from_asking_the_ranks(tmp_path, monkeypatch):
    controller, go_on, written = Controller(config_of(tmp_path), 1, Progress(lambda line: None)), threading.Event(), []

    def write(path, data, **_):
        written.append((path, data))
        go_on.wait(120)

    monkeypatch.setattr(storage, "write_bytes", write)
    monkeypatch.setattr(controller_module, "STALL_S", 0.05)
    for text in "ab":
        controller._write("status.json", text, wait=False)
    wait_until(lambda: written, 60, "nothing is written")
    controller._write("error.txt", "c", wait=True)
    go_on.set()
    controller.writing.join(120)
    assert written == [(f"{tmp_path}/status.json", b"a"), (f"{tmp_path}/error.txt", b"c")]


def test_a_run_that_found_no_place_costs_nothing(tmp_path):
    def place():
        raise Transient("the cluster is busy")

    with pytest.raises(Transient, match="busy"):
        Controller(config_of(tmp_path), 1, Progress(lambda line: None)).run(place)
    assert json.loads((tmp_path / "summary.json").read_text())["device_hours"] == 0


def test_an_error_that_nobody_foresaw_leaves_a_bill_and_an_event_too(tmp_path):
    ranks = Dummy(config_of(tmp_path), nodes=3)
    ranks.form = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Controller(config_of(tmp_path), 1, Progress(lambda line: None)).run(lambda: ranks)
    assert ranks.released and json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (event["kind"], event["cause"]) == ("run_failed", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("error, kind", [
    (storage.StorageUnavailable("x"), "Transient"), (storage.StorageDenied("x"), "NotFit"),
    (MissingTensor("x"), "BadRequest"), (CorruptManifest("x"), "NotTrustworthy"), (NoProgress("x"), "NoProgress")])
def test_an_error_keeps_its_meaning_on_its_way_from_a_rank(tmp_path, error, kind):
    def attempt(config, **_):
        raise error

    keeper = Keeper(os.getpid())
    assert keeper.run(attempt, to_dict(Config())) == {"error": kind, "message": "x"} and public_kind(error) == kind


def test_a_keeper_whose_driver_is_gone_before_its_first_call_ends_too():
    program = """import subprocess, time
from orchestrator.cluster.keeper import Keeper
driver = subprocess.Popen(["sleep", "60"])
Keeper(driver.pid)
driver.kill()
driver.wait()
time.sleep(100)
raise SystemExit(5)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=200).returncode == 0


def test_setting_the_clock_is_no_silence(tmp_path, monkeypatch):
    worker = SimpleNamespace(status=SimpleNamespace(remote=lambda: "asked"))
    status = {"silent_s": 0.0, "generation": 0, "phase": "step"}
    monkeypatch.setattr(ranks_module.ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ranks_module.ray, "get", lambda ref: status)
    controller = Controller(config_of(tmp_path), 1, Progress(lambda line: None))
    group = Group([None], [RankInfo()], {}, [{}], {}, controller.clock())
    ranks_module.Ranks._ask(SimpleNamespace(asked_at=0.0, members=[SimpleNamespace(worker=worker)]), group)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert 0 <= state_of(0, group, controller.clock()).silent_s < 60
