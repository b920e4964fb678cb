"""What runs on several nodes: a real Ray cluster, each node in its own namespaces, a client outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster_harness import ROOT, hosts, why_no_hosts

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))]
RUN = ["experiment=tiny", "model.dim=48", "model.inter_dim=96", "model.moe_inter_dim=32", "train.seq_len=32",
       "train.steps=6", "train.validate_every=3", "train.validate_sequences=16", "checkpoint.every=3",
       "data.validation_fraction=0.2", "optim.warmup_steps=2", "cluster.threads_per_rank=1", "tracker=off"]


@pytest.fixture(scope="module")
def cluster():
    """Room for four ranks: two on one node, so that one expert-parallel group lies inside a node, one across."""
    with hosts(3, cpus=[2, 1, 1], hidden=[ROOT / "model", ROOT / "orchestrator", ROOT / "conf"]) as running:
        yield running


def losses(run_dir: Path) -> list[tuple]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [tuple(row.get(key) for key in ("step", "train/loss", "train/grad_norm", "validation/loss"))
            for row in rows]


def test_nobody_talks_to_the_cluster_without_its_token(cluster):
    assert cluster.get("/api/jobs/", authenticated=False)[0] == 401
    assert cluster.get("/api/jobs/") == (200, b"[]")
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0


def test_a_job_from_outside_runs_across_the_nodes_with_the_local_losses(cluster, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("".join(f"line {j} of file {i}: {j * i % 13}\n" for j in range(120)))
    run = [*RUN, f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache"]
    here = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    local = subprocess.Popen([sys.executable, "-m", "orchestrator", "train", *run, f"run.dir={tmp_path}/local"],
                             cwd=ROOT, env=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    job = subprocess.run([sys.executable, "-m", "orchestrator", "launch", "launch=ray_job", *run,
                          f"run.dir={tmp_path}/hosts"], cwd=tmp_path, text=True, capture_output=True, timeout=240,
                         env=cluster.client | {"PYTHONPATH": str(ROOT)})
    assert job.returncode == 0 and "completed: 6 steps" in job.stdout, job.stdout + job.stderr
    assert local.wait(240) == 0, local.stdout.read()
    ranks = json.loads((tmp_path / "hosts" / "status.json").read_text())["ranks"]
    assert [rank["node_rank"] for rank in ranks] == [0, 0, 1, 2]
    assert {rank["host"] for rank in ranks} == {node.name for node in cluster.nodes}
    assert losses(tmp_path / "hosts") == losses(tmp_path / "local")
