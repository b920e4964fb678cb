"""Whole runs through the command line, on Ray actors and under torchrun. Tiny model, a few files of text."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import free_port

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[3]
FOUR = ["experiment=tiny", "model.dim=48", "model.inter_dim=96", "model.moe_inter_dim=32", "train.seq_len=32",
        "train.steps=8", "train.validate_every=4", "train.validate_sequences=16", "checkpoint.every=2",
        "checkpoint.keep=0", "data.validation_fraction=0.2", "optim.warmup_steps=2", "tracker=off"]
FAIL_AT = """
import os, sys, threading, time

def patch():
    while not hasattr(sys.modules.get("orchestrator.train.loop"), "moe_layer_names"):
        time.sleep(0.005)
    Trainer = sys.modules["orchestrator.train.loop"].Trainer
    original = Trainer._step

    def step(self, tokens):
        if self.mesh.info.rank == 2 and self.progress.step == 3:
            raise ZeroDivisionError("scripted failure")
        return original(self, tokens)

    Trainer._step = step

threading.Thread(target=patch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of file {i}: {j * i % 13}\n" for j in range(120)))
    return folder


def command(text: Path, run_dir: Path | str, *overrides: str) -> list[str]:
    return ["-m", "orchestrator", "train", *FOUR, f"data.path={text}/*.txt", f"data.cache_dir={text}/cache",
            f"run.dir={run_dir}", *overrides]


def environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path} | variables


def sparing(*arguments: str, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(**variables), text=True,
                          capture_output=True, timeout=timeout)


