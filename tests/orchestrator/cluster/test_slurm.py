"""The filled batch file under a real Slurm: Ray over two nodes, preempted, queued again, gone on with, to the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.compose import compose_config
from orchestrator.launch import fill
from tests.cluster_harness import ROOT, wait_until
from tests.harness import write_corpus
from tests.orchestrator.cluster.runs import FOUR, losses, start_here, trained
from tests.slurm_harness import slurm, why_no_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))]
SOON = "StartTime=now+3seconds"
"""Slurm holds a job that is queued again for two minutes; started within the second of its end, slurmd refuses it."""


@pytest.fixture(scope="module")
def environment():
    with slurm(nodes=2, cpus=1) as variables:
        yield variables | {"PYTHONPATH": str(ROOT)}


def test_a_batch_job_is_preempted_queued_again_and_ends_with_the_local_losses(environment, tmp_path):
    write_corpus(tmp_path, 20)
    run = [*FOUR, f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache", "layout.pp=2", "layout.dp=1",
           "layout.ep=1", "train.steps=16", "train.validate_every=0", "hardware=cpu"]
    launch = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "launch", "launch=slurm", "cluster.nodes=2", *run,
         f"run.dir={tmp_path}/slurm"], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)

    def control(*words: str) -> None:
        subprocess.run(words, env=environment, check=True, capture_output=True)

    def job() -> dict[str, str]:
        done = subprocess.run(["scontrol", "show", "job", "1", "--oneliner"], env=environment, text=True,
                              capture_output=True)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def log() -> str:
        return "\n".join(file.read_text() for file in tmp_path.glob("runs/*.log")) + f"\n{job()}"

    metrics = tmp_path / "slurm" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 480, log, every_s=0.05)
    control("scancel", "--batch", "--signal=TERM", "1")  # what --signal=B:TERM@300 sends before the time limit
    local = start_here(2, run, tmp_path / "local")
    wait_until(lambda: job().get("Restarts") == "1" and job().get("JobState") == "PENDING", 120, log, every_s=0.2)
    saved = len(losses(tmp_path / "slurm"))
    assert 3 <= saved < 16
    control("scontrol", "update", "JobId=1", SOON)
    out, _ = launch.communicate(timeout=480)
    assert launch.returncode == 0 and "completed: 16 steps" in out and "[running, restart 1]" in out, out
    assert local.wait(240) == 0, local.stdout.read()
    assert trained(tmp_path / "slurm") == trained(tmp_path / "local")
    ranks = json.loads((tmp_path / "slurm" / "status.json").read_text())["ranks"]
    assert [rank["node_rank"] for rank in ranks] == [0, 1]
    assert not list(tmp_path.glob("runs/.token-*")) and not left_over("/tmp/ray-1/")


FAKE_RUN = """#!/bin/bash
n=$(cat {0}/starts 2> /dev/null || echo 0)
echo $((n + 1)) > {0}/starts
case $n in
0) trap 'exit 34' TERM; touch {0}/ready; while :; do sleep 0.1; done ;;
1) exit 33 ;;
*) exit 7 ;;
esac
"""


def test_a_batch_job_is_queued_again_for_some_exit_codes_and_hands_others_on(environment, tmp_path):
    """The batch file's own part, with a stand-in for the run: 34 after a signal, then 33, then 7."""
    (tmp_path / "ray").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").write_text(FAKE_RUN.format(tmp_path))
    for name in ("ray", "python"):
        (tmp_path / name).chmod(0o755)
    words = ["launch=slurm", "hardware=cpu", "layout=single", "launch.restarts=1"]
    job = fill(compose_config(words), words, stamp="20261125-120000", python=str(tmp_path / "python"), cwd=tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / job.file).write_text(job.manifest)

    def start() -> str:
        done = subprocess.run(["sbatch", "--parsable", str(tmp_path / "runs" / job.file)], env=environment, text=True,
                              capture_output=True, check=True)
        wait_until((tmp_path / "ready").exists, 60, done.stdout)
        return done.stdout.strip()

    def shown() -> dict[str, str]:
        answer = subprocess.run(["scontrol", "show", "job", number, "--oneliner"], env=environment, text=True,
                                capture_output=True)
        return dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)

    number = start()
    subprocess.run(["scancel", "--batch", "--signal=TERM", number], env=environment, check=True)
    for restart in ("1", "2"):
        wait_until(lambda restart=restart: shown()["Restarts"] == restart and shown()["JobState"] == "PENDING", 60,
                   lambda: str(shown()), every_s=0.2)
        subprocess.run(["scontrol", "update", f"JobId={number}", SOON], env=environment, check=True)
    wait_until(lambda: shown()["JobState"] == "FAILED", 60, lambda: str(shown()), every_s=0.2)
    assert shown()["ExitCode"] == "7:0" and (tmp_path / "starts").read_text() == "3\n"
    assert not list((tmp_path / "runs").glob(".token-*"))
    for name in ("starts", "ready"):
        (tmp_path / name).unlink()
    number = start()
    subprocess.run(["scancel", number], env=environment, check=True)
    wait_until(lambda: shown()["JobState"] in ("CANCELLED", "PENDING"), 60, lambda: str(shown()), every_s=0.2)
    assert shown()["JobState"] == "CANCELLED" and shown()["Restarts"] == "0"


def test_a_job_with_spares_outlives_a_lost_node(environment, tmp_path):
    """Slurm ends a job with any of its nodes, and a step too, unless told otherwise."""
    (tmp_path / "ray").write_text(f"#!/bin/sh\ntouch {tmp_path}/ray-$SLURM_STEP_ID\nexec sleep 600\n")
    (tmp_path / "python").write_text(f"#!/bin/sh\nuntil [ -e {tmp_path}/over ]; do sleep 0.1; done\n")
    for name in ("ray", "python"):
        (tmp_path / name).chmod(0o755)
    words = ["launch=slurm", "hardware=cpu", "layout=single", "cluster.ranks_per_node=1", "cluster.spares=1"]
    job = fill(compose_config(words), words, stamp="20261125-120000", python=str(tmp_path / "python"), cwd=tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / job.file).write_text(job.manifest)

    def control(*command: str) -> str:
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.strip()

    def shown() -> str:
        return control("scontrol", "show", "job", number, "--oneliner")

    number = control("sbatch", "--parsable", str(tmp_path / "runs" / job.file))
    wait_until((tmp_path / "ray-0").exists, 60, shown)
    control("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=lost")
    wait_until(lambda: "NumNodes=1 " in shown() or "JobState=RUNNING" not in shown(), 60, shown, every_s=0.2)
    assert "JobState=RUNNING" in shown() and "NodeList=n0 " in shown()
    (tmp_path / "over").touch()
    wait_until(lambda: "JobState=COMPLETED" in shown(), 60, shown, every_s=0.2)


def left_over(word: str) -> list[Path]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                found.append(folder)
        except OSError:
            continue
    return found
