"""What runs on several nodes: a real Ray cluster, each node in its own namespaces, a client outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster_harness import ROOT, hosts, wait_until, why_no_hosts
from tests.harness import write_corpus
from tests.orchestrator.cluster.runs import FOUR, PATIENCE_S, losses, start_here

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))]
QUICK = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "1000",
         "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""To call a node dead whose cable is cut within seconds."""
COMPARED = 40
"""Steps, with those of one rank alone. Later ones differ more and more: rounding decides a choice of experts."""


@pytest.fixture(scope="module")
def cluster():
    """Room for four ranks: two on one node, so that one expert-parallel group lies inside a node, one across."""
    with hosts(3, cpus=[2, 1, 1], hidden=[ROOT / "model", ROOT / "orchestrator", ROOT / "conf"],
               environment=QUICK) as running:
        yield running


def test_nobody_talks_to_the_cluster_without_its_token(cluster):
    assert cluster.get("/api/jobs/", authenticated=False)[0] == 401
    assert cluster.get("/api/jobs/") == (200, b"[]")
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0


@pytest.fixture
def run(tmp_path):
    write_corpus(tmp_path, 20)
    return [*FOUR, f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache"]


def launched(cluster, tmp_path: Path, run: list[str]) -> dict:
    command = [sys.executable, "-m", "orchestrator", "launch", "launch=ray_job", *run, f"run.dir={tmp_path}/hosts"]
    return {"args": command, "cwd": tmp_path, "text": True,
            "env": cluster.client | {"PYTHONPATH": str(ROOT)}}


def test_a_job_from_outside_runs_across_the_nodes_with_the_local_losses(cluster, run, tmp_path):
    local = start_here(4, run, tmp_path / "local")
    job = subprocess.run(**launched(cluster, tmp_path, run), capture_output=True, timeout=240)
    assert job.returncode == 0 and "completed: 8 steps" in job.stdout, job.stdout + job.stderr
    assert local.wait(240) == 0, local.stdout.read()
    ranks = json.loads((tmp_path / "hosts" / "status.json").read_text())["ranks"]
    assert [rank["node_rank"] for rank in ranks] == [0, 0, 1, 2]
    assert {rank["host"] for rank in ranks} == {node.name for node in cluster.nodes}
    assert losses(tmp_path / "hosts") == losses(tmp_path / "local")


def test_a_run_shrinks_when_nodes_are_lost_and_grows_when_they_return(cluster, run, tmp_path):
    """One node powered off, processes of the others killed meanwhile, the node back, then a cable cut: no step lost or
    doubled, losses as if nothing had been."""
    run = [*run, "train.validate_every=0", "checkpoint.every=1000", "checkpoint.memory_every=2", "optim.lr=1e-5",
           "optim.decay_fraction=0", "layout.pp=1"]
    alone = ["layout.dp=1", "layout.ep=1", f"train.steps={COMPARED}", "checkpoint.memory_every=0"]
    local = start_here(1, [*run, *alone], tmp_path / "local")
    elastic = launched(cluster, tmp_path, [*run, "layout.dp=4", "train.steps=1000000", "cluster.min_ranks=2"])
    with subprocess.Popen(**elastic, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0) as job:
        try:
            decided(tmp_path, "attempt_started", job)
            wait_until(lambda: len(losses(tmp_path / "hosts")) > 3, PATIENCE_S, "no steps")
            cluster.nodes[2].kill()
            assert decided(tmp_path, "decision", job, 1)["ranks"] == 2
            for number in (2, 3):  # the one actor to spare, then one placed while the node is away
                decided(tmp_path, "recovered", job, number - 1)
                wait_until(lambda at=6 * number: len(losses(tmp_path / "hosts")) > at, PATIENCE_S, "no progress")
                kill_rank(cluster, tmp_path, 1)
                told = decided(tmp_path, "decision", job, number)
                assert (told["action"], told["ranks"], told["lost"]) == ("replace", 2, [1])
            decided(tmp_path, "recovered", job, 3)
            cluster.boot(cluster.nodes[2])
            assert decided(tmp_path, "decision", job, 4)["ranks"] == 4
            decided(tmp_path, "recovered", job, 4)
            cluster.nodes[1].cut()
            assert decided(tmp_path, "decision", job, 5)["ranks"] == 2
            decided(tmp_path, "recovered", job, 5)
            cluster.head.signal(cluster.head.processes("orchestrator train")[-1], signal.SIGTERM)
            out, _ = job.communicate(timeout=PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 34, out
    assert local.wait(240) == 0, local.stdout.read()
    there, here = losses(tmp_path / "hosts"), losses(tmp_path / "local")
    assert [row[0] for row in there] == list(range(1, len(there) + 1))
    compared = min(len(there), len(here))
    assert [row[1] for row in there[:compared]] == pytest.approx([row[1] for row in here[:compared]], rel=1e-5)


def kill_rank(cluster, tmp_path: Path, rank: int) -> None:
    """Once the status is that of the present ranks."""
    begun = max(json.loads(line)["time"] for line in (tmp_path / "hosts" / "events.jsonl").read_text().splitlines())
    status = wait_until(lambda: (found := json.loads((tmp_path / "hosts" / "status.json").read_text()))["time"] > begun
                        and found, PATIENCE_S, "no new status")
    home = status["ranks"][rank]
    cluster.named(home["host"]).signal(home["pid"], signal.SIGKILL)


def decided(tmp_path: Path, kind: str, job: subprocess.Popen, number: int = 1) -> dict:
    """The run's event of a kind, as soon as there are so many."""
    def found() -> dict | None:
        assert job.poll() is None, job.stdout.read()
        path = tmp_path / "hosts" / "events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [row for row in rows if row["kind"] == kind]
        return rows[number - 1] if len(rows) >= number else None

    return wait_until(found, PATIENCE_S, f"no {kind} {number}")
