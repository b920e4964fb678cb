import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster_harness import wait_until
from tests.harness import free_port, write_corpus
from tests.orchestrator.cluster.runs import PLANTED, ask, environment


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, 20)
    return folder


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
    address = f"http://127.0.0.1:{dashboard}"
    while True:
        with contextlib.suppress(OSError):
            job = ask(f"{address}/api/jobs/", entrypoint="true")["submission_id"]
            break
        assert time.monotonic() < deadline, "no agent takes a job"
        time.sleep(0.2)
    wait_until(lambda: ask(f"{address}/api/jobs/{job}")["status"] == "SUCCEEDED", 180, "no job ends", every_s=0.2)
    yield {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", **PLANTED}, address, Path(folder)
    head.terminate()  # not `ray stop`, which ends every Ray of the machine
    head.wait(60)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
