"""A run directory is new, or continued on purpose, and held by one live run at a time."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from orchestrator.config import CheckpointConfig, Config, from_dict
from orchestrator.errors import BadRequest, NotFit
from orchestrator.train import run_dir, storage
from orchestrator.train.manifest import MANIFEST
from orchestrator.train.processes import born
from orchestrator.train.run_dir import claim_run_dir

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from orchestrator.config import Config
from orchestrator.train.run_dir import claim_run_dir
config = Config()
config.run.dir = sys.argv[1]
with claim_run_dir(config):
    print("held", flush=True)
    sys.stdin.read()
"""


def config_for(run_dir: object, **changes) -> Config:
    config = Config(**changes)
    config.run.dir = str(run_dir) if run_dir else None
    return config


def test_a_run_without_a_directory_gets_a_new_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim_run_dir(config_for(None)) as first, claim_run_dir(config_for(None)) as second:
        assert first.config.run.dir != second.config.run.dir
        for claim in (first, second):
            assert Path(claim.config.run.dir).parent == tmp_path / "runs" and claim.attempt == 1
            assert claim.config.checkpoint.dir == f"{claim.config.run.dir}/checkpoints"
            saved = yaml.safe_load(Path(claim.config.run.dir, "config.yaml").read_text())
            assert from_dict(Config, saved) == claim.config


def test_a_continuation_that_is_refused_leaves_the_runs_config_as_it_was(tmp_path):
    with claim_run_dir(config_for(tmp_path)):
        before = (tmp_path / "config.yaml").read_bytes()
    for ending in (BadRequest, NotFit):
        with pytest.raises(ending):
            with claim_run_dir(config_for(tmp_path, seed=7, resume="auto")) as claim:
                assert (tmp_path / "config.yaml").read_bytes() != before
                raise ending("such data was not trained on")
        kept = (tmp_path / "config.yaml").read_bytes()
        assert kept == before if ending is BadRequest else from_dict(Config, yaml.safe_load(kept)) == claim.config


def test_a_used_directory_is_continued_only_on_purpose(tmp_path):
    with claim_run_dir(config_for(tmp_path)) as claim:
        assert claim.attempt == 1
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(BadRequest, match=r"holds a run already \(metrics\.jsonl\); continue it with resume=auto"):
        with claim_run_dir(config_for(tmp_path)):
            pass
    for attempt in (2, 3):
        with claim_run_dir(config_for(tmp_path, resume="auto")) as claim:
            assert claim.attempt == attempt


def test_a_new_run_does_not_take_the_checkpoints_of_another_for_its_own(tmp_path):
    """It would delete them as it saves, and under resume=auto go on from them."""
    shared = CheckpointConfig(dir=str(tmp_path / "shared"))
    committed = tmp_path / "shared" / "step-00000008.0001-2" / MANIFEST
    with claim_run_dir(config_for(tmp_path / "first", checkpoint=shared)):
        committed.parent.mkdir(parents=True)
        committed.write_text("{}")
    for resume in ("none", str(committed.parent)):
        with pytest.raises(BadRequest, match=r"checkpoint\.dir=.*shared: holds checkpoints already \(.*step-00000008"):
            with claim_run_dir(config_for(tmp_path / "second", checkpoint=shared, resume=resume)):
                pass
    with claim_run_dir(config_for(tmp_path / "third", checkpoint=shared, resume="auto")) as claim:
        assert claim.attempt == 1, "where the run directory was lost and the checkpoints were not"


def test_a_directory_is_free_again_once_its_holder_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadRequest, match=rf"in use by a live run \(process {holder.pid} on "):
            with claim_run_dir(config_for(tmp_path)):
                pass
        holder.kill()
        holder.wait()
        with claim_run_dir(config_for(tmp_path)) as claim:
            assert claim.attempt == 2


def test_an_object_store_directory_is_held_and_taken_over_from_the_dead(tmp_path):
    url = f"memory://{tmp_path.name}/run"
    lock = storage.join(url, "lock.json")
    with claim_run_dir(config_for(url)) as claim:
        assert claim.config.run.dir == url and storage.exists(lock)
        held = json.loads(storage.read_bytes(lock))
    assert not storage.exists(lock)
    parent = held | {"pid": os.getppid(), "born": born(os.getppid())}
    storage.write_bytes(lock, json.dumps(parent | {"born": "7"}).encode())  # a container before this one, say
    with claim_run_dir(config_for(url)) as claim:
        assert claim.attempt == 2
    storage.write_bytes(lock, json.dumps(parent).encode())
    with pytest.raises(BadRequest, match=f"process {os.getppid()} on "):
        with claim_run_dir(config_for(url)):
            pass
    storage.write_bytes(lock, json.dumps(held | {"pid": 2**22 + 1}).encode())
    with claim_run_dir(config_for(url)) as claim:
        assert claim.attempt == 3
    storage.write_bytes(lock, json.dumps(held | {"host": "elsewhere", "since": 0}).encode())
    with claim_run_dir(config_for(url)) as claim:
        assert claim.attempt == 4


