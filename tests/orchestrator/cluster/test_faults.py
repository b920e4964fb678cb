"""Real faults of whole runs: what happens, what it costs, and that the losses are those of a run without them."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.cluster.session import ray_session
from orchestrator.cluster.worker import LEASE_S
from orchestrator.compose import compose_config
from orchestrator.config import ClusterKind
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
    reached,
    rows,
    start,
    wait_for_step,
    wait_until_gone,
)

pytestmark = pytest.mark.ray
SCRIPTED = """
import os, sys, threading, time

def patch():
    while not hasattr(sys.modules.get("orchestrator.train.loop"), "_due"):
        time.sleep(0.005)
    Trainer = sys.modules["orchestrator.train.loop"].Trainer
    original = Trainer._step

    def step(self, tokens):
        if self.mesh.info.rank == 1 and self.progress.step == 3:
            if os.path.exists(self.config.run.dir + "/raises"):
                raise ZeroDivisionError("scripted failure")
            if os.path.exists(self.config.run.dir + "/exits"):
                os._exit(9)
        if self.progress.step >= 8 and os.path.exists(self.config.run.dir + "/lingers"):
            time.sleep(1)
        return original(self, tokens)

    Trainer._step = step

threading.Thread(target=patch, daemon=True).start()
"""
"""In every process of the runs: what its step does if the run directory holds such a file."""


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


def test_a_rank_that_fails_ends_the_run_with_its_own_error(text, ray_here, tmp_path, capsys):
    (tmp_path / "raises").touch()
    assert main(["train", *overrides(text, tmp_path, TWO)]) == 1
    told = capsys.readouterr().err
    assert "rank 1 on node 0: ZeroDivisionError: scripted failure" in told and "Traceback" not in told
    assert "scripted failure" in (tmp_path / "error.txt").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 3 and summary["usd_total"] > 0
    assert events(tmp_path, "rank_replaced"), "a first failure is tried again, the same one is not"
    (tmp_path / "raises").unlink()
    assert main(["train", f"run.dir={tmp_path}", "resume=auto"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["attempts"] == 2


def test_a_crash_loop_ends_with_its_own_exit_code_and_its_bill(text, ray_here, tmp_path, capsys):
    """Ranks that die again and again at the same step, each by itself: no error to compare, only no progress."""
    (tmp_path / "exits").touch()
    assert main(["train", *overrides(text, tmp_path, TWO)]) == 93
    told = capsys.readouterr().err
    assert "3 faults without progress since step 3" in told and "Traceback" not in told
    found = events(tmp_path, "decision")
    assert [(row["action"], row["rank"]) for row in found] == [("replace", 1)] * 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["usd_total"] > 0
    assert summary["measured"]["charged_s"] == pytest.approx(2 * summary["measured"]["wall_s"], rel=0.02)


@pytest.mark.parametrize("victim, signal_number, also", [
    (1, signal.SIGKILL, ["cluster.spares=1"]), (0, signal.SIGKILL, ["checkpoint.memory_every=0"]),
    (1, signal.SIGSTOP, ["cluster.step_timeout_s=10"])],
    ids=["killed, a spare", "rank 0 killed, from storage", "frozen"])
def test_a_lost_rank_is_replaced_and_the_losses_are_those_of_a_clean_run(
        text, clean, tmp_path, victim, signal_number, also):
    def strike() -> list[dict]:
        wait_until(lambda: reached(tmp_path, STRUCK), PATIENCE_S, f"step {STRUCK} was not reached")
        wait_until(lambda: "checkpoint.memory_every=0" not in also or has_saved(tmp_path), PATIENCE_S, "nothing saved")
        ranks = json.loads((tmp_path / "status.json").read_text())["ranks"]
        os.kill(ranks[victim]["pid"], signal_number)
        return ranks

    with ThreadPoolExecutor(1) as pool:
        struck = pool.submit(strike)
        assert main(["train", *overrides(text, tmp_path, *LONG, *also)]) == 0
        ranks = struck.result()
    assert losses(tmp_path) == clean
    replaced, recovered = events(tmp_path, "rank_replaced"), events(tmp_path, "recovered")
    told = next(row for row in replaced if row["rank"] == victim)
    assert told["cause"] and told["node"] == ranks[victim]["node_rank"] and told["silent_s"] >= 0
    if signal_number == signal.SIGSTOP:
        assert told["silent_s"] >= 10  # the step timeout; how much later depends on the machine
    gone = [row["rank"] for row in replaced]  # a survivor that is slow to come back may have to go as well
    assert victim in gone and len(gone) <= 2 and len(recovered) == 1
    if "checkpoint.memory_every=0" in also:
        assert events(tmp_path, "resumed")[-1]["path"] != "memory"
    elif gone == [victim]:
        assert events(tmp_path, "resumed")[-1]["path"] == "memory"
    print(f"{also}: found after {told['silent_s']:.1f} s of silence, replaced {gone}, "
          f"next step {recovered[0]['seconds']:.1f} s after the fault was found, "
          f"{recovered[0]['lost_steps']} steps lost")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sum(summary["buckets_s"].values()) == pytest.approx(summary["measured"]["charged_s"])
    held = 2 + ("cluster.spares=1" in also)
    assert summary["measured"]["charged_s"] == pytest.approx(held * summary["measured"]["wall_s"], rel=0.02)
    assert (summary["buckets_s"]["spares"] > 0) == (held > 2)
    assert summary["buckets_s"]["restart"] > 0 and summary["attempts"] == 1
    after = json.loads((tmp_path / "status.json").read_text())["ranks"]
    same = [rank for rank in range(2) if after[rank]["pid"] == ranks[rank]["pid"]]
    assert same == [rank for rank in range(2) if rank not in gone]
    if signal_number == signal.SIGSTOP:
        assert "does not answer" in (tmp_path / "stacks-1.txt").read_text()


SUBREAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
subprocess.Popen(sys.argv[1:])
while True:
    os.wait()
"""
"""What orphans are left to on many desktops and in some containers, instead of process 1 (PR_SET_CHILD_SUBREAPER)."""


def test_when_the_driver_is_killed_nothing_is_left_running_and_resume_goes_on(text, clean, site, tmp_path):
    """Ranks take a moment to end, in which they would come to the end of the run, but for their slow steps."""
    (tmp_path / "lingers").touch()
    process = start(*command(text, tmp_path, *LONG), under=(sys.executable, "-c", SUBREAPER),
                    PYTHONPATH=f"{ROOT}:{site}")
    wait_for_step(tmp_path, STRUCK, process)
    wait_until(lambda: has_saved(tmp_path), PATIENCE_S, "nothing saved")
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    os.kill(events(tmp_path, "attempt_claimed")[0]["pid"], signal.SIGKILL)
    wait_until_gone(pids, LEASE_S - 10)
    process.kill()
    process.communicate()
    (tmp_path / "lingers").unlink()
    charged = rows(tmp_path)[-1]["cost/usd_total"]
    assert main(["train", f"run.dir={tmp_path}", "resume=auto"]) == 0
    assert losses(tmp_path) == clean
    bill = [row["cost/usd_total"] for row in rows(tmp_path)]
    first = events(tmp_path, "resumed")[-1]["step"]
    assert bill == sorted(bill) and bill[first] > charged, "what is charged never goes back"
