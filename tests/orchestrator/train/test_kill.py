"""A process killed by SIGKILL anywhere in a save: what is committed afterwards is whole and right, and nothing that was
committed is lost.

This file is also the program: it imports torch once and forks a victim per kill, two ranks' savers in one process.
Kills come before every call by which a save changes the disk (scripted), and at random times (seeded):

    PYTHONPATH=. python tests/orchestrator/train/test_kill.py DIRECTORY random 400
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time

from orchestrator.train import lineage
from orchestrator.train.checkpoint import Saver
from orchestrator.train.shards import Loader, Piece
from tests.orchestrator.train.team import newest_loadable

CALLS = ("fsync", "replace", "link", "unlink", "rmdir")
SCRIPTED_KILLS, RANDOM_KILLS = 50, 30
"""What the suite runs: every call of the first two saves, and a sample."""
DEADLINE_S = 60


def content(step):
    """What a checkpoint of `step` must hold; another step's bytes never pass for it."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return {"model.weight": torch.randn(64, 128, generator=generator),
            "optim.step": torch.tensor(float(step))}


def save_forever(directory, first_step, report, *, kill_at=None):
    """Save a step after another, telling each commit as a line; die before the `kill_at`-th call that changes disk."""
    import torch.distributed as dist

    store = dist.HashStore()
    savers = [Saver(directory, rank=rank, world_size=2, store=store, keep=2, fence="attempt", timeout_s=DEADLINE_S)
              for rank in range(2)]
    os.write(report, b"started\n")
    if kill_at is not None:
        _die_before(kill_at)
    for step in range(first_step, first_step + 1000):
        for rank, saver in enumerate(savers):
            pieces = [Piece(key, tuple(tensor.shape), 0, tensor) for key, tensor in content(step).items()]
            saver.save(step, pieces[rank::2], {"step": step})
        result = [saver.wait() for saver in savers][0]
        os.write(report, f"{step if result.ok else result.error}\n".encode())


def _die_before(number):
    """Kill this process before its `number`-th call (from 0) that changes the disk; a write is torn in its middle."""
    import builtins

    left = [number]

    def due():
        left[0] -= 1
        return left[0] < 0

    def wrap(call):
        def dying(*args, **kwargs):
            if due():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return dying

    class Torn:
        """A file whose write may be the process's last."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *failure):
            self.file.close()

        def write(self, data):
            if due():
                self.file.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(data)

    opened = wrap(builtins.open)

    def open_torn(path, mode="r", **kwargs):
        file = opened(path, mode, **kwargs)
        return Torn(file) if mode == "xb" else file

    builtins.open = open_torn
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def kill_once(directory, first_step, *, kill_at=None, after_s=None):
    """Fork a saver, let it be killed; the steps whose commit it had told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            save_forever(directory, first_step, writer, kill_at=kill_at)
        finally:
            os._exit(1)
    os.close(writer)
    told = b""
    with open(reader, "rb", buffering=0) as pipe:
        while b"\n" not in told and (more := pipe.read(4096)):
            told += more
        if after_s is not None:
            time.sleep(after_s)
            os.kill(pid, signal.SIGKILL)
        while select.select([pipe], [], [], DEADLINE_S)[0] and (more := pipe.read(4096)):
            told += more
    ended = os.waitpid(pid, 0)[1]
    lines = told.decode().split()
    assert lines[:1] == ["started"] and os.WTERMSIG(ended) == signal.SIGKILL, (told, ended)
    return [int(line) for line in lines[1:]]


def check(directory, at_least):
    """Every committed checkpoint loads and holds its own step; the newest is no older than what had been told."""
    import torch

    paths = lineage.list_checkpoints(directory)
    for path in paths:
        step, loader = lineage.step_of(path), Loader(path)
        loader.check()
        for key, tensor in content(step).items():
            assert torch.equal(loader.read(key), tensor), (path, key)
        assert loader.state == {"step": step} and set(loader.keys()) == set(content(step)), path
        loader.close()
    newest = lineage.step_of(paths[-1]) if paths else 0
    assert newest >= at_least, f"step {at_least} was committed, {newest} is the newest after the kill"
    assert paths == [] or paths[-1] == newest_loadable(directory, lambda path, why: sys.exit(f"{path}: {why}"))
    return newest


def main(directory, kind, kills, seed=0):
    """Kill after kill in one directory, each pair of savers going on where the last one died.

    The span of the random times follows the machine's speed, so that about half of the kills come after a commit.
    """
    chance, span_s, step, uncommitted, began = random.Random(seed), 0.03, 0, 0, time.monotonic()
    for number in range(kills):
        point = {"kill_at": number} if kind == "scripted" else {"after_s": chance.uniform(0, span_s)}
        told = kill_once(directory, step + 1, **point)
        newest = check(directory, max([step, *told]))
        uncommitted += newest == step
        span_s *= 1.25 if newest == step else 0.8
        step = newest
    left = [name for name in os.listdir(directory) if name.startswith("step-")]
    print(json.dumps({"kills": kills, "newest_step": step, "without_a_commit": uncommitted, "left": len(left),
                      "seconds": round(time.monotonic() - began, 1)}))


def run(directory, kind, kills):
    done = subprocess.run([sys.executable, __file__, str(directory), kind, str(kills)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_before_any_call_that_changes_the_disk_loses_nothing_committed(tmp_path):
    found = run(tmp_path, "scripted", SCRIPTED_KILLS)
    assert found["kills"] == SCRIPTED_KILLS and found["newest_step"] > 0, found
    assert found["without_a_commit"] > 0, "the first calls of a save come before its commit"


def test_kills_at_random_times_lose_nothing_committed(tmp_path):
    found = run(tmp_path, "random", RANDOM_KILLS)
    assert found["kills"] == RANDOM_KILLS and found["newest_step"] > 0, found
    assert found["left"] <= 4, "the next attempt collects what a dead one left"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