def start(*arguments: str, under: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen([*under, sys.executable, *arguments], cwd=ROOT, env=environment(), text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple]:
    keys = ("step", "train/loss", "train/grad_norm", "validation/loss")
    return [tuple(row.get(key) for key in keys) for row in rows(run_dir)]


def wait_until(condition, otherwise: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def reached(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= step


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    wait_until(lambda: reached(run_dir, step) or process.poll() is not None, f"step {step} was not reached")
    assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of two simulated nodes with two ranks each."""
    folder = tmp_path_factory.mktemp("ray") / "run"
    done = sparing(*command(text, folder, "cluster=local", "cluster.nodes=2", "cluster.ranks_per_node=2"))
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
    assert [rank["node_rank"] for rank in ranks] == [0, 0, 1, 1]
    assert [rank["stages"] for rank in ranks] == [[0], [0], [1], [1]]
    assert [rank["experts"] for rank in ranks] == [[0, 4], [4, 8], [0, 4], [4, 8]]
    tokens = 8 * 16 * 32
    for pair in (ranks[:2], ranks[2:]):
        for layer in pair[0]["tokens_per_expert"]:
            assert sum(sum(rank["tokens_per_expert"][layer]) for rank in pair) == 2 * tokens
    shown = sparing("-m", "orchestrator", "status", str(folder), COLUMNS="160")
    assert shown.returncode == 0 and "completed, step 8 of 8" in shown.stdout and "4-7" in shown.stdout


def test_torchrun_gives_the_same_losses_bit_for_bit(text, whole, tmp_path):
    done = sparing("-m", "torch.distributed.run", "--nproc-per-node=4", f"--master-port={free_port()}",
                   *command(text, tmp_path / "run"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == losses(whole[0])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_sigterm_saves_and_resume_auto_goes_on_with_the_runs_own_config(text, whole, tmp_path):
    process = start(*command(text, tmp_path, "train.steps=400", "checkpoint.every=0", "optim.decay_fraction=0"),
                    under=("timeout", "600"))  # which passes the signal on to its whole process group
    wait_for_step(tmp_path, 3, process)
    in_use = sparing(*command(text, tmp_path, "resume=auto"))
    assert in_use.returncode == 2 and "in use by a live run (process " in in_use.stderr
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


def test_a_rank_that_fails_ends_the_run_with_its_own_error(text, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAIL_AT)
    done = sparing(*command(text, tmp_path / "run"), PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 1
    assert "rank 2 on node 0: ZeroDivisionError: scripted failure" in done.stderr and "Traceback" not in done.stderr
    assert "scripted failure" in (tmp_path / "run" / "error.txt").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 3 and summary["usd_total"] > 0
    assert events(tmp_path / "run", "rank_replaced"), "a first failure is tried again, the same one is not"
    again = sparing(*command(text, tmp_path / "run", "resume=auto"))
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["attempts"] == 2


CRASH_LOOP = FAIL_AT.replace('raise ZeroDivisionError("scripted failure")', "os._exit(9)")


def test_a_crash_loop_ends_with_its_own_exit_code_and_its_bill(text, tmp_path):
    """Ranks that die again and again at the same step, each by itself: no error to compare, only no progress."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASH_LOOP)
    done = sparing(*command(text, tmp_path / "run"), PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 93, done.stdout + done.stderr
    assert "3 faults without progress since step 3" in done.stderr and "Traceback" not in done.stderr
    found = events(tmp_path / "run", "decision")
    assert [(row["action"], row["rank"]) for row in found] == [("replace", 2)] * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["usd_total"] > 0
    assert summary["measured"]["charged_s"] == pytest.approx(4 * summary["measured"]["wall_s"], rel=0.02)


LONG = ["train.steps=60", "checkpoint.every=20", "checkpoint.memory_every=5", "train.validate_every=0"]


@pytest.fixture(scope="module")
def clean(text, tmp_path_factory) -> list[tuple]:
    """Losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    done = sparing(*command(text, folder, *LONG))
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder)


def events(run_dir: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()) if row["kind"] == kind]


@pytest.mark.parametrize("victim, signal_number, overrides", [
    (1, signal.SIGKILL, ["cluster.spares=1"]), (0, signal.SIGKILL, ["checkpoint.memory_every=0"]),
    (2, signal.SIGSTOP, [])], ids=["killed, a spare", "rank 0 killed, from storage", "frozen"])
def test_a_lost_rank_is_replaced_and_the_losses_are_those_of_a_clean_run(
        text, clean, tmp_path, victim, signal_number, overrides):
    process = start(*command(text, tmp_path, *LONG, "cluster.step_timeout_s=4", *overrides))
    wait_for_step(tmp_path, 23, process)
    ranks = json.loads((tmp_path / "status.json").read_text())["ranks"]
    os.kill(ranks[victim]["pid"], signal_number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert losses(tmp_path) == clean
    replaced, recovered = events(tmp_path, "rank_replaced"), events(tmp_path, "recovered")
    told = next(row for row in replaced if row["rank"] == victim)
    assert told["cause"] and told["node"] == ranks[victim]["node_rank"] and told["silent_s"] >= 0
    if signal_number == signal.SIGSTOP:
        assert told["silent_s"] >= 4  # the step timeout; how much later depends on the machine
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
    held = 4 + ("cluster.spares=1" in overrides)
    assert summary["measured"]["charged_s"] == pytest.approx(held * summary["measured"]["wall_s"], rel=0.02)
    assert (summary["buckets_s"]["spares"] > 0) == (held > 4)
    assert summary["buckets_s"]["restart"] > 0 and summary["attempts"] == 1
    after = json.loads((tmp_path / "status.json").read_text())["ranks"]
    same = [rank for rank in range(4) if after[rank]["pid"] == ranks[rank]["pid"]]
    assert same == [rank for rank in range(4) if rank not in gone]
    if signal_number == signal.SIGSTOP:
        assert "does not answer" in (tmp_path / "stacks-1.txt").read_text()


def test_when_the_driver_is_killed_nothing_is_left_running_and_resume_goes_on(text, clean, tmp_path):
    process = start(*command(text, tmp_path, *LONG))
    wait_for_step(tmp_path, 23, process)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    process.kill()
    process.communicate()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "ranks outlive their driver")
    dropped = [row for row in rows(tmp_path) if row["step"] > 20]
    done = sparing("-m", "orchestrator", "train", f"run.dir={tmp_path}", "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path) == clean
    bill = [row["cost/usd_total"] for row in rows(tmp_path)]
    assert bill == sorted(bill) and bill[20] > dropped[-1]["cost/usd_total"], "what is charged never goes back"


PLANTED = {"WANDB_API_KEY": secrets.token_hex(20), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
           "HF_TOKEN": secrets.token_hex(20), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Secrets in the environment of the cluster and of whoever submits to it."""


@pytest.fixture(scope="module")
def cluster():
    """A Ray head with four CPUs and a job server, on loopback, with token authentication; its session's folder."""
    port, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    log = Path(folder, "start.log")
    with open(log, "w") as out:
        head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--head",
                                 "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4",
                                 f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                                 f"--dashboard-agent-listen-port={free_port()}",
                                 "--disable-usage-stats", f"--temp-dir={folder}"], stdout=out, stderr=out,
                                env=environment(RAY_AUTH_MODE="token", **PLANTED))
    deadline = time.monotonic() + 180
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    there = environment(RAY_AUTH_MODE="token", PYTHONPATH="", **PLANTED)
    while subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
                          f"http://127.0.0.1:{dashboard}", "--", "true"], capture_output=True, env=there).returncode:
        assert time.monotonic() < deadline, "no agent takes a job"
    yield ({"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", **PLANTED}, f"http://127.0.0.1:{dashboard}",
           Path(folder))
    head.terminate()  # not `ray stop`, which ends every Ray of the machine
    head.wait(60)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def arguments_seen() -> Iterator[set[bytes]]:
    """The command lines of all processes on this machine, collected until the end."""
    seen, over = set(), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(file.read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    yield seen
    over.set()
    thread.join()


def test_launch_hands_a_run_to_a_ray_cluster_and_no_secret_is_left_anywhere(cluster, text, whole, tmp_path):
    variables, dashboard, session = cluster
    with arguments_seen() as arguments:
        launched = subprocess.run(
            [sys.executable, "-m", "orchestrator", "launch", "launch=ray_job", f"launch.address={dashboard}",
             *command(text, tmp_path / "run", "tracker.wandb=offline")[3:]], cwd=tmp_path, capture_output=True,
            text=True, timeout=240, env=environment(**variables))
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "completed: 8 steps" in launched.stdout
    assert losses(tmp_path / "run") == losses(whole[0])
    report = sparing("-m", "orchestrator", "report", str(tmp_path / "run"), **variables)
    assert report.returncode == 0 and (tmp_path / "run" / "report.html").exists()
    request = urllib.request.Request(f"{dashboard}/api/jobs/", headers={
        "Authorization": f"Bearer {PLANTED['RAY_AUTH_TOKEN']}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        jobs = answer.read()
    left = {str(path): path.read_bytes() for folder in (tmp_path, session) for path in folder.rglob("*")
            if path.is_file()}
    assert any("/wandb/" in path for path in left) and any("job-driver" in path for path in left)
    assert any(b"ray_job" in line for line in arguments)
    left |= {"output": (launched.stdout + launched.stderr + report.stdout + report.stderr).encode(),
             "what the dashboard says of jobs": jobs, "arguments": b"\n".join(arguments)}
    for name, secret in PLANTED.items():
        assert [path for path, content in left.items() if secret.encode() in content] == [], name


def test_a_cluster_ends_a_run_whose_driver_is_killed_with_a_checkpoint(cluster, text, clean, tmp_path):
    process = subprocess.Popen([sys.executable, *command(text, tmp_path, "cluster=ray", *LONG, "checkpoint.every=0")],
                               cwd=ROOT, env=environment(**cluster[0]), stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path, 13, process)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "status.json").read_text())["ranks"]]
    process.kill()
    process.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "ranks outlive their driver")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"] >= 13
    assert "its driver is gone" in (tmp_path / "events.jsonl").read_text()
    done = sparing("-m", "orchestrator", "train", f"run.dir={tmp_path}", "resume=auto", **cluster[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[:3] for row in losses(tmp_path)] == [row[:3] for row in clean]


def test_ray_job_stop_ends_a_run_with_a_checkpoint(cluster, text, tmp_path):
    """Ray gives the driver three seconds, its keeper does the rest."""
    job = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    there = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 180,
             "env": environment(**cluster[0], PYTHONPATH="")}
    submitted = subprocess.run([*job, "submit", "--address", cluster[1], "--working-dir", ".", "--no-wait",
                                "--submission-id", "stopped", "--", "python",
                                *command(text, tmp_path, "train.steps=2000", "checkpoint.every=0")], **there)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: reached(tmp_path, 3), "step 3 was not reached")
    subprocess.run([*job, "stop", "--address", cluster[1], "stopped"], **there)
    wait_until((tmp_path / "summary.json").exists, "the run has not ended by itself")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["checkpoint"]["step"] == summary["steps"]


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
