"""Gloo ranks for tests: a few processes started once, each running functions of test files on request.

Starting a Python with torch takes seconds, a request milliseconds. A worker that dies or misses the deadline fails
the one test, and the next starts fresh ones.
"""

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.parallel.rank_info import RankInfo
from tests.posing import pose

_MODULES: dict[str, object] = {}


class Ranks:
    """`run(function, ...)` calls `function(info, *args)` on `world` processes and returns their results in order.

    posing: the library with which they pose as GPUs (`tests.posing`).
    """

    def __init__(self, posing: str | None = None) -> None:
        self.posing = posing
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple] = []

    def run(self, function: Callable, *args, world: int, timeout_s: float = 150) -> list:
        while len(self.workers) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there, sys.path, self.posing), daemon=True)
            process.start()
            self.workers.append((process, here))
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        used = self.workers[:world]
        for rank, (_, pipe) in enumerate(used):
            info = RankInfo(rank, world, rank, world, 0, "127.0.0.1", store.port)
            pipe.send((function.__code__.co_filename, function.__name__, info, args))
        results, failure = {}, None
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(used)}
        deadline = time.monotonic() + timeout_s
        while waiting and failure is None:
            ready = multiprocessing.connection.wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                failure = f"ranks {sorted(waiting.values())}: no answer within {timeout_s} s"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = False, "the process died"
                if not ok:
                    failure = failure or f"rank {rank}: {results[rank]}"
        if failure is not None:
            self.close()
            raise AssertionError(failure)
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


def write_corpus(folder: Path, files: int) -> None:
    """So many small text files, the same each time."""
    for i in range(files):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of file {i}: {j * i % 13}\n" for j in range(120)))


def free_port() -> int:
    """A port that no connection takes by chance: the kernel gives those from 32768 on, Ray its workers those below
    20000."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _serve(pipe, path: list[str], posing: str | None) -> None:
    sys.path[:] = path
    if posing is not None:
        pose(posing)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # the store is served by who started the ranks, as torchrun does
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            file, name, info, args = pipe.recv()
        except EOFError:
            return
        try:
            result = (True, getattr(_load(file), name)(info, *args))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(result)


def _load(file: str):
    if file not in _MODULES:
        spec = importlib.util.spec_from_file_location(f"served_{len(_MODULES)}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _MODULES[file] = module
    return _MODULES[file]