def test_a_lock_that_another_machine_renews_is_a_live_runs(tmp_path, monkeypatch):
    url, now = f"memory://{tmp_path.name}/run", [0.0]
    lock = storage.join(url, "lock.json")

    def renew(seconds: float) -> None:
        now[0] += seconds
        storage.write_bytes(lock, json.dumps({"host": "elsewhere", "pid": 7, "since": time.time() + now[0]}).encode())

    renew(0.0)
    monkeypatch.setattr(run_dir, "time", SimpleNamespace(time=time.time, sleep=renew, monotonic=lambda: now[0]))
    with pytest.raises(BadRequest, match=r"in use by a live run \(process 7 on elsewhere\)"), claim_run_dir(
            config_for(url)):
        pass
    assert now[0] < 10


def test_who_holds_an_object_store_directory_renews_its_lock_until_another_has_it(tmp_path, monkeypatch):
    """Under torchrun nobody writes a status, and a lock of two minutes ago would be one of the dead."""
    monkeypatch.setattr(run_dir, "RENEW_S", 0.05)
    url = f"memory://{tmp_path.name}/run"
    lock = storage.join(url, "lock.json")

    def since() -> float:
        return json.loads(storage.read_bytes(lock))["since"]

    with claim_run_dir(config_for(url)):
        first, deadline = since(), time.monotonic() + 60
        while since() == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        renewing = next(thread for thread in threading.enumerate() if thread.name == "lock")
        while renewing.is_alive():  # it may be about to write what it has just seen to be its own
            assert time.monotonic() < deadline
            storage.write_bytes(lock, json.dumps({"host": "elsewhere", "pid": 7, "since": 1.0}).encode())
            renewing.join(1)
        assert since() == 1.0


@pytest.mark.parametrize("url", [False, True], ids=["a folder that machines share", "an object store"])
@pytest.mark.parametrize("end", ["silent", "at work", "ends"])
def test_a_holder_on_another_machine_is_waited_for_until_it_is_known_to_live_or_not(tmp_path, monkeypatch, url, end):
    """Its machine may be lost. The next start comes before anybody knows, and is not to be the end of the run."""
    now, run = [0.0], f"memory://{tmp_path.name}/run" if url else str(tmp_path)
    lock, status = storage.join(run, "lock.json"), storage.join(run, "status.json")
    storage.write_bytes(lock, json.dumps({"host": "elsewhere", "pid": 7, "since": time.time()}).encode())
    storage.write_bytes(status, json.dumps({"time": time.time()}).encode())
    holder = None if url else open(tmp_path / "lock.json", "a+")

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if end == "at work":
            storage.write_bytes(status, json.dumps({"time": time.time() + now[0]}).encode())
        elif now[0] > 60 and end == "ends" or now[0] > 100 and holder is not None:  # the file server has noticed
            storage.remove(lock) if url else holder.close()

    monkeypatch.setattr(run_dir, "time", SimpleNamespace(time=time.time, sleep=sleep, monotonic=lambda: now[0]))
    if holder is not None:
        fcntl.flock(holder, fcntl.LOCK_EX)
    if end == "at work":
        with pytest.raises(BadRequest, match=r"in use by a live run \(process 7 on elsewhere\)"), claim_run_dir(
                config_for(run)):
            pass
        assert now[0] < 10
        return
    with claim_run_dir(config_for(run)) as claim:
        assert claim.attempt == 1 and 60 <= now[0] <= run_dir.STALE_S + run_dir.LOOK_S


def test_a_place_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(NotFit, match=r"run\.dir=.*its file system takes no locks"), claim_run_dir(config_for(tmp_path)):
        pass


@pytest.mark.parametrize("status", ["", "[]", "{}"])
def test_a_damaged_status_is_no_sign_of_life(tmp_path, status):
    url = f"memory://{tmp_path.name}/run"
    storage.write_bytes(storage.join(url, "lock.json"), b'{"host": "elsewhere", "pid": 7, "since": 0}')
    storage.write_bytes(storage.join(url, "status.json"), status.encode())
    with claim_run_dir(config_for(url)) as claim:
        assert claim.attempt == 1


def test_a_bad_name_and_an_unwritable_place_are_refused(tmp_path):
    config = config_for(tmp_path)
    config.run.name = "../up"
    with pytest.raises(BadRequest, match=r"run\.name=\.\./up: must be letters"):
        with claim_run_dir(config):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFit, match="cannot be written.*choose another run.dir"):
        with claim_run_dir(config_for(tmp_path / "file" / "run")):
            pass


@pytest.mark.parametrize("name", ["", "none.yaml", "file/config.yaml"])
def test_what_is_no_config_is_a_bad_request_also_of_one_rank(tmp_path, capsys, name):
    from orchestrator.train.rank import main

    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / name)]) == 2
    assert f"{tmp_path / name}: is no config of a run (no such file); repair it" in capsys.readouterr().err
