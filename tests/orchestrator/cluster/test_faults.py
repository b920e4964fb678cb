"""Real faults of whole runs: what happens, what it costs, and that the losses are those of a run without them."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cluster_harness import wait_until
from tests.orchestrator.cluster.runs import (
    LONG,
    PATIENCE_S,
    ROOT,
    TWO,
    command,
    environment,
    events,
    losses,
    rows,
    sparing,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.ray
FAIL_AT = """
import os, sys, threading, time

def patch():
    while not hasattr(sys.modules.get("orchestrator.train.loop"), "moe_layer_names"):
        time.sleep(0.005)
    Trainer = sys.modules["orchestrator.train.loop"].Trainer
    original = Trainer._step

    def step(self, tokens):
        if self.mesh.info.rank == 1 and self.progress.step == 3:
            raise ZeroDivisionError("scripted failure")
        return original(self, tokens)

    Trainer._step = step

threading.Thread(target=patch, daemon=True).start()
"""
CRASH_LOOP = FAIL_AT.replace('raise ZeroDivisionError("scripted failure")', "os._exit(9)")


@pytest.fixture(scope="module")
def clean(text, tmp_path_factory) -> list[tuple]:
    """Losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    done = sparing(*command(text, folder, *LONG))
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder)


def test_a_rank_that_fails_ends_the_run_with_its_own_error(text, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAIL_AT)
    done = sparing(*command(text, tmp_path / "run", TWO), PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 1
    assert "rank 1 on node 0: ZeroDivisionError: scripted failure" in done.stderr and "Traceback" not in done.stderr
    assert "scripted failure" in (tmp_path / "run" / "error.txt").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 3 and summary["usd_total"] > 0
    assert events(tmp_path / "run", "rank_replaced"), "a first failure is tried again, the same one is not"
    again = sparing(*command(text, tmp_path / "run", TWO, "resume=auto"))
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["attempts"] == 2


def test_a_crash_loop_ends_with_its_own_exit_code_and_its_bill(text, tmp_path):
    """Ranks that die again and again at the same step, each by itself: no error to compare, only no progress."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASH_LOOP)
    done = sparing(*command(text, tmp_path / "run", TWO), PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 93, done.stdout + done.stderr
    assert "3 faults without progress since step 3" in done.stderr and "Traceback" not in done.stderr
    found = events(tmp_path / "run", "decision")
    assert [(row["action"], row["rank"]) for row in found] == [("replace", 1)] * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["usd_total"] > 0
    assert summary["measured"]["charged_s"] == pytest.approx(2 * summary["measured"]["wall_s"], rel=0.02)


@pytest.mark.parametrize("victim, signal_number, overrides", [
    (1, signal.SIGKILL, ["cluster.spares=1"]), (0, signal.SIGKILL, ["checkpoint.memory_every=0"]),
    (1, signal.SIGSTOP, ["cluster.step_timeout_s=10"])],
    ids=["killed, a spare", "rank 0 killed, from storage", "frozen"])
def test_a_lost_rank_is_replaced_and_the_losses_are_those_of_a_clean_run(
        text, clean, tmp_path, victim, signal_number, overrides):
    process = start(*command(text, tmp_path, *LONG, *overrides))
    wait_for_step(tmp_path, 13, process)
    ranks = json.loads((tmp_path / "status.json").read_text())["ranks"]
    os.kill(ranks[victim]["pid"], signal_number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert losses(tmp_path) == clean
    replaced, recovered = events(tmp_path, "rank_replaced"), events(tmp_path, "recovered")
    told = next(row for row in replaced if row["rank"] == victim)
    assert told["cause"] and told["node"] == ranks[victim]["node_rank"] and told["silent_s"] >= 0
    if signal_number == signal.SIGSTOP:
        assert told["silent_s"] >= 10  # the step timeout; how much later depends on the machine
    gone = [row["rank"] for row in replaced]  # a survivor that is slow to come back may have to go as well
    assert victim in gone and len(gone) <= 2 and len(recovered) == 1
    if "checkpoint.memory_every=0" in overrides:
        assert events(tmp_path, "resumed")[-1]["path"] != "memory"
    elif gone == [victim]:
        assert events(tmp_path, "resumed")[-1]["path"] == "memory"
    print(f"{overrides}: found after {told['silent_s']:.1f} s of silence, replaced {gone}, "
          f"next step {recovered[0]['seconds']:.1f} s after the fault was found, "
          f"{recovered[0]['lost_steps']} steps lost")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sum(summary["buckets_s"].values()) == pytest.approx(summary["measured"]["charged_s"])
    held = 2 + ("cluster.spares=1" in overrides)
    assert summary["measured"]["charged_s"] == pytest.approx(held * summary["measured"]["wall_s"], rel=0.02)
    assert (summary["buckets_s"]["spares"] > 0) == (held > 2)
    assert summary["buckets_s"]["restart"] > 0 and summary["attempts"] == 1
    after = json.loads((tmp_path / "status.json").read_text())["ranks"]
    same = [rank for rank in range(2) if after[rank]["pid"] == ranks[rank]["pid"]]
    assert same == [rank for rank in range(2) if rank not in gone]
    if signal_number == signal.SIGSTOP:
        assert "does not answer" in (tmp_path / "stacks-1.txt").read_text()


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), PATIENCE_S,
               "ranks outlive their driver")


def test_when_the_driver_is_killed_nothing_is_left_running_and_resume_goes_on(text, clean, tmp_path):
    process = start(*command(text, tmp_path, *LONG))
    wait_for_step(tmp_path, 13, process)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    process.kill()
    process.communicate()
    wait_until_gone(pids)
    charged = rows(tmp_path)[-1]["cost/usd_total"]
    done = sparing("-m", "orchestrator", "train", f"run.dir={tmp_path}", "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path) == clean
    bill = [row["cost/usd_total"] for row in rows(tmp_path)]
    first = events(tmp_path, "resumed")[-1]["step"]
    assert bill == sorted(bill) and bill[first] > charged, "what is charged never goes back"


def test_a_cluster_ends_a_run_whose_driver_is_killed_with_a_checkpoint(cluster, text, clean, tmp_path):
    process = subprocess.Popen([sys.executable, *command(text, tmp_path, "cluster=ray", *LONG, "checkpoint.every=0")],
                               cwd=ROOT, env=environment(**cluster[0]), stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path, 13, process)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    process.kill()
    process.wait()
    wait_until_gone(pids)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"] >= 13
    assert "its driver is gone" in (tmp_path / "events.jsonl").read_text()
    done = sparing("-m", "orchestrator", "train", f"run.dir={tmp_path}", "resume=auto", **cluster[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[:3] for row in losses(tmp_path)] == [row[:3] for row in clean]
