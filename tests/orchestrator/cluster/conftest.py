import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster_harness import _end_with_parent, wait_until
from tests.harness import free_port, write_corpus
from tests.orchestrator.cluster.runs import PATIENCE_S, PLANTED, ask, environment


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, 20)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray head with four CPUs and a job server, on loopback, with token authentication; its session's folder."""
    port, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    log, address = Path(folder, "start.log"), f"http://127.0.0.1:{dashboard}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(kill_all, folder)
        with open(log, "w") as out:
            head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--head",
                                     "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4",
                                     f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                                     f"--dashboard-agent-listen-port={free_port()}",
                                     "--disable-usage-stats", f"--temp-dir={folder}"], stdout=out, stderr=out,
                                    env=environment(RAY_AUTH_MODE="token", **PLANTED), preexec_fn=_end_with_parent)
        stack.callback(end, head)
        wait_until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, PATIENCE_S,
                   log.read_text)
        assert head.poll() is None, log.read_text()
        job = wait_until(lambda: submitted(address), PATIENCE_S, "no agent takes a job", every_s=0.2)
        wait_until(lambda: ask(f"{address}/api/jobs/{job}")["status"] == "SUCCEEDED", PATIENCE_S, "no job ends",
                   every_s=0.2)
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", **PLANTED}, address, Path(folder)


def submitted(address: str) -> str | None:
    with contextlib.suppress(OSError):
        return ask(f"{address}/api/jobs/", entrypoint="true")["submission_id"]
    return None


def end(head: subprocess.Popen) -> None:
    """Not by `ray stop`, which ends every Ray of the machine."""
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(60)
    head.kill()
    head.wait()


def kill_all(word: str) -> None:
    """Every process whose command line holds the word."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
