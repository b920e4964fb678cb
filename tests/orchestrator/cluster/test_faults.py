"""Real faults of whole runs: what happens, what it costs, and that the losses are those of a run without them."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.choices import ClusterKind
from orchestrator.cluster.session import ray_session
from orchestrator.compose import compose_config
from tests.cluster_harness import wait_until
from tests.orchestrator.cluster.runs import (
    LONG,
    PATIENCE_S,
    ROOT,
    STRUCK,
    TWO,
    command,
    events,
    has_saved,
    losses,
    overrides,
    rows,
    start,
    wait_for_step,
    wait_until_gone,
)

pytestmark = pytest.mark.ray
SCRIPTED = """
import ctypes, glob, os, signal, sys, threading, time

def raises():
    raise ZeroDivisionError("scripted failure")

def all_killed_once_saved():
    for _ in range(600):
        with open(folder + "/events.jsonl") as file:
            if "checkpoint_saved" in file.read():
                break
        time.sleep(0.1)
    pids = {int(path.rsplit("-", 1)[1]) for path in glob.glob(folder + "/process-*")} - {os.getpid()}
    for pid in [*pids, os.getpid()]:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)

ALWAYS = {"raises": raises, "exits": lambda: os._exit(9), "lingers": lambda: time.sleep(1)}
def long_lease():
    Worker = sys.modules["orchestrator.cluster.worker"].Worker
    Worker.lease_s = property(lambda self: 600.0, lambda self, value: None)

ONCE = {"has-a-long-lease": long_lease, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "holds-the-GIL": lambda: ctypes.PyDLL(None).sleep(600), "all-killed-once-saved": all_killed_once_saved}

def patch():
    while not hasattr(sys.modules.get("orchestrator.train.loop"), "_due"):
        time.sleep(0.005)
    Trainer = sys.modules["orchestrator.train.loop"].Trainer
    original = Trainer._step

    def step(self, tokens):
        global folder
        folder, rank, number = self.config.run.dir, self.mesh.info.rank, self.progress.step + 1
        open(f"{folder}/process-{rank}-{os.getpid()}", "w").close()
        for path in glob.glob(f"{folder}/fault-{rank}-{number}-*"):
            kind = path.rsplit(f"-{number}-", 1)[1]
            if kind in ALWAYS:
                ALWAYS[kind]()
            else:
                os.unlink(path)
                ONCE[kind]()
        return original(self, tokens)

    Trainer._step = step

threading.Thread(target=patch, daemon=True).start()
"""
"""In every process of the runs: rank r's step n does what a file `fault-r-n-kind` in the run directory says."""


def fail_at(run_dir: Path, rank: int, step: int, kind: str) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / f"fault-{rank}-{step}-{kind}").touch()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SCRIPTED)
    return folder


@pytest.fixture(scope="module")
def ray_here(site) -> Iterator[None]:
    """Runs of this process share one Ray, with room for two ranks and a spare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        with ray_session(compose_config(["experiment=tiny", TWO, "cluster.spares=1"]), ClusterKind.local):
            yield


@pytest.fixture(scope="module")
def clean(text, tmp_path_factory, ray_here) -> list[tuple]:
    """Losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    assert main(["train", *overrides(text, folder, *LONG)]) == 0
    return losses(folder)


def test_a_failed_run_tells_its_own_error_and_one_that_fails_on_and_on_ends_with_its_bill(
        text, ray_here, tmp_path, capsys):
    """First a rank raises; then, gone on with, it dies again and again at the same step, with no error to compare."""
    fail_at(tmp_path, 1, 4, "raises")
    assert main(["train", *overrides(text, tmp_path, TWO)]) == 1
    told = capsys.readouterr().err
    assert "rank 1 on node 0: ZeroDivisionError: scripted failure" in told and "Traceback" not in told
    assert "scripted failure" in (tmp_path / "error.txt").read_text()
    first = json.loads((tmp_path / "summary.json").read_text())
    assert first["status"] == "failed" and first["steps"] == 3 and first["usd_total"] > 0
    assert events(tmp_path, "rank_replaced"), "a first failure is tried again, the same one is not"
    assert first["measured"]["charged_s"] == pytest.approx(2 * first["measured"]["wall_s"], rel=0.02)

    (tmp_path / "fault-1-4-raises").rename(tmp_path / "fault-1-4-exits")
    assert main(["train", f"run.dir={tmp_path}", "resume=auto"]) == 93
    told = capsys.readouterr().err
    assert "3 faults without progress since step 3" in told and "Traceback" not in told
    found = events(tmp_path, "decision")[1:]
    assert [(row["action"], row["rank"]) for row in found] == [("replace", 1)] * 2
    second = json.loads((tmp_path / "summary.json").read_text())
    assert second["status"] == "failed" and second["attempts"] == 2 and second["usd_total"] > first["usd_total"]


