"""Rows of the fault matrix that want a cluster to themselves: run by `pytest -m long`, about a minute each.

One run after another on the same cluster, two ranks on nodes of their own, the head without room for any. All are held
against one undisturbed run on this machine.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster_harness import ROOT, Hosts, Node, hosts, wait_until, why_no_hosts
from tests.harness import write_corpus
from tests.orchestrator.cluster.runs import FOUR, TWO, events, start_here, trained, wait_for_step
from tests.orchestrator.cluster.test_hosts import QUICK, decided, launched

pytestmark = [pytest.mark.long, pytest.mark.hosts,
              pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))]
STEPS, STRUCK = 120, 12
RANK = "ray::Worker"
LEASE_S = 90
"""What ranks may take to end that have lost their controller: their lease, and a busy machine."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    text = tmp_path_factory.mktemp("text")
    write_corpus(text, 20)
    return [*FOUR, TWO, f"data.path={text}/*.txt", f"data.cache_dir={text}/cache", f"train.steps={STEPS}",
            "train.validate_every=0", "checkpoint.every=5", "checkpoint.memory_every=4", "optim.decay_fraction=0"]


@pytest.fixture(scope="module")
def clean(run, tmp_path_factory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("clean") / "run"
    return undisturbed(run, folder)


def undisturbed(run: list[str], folder: Path) -> list[tuple]:
    with start_here(2, run, folder) as process:
        out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return trained(folder)


@pytest.fixture(scope="module")
def cluster(clean):
    with hosts(4, cpus=[0, 1, 1, 1], environment=QUICK,
               hidden=[ROOT / name for name in ("model", "orchestrator", "conf")]) as running:
        yield running


def start(cluster: Hosts, tmp_path: Path, run: list[str], *others: str) -> subprocess.Popen:
    return subprocess.Popen(**launched(cluster, tmp_path, [*run, *others]), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def node_of(cluster: Hosts, tmp_path: Path, rank: int) -> Node:
    return cluster.named(json.loads((tmp_path / "hosts" / "status.json").read_text())["ranks"][rank]["host"])


def ended(job: subprocess.Popen, code: int = 0, timeout_s: float = 240) -> str:
    out, _ = job.communicate(timeout=timeout_s)
    assert job.returncode == code, out
    return out


def test_a_frozen_raylet_loses_its_rank_and_what_lives_on_there_ends(cluster, run, clean, tmp_path):
    with start(cluster, tmp_path, run) as job:
        wait_for_step(tmp_path / "hosts", STRUCK, job)
        node = node_of(cluster, tmp_path, 1)
        orphan = json.loads((tmp_path / "hosts" / "status.json").read_text())["ranks"][1]["pid"]
        (raylet,) = node.processes("raylet/raylet ")
        struck = time.time()
        node.signal(raylet, signal.SIGSTOP)
        told = decided(tmp_path, "decision", job)
        print(f"frozen raylet: found after {told['found_at'] - struck:.1f} s")
        assert told["action"] == "replace" and told["lost"] == [1]
        assert node.processes(RANK) == [orphan], "Ray has lost the node, the rank on it has not ended"
        ended(job)
    assert trained(tmp_path / "hosts") == clean
    wait_until(lambda: not node.processes(RANK), LEASE_S, "the rank on the lost node lives on")
    claims = {row["attempt"] for row in events(tmp_path / "hosts", "attempt_claimed")}
    assert len(claims) == 1
    node.kill()
    cluster.boot(node)
    cluster.wait_for(cluster.nodes)


def test_a_slow_cable_is_named_and_the_run_goes_on(cluster, run, clean, tmp_path):
    with start(cluster, tmp_path, run) as job:
        wait_for_step(tmp_path / "hosts", STRUCK, job)
        node = node_of(cluster, tmp_path, 1)
        slow = ["dev", node.link, "root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", *slow], check=True)
        try:
            told = decided(tmp_path, "slow_link", job)
        finally:
            subprocess.run(["tc", "qdisc", "delete", "dev", node.link, "root"], check=True)
        ended(job)
    assert (told["rank"], told["source"]) == (1, 0) and "between nodes" in told["cause"]
    assert not events(tmp_path / "hosts", "decision") and trained(tmp_path / "hosts") == clean


def test_a_drained_node_ends_the_run_with_a_checkpoint_and_it_goes_on_elsewhere(cluster, run, clean, tmp_path):
    with start(cluster, tmp_path, run) as job:
        wait_for_step(tmp_path / "hosts", STRUCK, job)
        node = node_of(cluster, tmp_path, 0)
        _, body = cluster.get("/api/v0/nodes")
        number = next(row["node_id"] for row in json.loads(body)["data"]["result"]["result"]
                      if row["node_ip"] == node.address and row["state"] == "ALIVE")
        cluster.head.run(["ray", "drain-node", "--node-id", number, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                          "--reason-message", "spot", "--deadline-remaining-seconds", "20"]).check_returncode()
        assert "resume=auto" in ended(job, 34)
    summary = json.loads((tmp_path / "hosts" / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"] < STEPS
    node.kill()
    with start(cluster, tmp_path, run, "resume=auto") as job:
        ended(job)
    assert trained(tmp_path / "hosts") == clean
    cluster.boot(node)
    cluster.wait_for(cluster.nodes)


def test_when_the_head_is_lost_all_ranks_end_and_the_run_goes_on_under_a_new_one(cluster, run, tmp_path):
    """The driver is on the head, and so are the controller and Ray's own memory of who exists. Ranks elsewhere train
    on until their lease is over."""
    with start(cluster, tmp_path, run, "train.steps=1000000") as job:
        wait_for_step(tmp_path / "hosts", STRUCK, job)
        workers = cluster.nodes[1:]
        assert sum(len(node.processes(RANK)) for node in workers) == 2
        cluster.head.kill()
        wait_until(lambda: not any(node.processes(RANK) for node in workers), LEASE_S, "ranks outlive the head")
        ended(job, 33)
    saved = max(row["step"] for row in events(tmp_path / "hosts", "checkpoint_saved"))
    for node in workers:
        node.kill()
    for node in cluster.nodes:
        cluster.boot(node)
    cluster.wait_for(cluster.nodes)
    more = f"train.steps={saved + 5}"
    with start(cluster, tmp_path, run, "resume=auto", more) as job:
        ended(job)
    assert trained(tmp_path / "hosts") == undisturbed([*run, more], tmp_path / "local")
