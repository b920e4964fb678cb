"""Whole runs of a tiny model through the command line: how tests start them and read what they leave."""

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.cluster_harness import wait_until

ROOT = Path(__file__).parents[3]
# With a peak that is given: measuring it would take a good part of so short a run.
FOUR = ["experiment=tiny", "model.dim=48", "model.inter_dim=96", "model.moe_inter_dim=32", "train.seq_len=32",
        "train.steps=8", "train.validate_every=4", "train.validate_sequences=16", "checkpoint.every=2",
        "checkpoint.keep=0", "data.validation_fraction=0.2", "optim.warmup_steps=2", "cluster.threads_per_rank=1",
        "tracker=off", "hardware.fp32_tflops=0.1"]
TWO = "layout.pp=1"
"""Two of the ranks: less to start, and as much to lose."""
LONG = [TWO, "train.steps=20", "checkpoint.every=5", "checkpoint.memory_every=5", "train.validate_every=0"]
STRUCK = 8
"""Steps of a long run after which something happens to it."""
PATIENCE_S = 180
"""For whatever a run is waited for."""
PLANTED = {"WANDB_API_KEY": secrets.token_hex(20), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
           "HF_TOKEN": secrets.token_hex(20), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Secrets in the environment of the cluster and of whoever submits to it."""


def overrides(text: Path, run_dir: Path | str, *others: str) -> list[str]:
    return [*FOUR, f"data.path={text}/*.txt", f"data.cache_dir={text}/cache", f"run.dir={run_dir}", *others]


def command(text: Path, run_dir: Path | str, *others: str) -> list[str]:
    return ["-m", "orchestrator", "train", *overrides(text, run_dir, *others)]


def environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path} | variables


def sparing(*arguments: str, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(**variables), text=True,
                          capture_output=True, timeout=timeout)


def start(*arguments: str, under: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
    return subprocess.Popen([*under, sys.executable, *arguments], cwd=ROOT, env=environment(**variables), text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ask(url: str, **values: str):
    """What Ray's job server says, with the token of the environment above; `values` are posted."""
    request = urllib.request.Request(url, data=json.dumps(values).encode() if values else None, headers={
        "Authorization": f"Bearer {PLANTED['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def start_here(ranks: int, run: list[str], run_dir: Path, **variables: str) -> subprocess.Popen:
    """The same run on this machine, to compare with: under torchrun, which needs no Ray to start."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                             "-m", "orchestrator", "train", *run, f"run.dir={run_dir}"], cwd=ROOT, text=True,
                            env=environment(OMP_NUM_THREADS="1", **variables), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple]:
    keys = ("step", "train/loss", "train/grad_norm", "validation/loss")
    return [tuple(row.get(key) for key in keys) for row in rows(run_dir)]


def trained(run_dir: Path) -> list[tuple]:
    """Without the validations: a run that is stopped makes one of its own."""
    return [row[:3] for row in losses(run_dir)]


def reached(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= step


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    wait_until(lambda: reached(run_dir, step) or process.poll() is not None, PATIENCE_S,
               f"step {step} was not reached")
    assert process.poll() is None, process.communicate()


def has_saved(run_dir: Path) -> bool:
    """Whether the run would go on from storage: a checkpoint is written beside the steps and may take its time."""
    return bool(events(run_dir, "checkpoint_saved"))


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), PATIENCE_S,
               "ranks outlive their driver")


def events(run_dir: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()) if row["kind"] == kind]
