"""The filled batch file without a Slurm: stand-ins for Ray, the run and scontrol."""

import os
import subprocess

import pytest

from orchestrator.compose import compose_config
from orchestrator.launch import fill


@pytest.mark.parametrize("code, ray_lives, ours, again", [
    (0, True, 0, False), (33, True, 33, True), (34, True, 34, True), (1, True, 1, False), (3, True, 3, False),
    (1, False, 33, True), (3, False, 33, True), (93, False, 93, False), (143, True, 34, True)])
def test_the_batch_file_tells_a_run_that_failed_from_a_ray_that_did(code, ray_lives, ours, again, tmp_path):
    """Ray ends a driver whose own node fails, with 1 and a word of its own."""
    config = compose_config(["launch=slurm", "hardware=cpu", "layout=single"])
    manifest = fill(config, [], stamp="20261125-120000", python=str(tmp_path / "python"), cwd=tmp_path).manifest
    (tmp_path / "runs").mkdir()
    lose = "" if ray_lives else f"kill $(cat {tmp_path}/ray.pid)"
    fakes = {"ray": f"echo $$ > {tmp_path}/ray.pid; exec /bin/sleep 60", "hostname": "echo here",
             "sleep": "/bin/sleep 0.1",
             "python": f"until [ -s {tmp_path}/ray.pid ]; do :; done; {lose}\nexit {code}",
             "scontrol": f"echo $* >> {tmp_path}/asked; echo JobState=RUNNING"}
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-c", manifest], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}, timeout=60)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert done.returncode == ours and ("requeue 1" in asked) == again
