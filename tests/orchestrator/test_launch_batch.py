"""The filled batch file without a Slurm: stand-ins for Ray, the run and scontrol."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator.compose import compose_config
from orchestrator.launch import fill


def sleep_until_lost(folder: Path, ray_lives: bool) -> str:
    """A stand-in for a while that is long enough for a killed Ray to be gone."""
    return "/bin/sleep 0.1" if ray_lives else (
        f"while kill -0 $(cat {folder}/ray.pid) 2> /dev/null; do /bin/sleep 0.05; done")


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
             "sleep": sleep_until_lost(tmp_path, ray_lives),
             "python": f"until [ -s {tmp_path}/ray.pid ]; do :; done; {lose}\nexit {code}",
             "scontrol": f"echo $* >> {tmp_path}/asked; echo JobState=RUNNING"}
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-c", manifest], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}, timeout=60)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert done.returncode == ours and ("requeue 1" in asked) == again


@pytest.mark.parametrize("codes, ray_lives, ours", [
    ([0], True, 0), ([33, 33, 0], True, 0), ([33, 34], True, 34), ([33] * 9, True, 33), ([2], True, 2),
    ([93], True, 93), ([1], True, 1), ([1, 0], False, 33), ([33, 0], False, 33)])
def test_a_skypilot_job_starts_a_transient_fault_again_so_often_and_nothing_else(codes, ray_lives, ours, tmp_path):
    """SkyPilot itself would start any failure again, and one of a listed code without end."""
    words = ["launch=skypilot", "hardware=cpu", "layout=single", "run.dir=s3://b/r", "launch.restarts=2"]
    task = yaml.safe_load(fill(compose_config(words), words, stamp="20261125-120000", python="/env/bin/python",
                               cwd=tmp_path).manifest)
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [34]}
    lose = "" if ray_lives else f"kill $(cat {tmp_path}/ray.pid)"
    fakes = {"ray": f"echo $$ > {tmp_path}/ray.pid; exec /bin/sleep 60", "sleep": sleep_until_lost(tmp_path, ray_lives),
             "python": f"until [ -s {tmp_path}/ray.pid ]; do :; done; {lose}\necho >> {tmp_path}/starts\n"
                       f"set -- {shlex.join(map(str, codes))}\nshift $(($(wc -l < {tmp_path}/starts) - 1)); exit $1"}
    folder = tmp_path / "sparing-env" / "bin"
    folder.mkdir(parents=True)
    for name, script in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(["bash", "-c", task["run"]], timeout=60, env={
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"})
    starts = (tmp_path / "starts").read_text().count("\n")
    assert (done.returncode, starts) == (ours, 1 if not ray_lives else min(len(codes), 3))