FAULTS = [(1, 8, "killed"), (1, 13, "holds-the-GIL"), (1, 14, "frozen"), (0, 17, "all-killed-once-saved")]
"""Rank, step and kind. The first one has a spare waiting, the last one leaves nobody who has a copy in memory."""
STEP_TIMEOUT_S = 20


def test_lost_ranks_are_replaced_one_after_another_and_the_losses_are_those_of_a_clean_run(
        text, clean, tmp_path, capfd):
    for fault in FAULTS:
        fail_at(tmp_path, *fault)
    assert main(["train", *overrides(text, tmp_path, *LONG, "cluster.spares=1",
                                     f"cluster.step_timeout_s={STEP_TIMEOUT_S}")]) == 0
    assert not list(tmp_path.glob("fault-*")) and losses(tmp_path) == clean
    assert "\x1b" not in capfd.readouterr().out, "a log has no colours, Ray's words on a lost process neither"
    replaced, decisions = events(tmp_path, "rank_replaced"), events(tmp_path, "decision")
    resumed, recovered = events(tmp_path, "resumed"), events(tmp_path, "recovered")
    assert len(decisions) == len(recovered) == len(resumed) == len(FAULTS)
    for (rank, _, kind), told, after, took in zip(FAULTS, decisions, resumed, recovered, strict=True):
        hangs, everybody = kind in ("frozen", "holds-the-GIL"), kind.startswith("all")
        row = next(row for row in replaced if row["found_at"] == told["found_at"] and row["rank"] == rank)
        assert row["cause"] and row["node"] == 0
        assert row["silent_s"] >= (STEP_TIMEOUT_S if hangs else 0)  # how much later depends on the machine
        assert set(told["lost"]) >= ({0, 1} if everybody else {rank})  # who is slow to come back may have to go as well
        if told["lost"] == [rank] or everybody:
            assert (after["path"] == "memory") == (not everybody)
        print(f"{kind}: found after {row['silent_s']:.1f} s of silence, replaced {told['lost']}, next step "
              f"{took['seconds']:.1f} s after that, {took['lost_steps']} steps lost")
    for number in (2, 3):
        assert "does not answer" in (tmp_path / f"stacks-{number}.txt").read_text()
    for rank in range(2):
        processes = list(tmp_path.glob(f"process-{rank}-*"))
        assert len(processes) == 1 + sum(row["rank"] == rank for row in replaced)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["attempts"] == 1 and summary["buckets_s"]["restart"] > 0 and summary["buckets_s"]["spares"] > 0
    assert sum(summary["buckets_s"].values()) == pytest.approx(summary["measured"]["charged_s"])
    assert summary["measured"]["charged_s"] == pytest.approx(3 * summary["measured"]["wall_s"], rel=0.02)


SUBREAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
subprocess.Popen(sys.argv[1:])
while True:
    os.wait()
"""
"""What orphans are left to on many desktops and in some containers, instead of process 1 (PR_SET_CHILD_SUBREAPER)."""


def test_when_the_driver_is_killed_nothing_is_left_running_and_resume_goes_on(text, clean, site, tmp_path):
    """Ranks take a moment to end, in which they would come to the end of the run, but for their slow steps. It is not
    the end of their leases that ends them."""
    for rank in range(2):
        fail_at(tmp_path, rank, 1, "has-a-long-lease")
    for step in range(STRUCK + 1, 21):
        fail_at(tmp_path, 1, step, "lingers")
    process = start(*command(text, tmp_path, *LONG), under=(sys.executable, "-c", SUBREAPER),
                    PYTHONPATH=f"{ROOT}:{site}")
    wait_for_step(tmp_path, STRUCK, process)
    wait_until(lambda: has_saved(tmp_path), PATIENCE_S, "nothing saved")
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    os.kill(events(tmp_path, "attempt_claimed")[0]["pid"], signal.SIGKILL)
    wait_until_gone(pids)
    process.kill()
    process.communicate()
    for path in tmp_path.glob("fault-*"):
        path.unlink()
    charged = rows(tmp_path)[-1]["cost/usd_total"]
    assert main(["train", f"run.dir={tmp_path}", "resume=auto"]) == 0
    assert losses(tmp_path) == clean
    bill = [row["cost/usd_total"] for row in rows(tmp_path)]
    first = events(tmp_path, "resumed")[-1]["step"]
    assert bill == sorted(bill) and bill[first] > charged, "what is charged never goes back"
