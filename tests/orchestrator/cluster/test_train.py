"""Whole runs through the command line, on Ray actors and under torchrun. Tiny model, a few files of text."""

import contextlib
import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_harness import wait_until
from tests.orchestrator.cluster.runs import (
    PATIENCE_S,
    PLANTED,
    ROOT,
    TWO,
    ask,
    command,
    environment,
    losses,
    overrides,
    reached,
    sparing,
    start,
    wait_for_step,
    wait_until_gone,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of two simulated nodes with a rank each."""
    folder = tmp_path_factory.mktemp("ray") / "run"
    done = sparing(*command(text, folder, TWO, "cluster=local", "cluster.nodes=2", "cluster.ranks_per_node=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_a_run_on_ray_ends_with_its_figures_and_says_nothing_on_stderr(whole):
    folder, done = whole
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert any(line.startswith("completed: 8 steps") for line in lines)
    assert lines[-2].startswith("run ") and lines[-1].startswith("next      sparing report ")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["attempts"] == 1 and summary["usd_total"] > 0
    assert sum(summary["buckets_s"].values()) == pytest.approx(summary["measured"]["charged_s"])
    assert {"config.yaml", "events.jsonl", "checkpoints", "status.json"} <= {path.name for path in folder.iterdir()}


def test_status_tells_who_hosts_what(whole):
    folder, _ = whole
    ranks = json.loads((folder / "status.json").read_text())["ranks"]
    assert [rank["node_rank"] for rank in ranks] == [0, 1]
    assert [rank["stages"] for rank in ranks] == [[0], [0]]
    assert [rank["experts"] for rank in ranks] == [[0, 4], [4, 8]]
    tokens = 8 * 16 * 32
    for layer in ranks[0]["tokens_per_expert"]:
        assert sum(sum(rank["tokens_per_expert"][layer]) for rank in ranks) == 2 * tokens
    shown = sparing("-m", "orchestrator", "status", str(folder), COLUMNS="160")
    assert shown.returncode == 0 and "completed, step 8 of 8" in shown.stdout and "4-7" in shown.stdout


def test_torchrun_gives_the_same_losses_bit_for_bit(text, whole, tmp_path):
    done = sparing("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                   *command(text, tmp_path / "run", TWO), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == losses(whole[0])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_sigterm_saves_and_resume_auto_goes_on_with_the_runs_own_config(text, whole, tmp_path):
    process = start(*command(text, tmp_path, TWO, "train.steps=400", "checkpoint.every=0", "optim.decay_fraction=0"),
                    under=("timeout", "600"))  # which passes the signal on to its whole process group
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (34, ""), out + err
    assert "resume=auto" in out.splitlines()[-1], out
    reached = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert 3 <= reached < 400
    done = sparing("-m", "orchestrator", "train", f"run.dir={tmp_path}", "resume=auto", f"train.steps={reached + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == reached + 2 and summary["attempts"] == 2
    assert [row[0] for row in losses(tmp_path)] == list(range(1, reached + 3))


EARLY = """
import atexit, os, signal, sys, time
import ray
from orchestrator.cluster import preflight, session
from orchestrator.__main__ import main

def struck(real):
    def call(*arguments, **options):
        result = real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return result
    return call

owner, name = {"ray": (ray, "init"), "nodes": (preflight, "checked_request"), "stop": (session, "stop_signals")}[
    sys.argv[1]]
setattr(owner, name, struck(getattr(owner, name)))
atexit.register(time.sleep, 4)  # a busy machine: where Ray's handler is in place, the process has three seconds
raise SystemExit(main(sys.argv[2:]))
"""
"""A run that is sent SIGTERM as Ray has started, as its nodes are there, or as it is ready for such signals."""


@pytest.mark.parametrize("moment, said", [("ray", "before there were ranks"), ("nodes", "before there were ranks"),
                                          ("stop", "")])
def test_sigterm_before_there_are_ranks_is_a_preemption(cluster, text, tmp_path, moment, said):
    """Slurm starts such a run again, and not one that its signal has killed."""
    run = command(text, tmp_path, "cluster=ray", TWO)[2:]
    done = sparing("-c", EARLY, moment, *run, **cluster[0])
    assert done.returncode == 34 and said in done.stderr and (moment == "ray" or "***" not in done.stderr), done.stderr


@contextlib.contextmanager
def arguments_seen() -> Iterator[set[bytes]]:
    """The command lines of all processes on this machine, collected until the end."""
    seen, over = set(), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(file.read_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_launch_hands_a_run_to_a_ray_cluster_and_no_secret_is_left_anywhere(cluster, text, whole, tmp_path):
    variables, dashboard, session = cluster
    with arguments_seen() as arguments:
        launched = subprocess.run(
            [sys.executable, "-m", "orchestrator", "launch", "launch=ray_job", f"launch.address={dashboard}",
             *overrides(text, tmp_path / "run", TWO, "tracker.wandb=offline")], cwd=tmp_path, capture_output=True,
            text=True, timeout=240, env=environment(**variables))
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "completed: 8 steps" in launched.stdout
    assert losses(tmp_path / "run") == losses(whole[0])
    report = sparing("-m", "orchestrator", "report", str(tmp_path / "run"), **variables)
    assert report.returncode == 0 and (tmp_path / "run" / "report.html").exists()
    jobs = json.dumps(ask(f"{dashboard}/api/jobs/")).encode()
    left = {str(path): path.read_bytes() for folder in (tmp_path, session) for path in folder.rglob("*")
            if path.is_file()}
    assert any("/wandb/" in path for path in left) and any("job-driver" in path for path in left)
    assert any(b"ray_job" in line for line in arguments)
    left |= {"output": (launched.stdout + launched.stderr + report.stdout + report.stderr).encode(),
             "what the dashboard says of jobs": jobs, "arguments": b"\n".join(arguments)}
    for name, secret in PLANTED.items():
        assert [path for path, content in left.items() if secret.encode() in content] == [], name


def test_ray_job_stop_ends_a_run_with_a_checkpoint(cluster, text, tmp_path):
    """Ray gives the driver three seconds, its keeper does the rest. What its command does, without its start-up."""
    run = command(text, tmp_path, TWO, "train.steps=2000", "checkpoint.every=0")
    job = ask(f"{cluster[1]}/api/jobs/", entrypoint=shlex.join(["python", *run]))["submission_id"]
    wait_until(lambda: reached(tmp_path, 3), PATIENCE_S, "step 3 was not reached")
    assert ask(f"{cluster[1]}/api/jobs/{job}/stop", job=job)["stopped"]
    wait_until((tmp_path / "summary.json").exists, PATIENCE_S, "the run has not ended by itself")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"]


def test_a_cluster_ends_a_run_whose_driver_is_killed_with_a_checkpoint(cluster, text, tmp_path):
    run = command(text, tmp_path, "cluster=ray", TWO, "train.steps=2000", "checkpoint.every=0")
    process = subprocess.Popen([sys.executable, *run], cwd=ROOT, env=environment(**cluster[0]),
                               stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path, 3, process)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    process.kill()
    process.wait()
    wait_until_gone(pids)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"] >= 3
    assert "its driver is gone" in (tmp_path / "events.jsonl").read_text()


def test_a_cluster_without_room_says_what_is_missing(cluster, text, tmp_path):
    done = sparing(*command(text, tmp_path, "cluster=ray", "layout.pp=4", "layout.microbatches=4"),
                   **cluster[0])
    assert done.returncode == 3 and "8 ranks want 1 free CPU each, 4 can have that" in done.stderr
    done = sparing(*command(text, tmp_path, "cluster=ray", "cluster.nodes=2"), **cluster[0])
    assert done.returncode == 3 and "2 nodes with 2 free CPUs each are wanted, 1 such are there" in done.stderr
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        absent = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = sparing(*command(text, tmp_path, "cluster=ray"), **cluster[0] | {"RAY_ADDRESS": absent})
    assert done.returncode == 3 and "no Ray cluster is reachable" in done.stderr and "Traceback" not in done.stderr
