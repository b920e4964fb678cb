"""Checkpoints without a layout: any rank hands in rows of global tensors, any rank reads any rows back.

    checkpoints/attempt-0003.json                   who may commit here: the highest number (claim.py)
    checkpoints/step-00000100.0003-1/               step 100, first save of attempt 3; never written twice
        rank-00000.safetensors ...                  one file per rank, each row of each tensor in exactly one
        manifest.json                               written last and exclusively: without it there is no checkpoint

A save copies the tensors and returns; a thread per rank writes, hashes and reads back its file and sends its index to
rank 0, whose thread checks the whole (manifest.py), publishes the manifest, and only then deletes what is too old.
Whatever fails on the way is a SaveResult with an error, and the previous checkpoint stands. Nothing is pickled.
"""

import contextlib
import copy
import itertools
import json
import logging
import os
import queue
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from orchestrator.errors import NotFit, Transient
from orchestrator.train import claim, storage
from orchestrator.train.lineage import claim_of, list_checkpoints, step_paths
from orchestrator.train.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    CorruptManifest,
    Entry,
    Manifest,
    ShardFile,
    Span,
    dump,
    expert_census,
    parse,
)
from orchestrator.train.shards import Piece, check_shard, snapshot, write_shard

logger = logging.getLogger(__name__)

MAX_INDEX_BYTES = 7 << 20
"""TCPStore refuses values above 8 MiB. An index compresses about tenfold: some 500,000 pieces of one rank."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. On rank 0 `ok` says that the checkpoint is committed, elsewhere that this rank did its part."""

    step: int
    ok: bool
    error: str | None
    bytes: int
    """Of all ranks on rank 0, else of this one."""
    seconds: float
    path: str | None = None


@dataclass(frozen=True)
class _Job:
    step: int
    sequence: int
    pieces: list[Piece]
    state: dict
    deadline: float
    """time.monotonic() by which everything of this save has ended."""
    error: str | None = None
    """Why nothing can be written, known before the start."""
    more: Iterable[list[Piece]] = ()
    """Pieces of further files, each made when the file before it is written."""

    def remaining_s(self) -> float:
        return max(0.01, self.deadline - time.monotonic())


class Saver:
    """One rank's half of every save; all ranks call `save` for the same steps in the same order.

    store: reaches rank 0, on the training thread's side untouched (a clone is used); None when alone.
    keep: newest checkpoints left after a commit, 0 for all. experts: routed experts of each MoE block by its name
    (`{"layers.1": 16, "mtp.0.block": 16}`), for the census. fence: the attempt's name, for messages and the store.
    timeout_s: by when a save has ended, one way or the other. on_wait: called each second of a wait; may raise.

    Rank 0 claims the directory when it is built, which also shows that it can be written: of several attempts (a
    duplicate job, a worker that outlived its node) only the one with the highest claim may commit and delete.
    """

    def __init__(self, directory: str, *, rank: int, world_size: int, store: dist.Store | None, keep: int, fence: str,
                 timeout_s: float, experts: Mapping[str, int] | None = None,
                 on_wait: Callable[[], None] = lambda: None):
        assert store is not None or world_size == 1, "several ranks need a store"
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self.keep, self.fence, self.timeout_s, self.experts, self.on_wait = keep, fence, timeout_s, experts, on_wait
        self._store = dist.PrefixStore(f"checkpoint/{fence}", store.clone()) if store is not None else None
        self._sequence = 0
        self._thread: threading.Thread | None = None
        self._started = self._deadline = 0.0
        self._done: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._last: SaveResult | None = None
        if rank == 0:
            self._claim = claim.take_claim(directory, fence)
            self._collect_torn(claim.RETRY_S)

    def save(self, step: int, pieces: Iterable[Piece], state: dict, *, background: bool = True,
             more: Iterable[list[Piece]] = ()) -> None:
        """Copy `pieces` and (rank 0's) `state`, JSON values, then write them in a thread, or before returning if not
        in the background. Waits for the save before. How it ended is what `wait` and `results` say; never an exception.

        more: of a rank alone, groups of pieces that never are in memory together, a file each.
        """
        assert not more or self.world_size == 1, "the files of several ranks are numbered by rank"
        self.wait()
        stuck = self._thread is not None and self._thread.is_alive()
        self._sequence += 1
        self._started = time.monotonic()
        self._deadline = self._started + self.timeout_s
        job = _Job(step, self._sequence, snapshot(pieces), copy.deepcopy(state) if self.rank == 0 else {},
                   self._deadline, "an earlier save has not ended" if stuck else None, more)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save-{step}", daemon=True)
        self._thread.start()
        if not background:
            self.wait()

    def wait(self, timeout_s: float | None = None) -> SaveResult | None:
        """The last result, once the save under way has ended; its own deadline bounds the wait unless told less."""
        if self._thread is not None and timeout_s is not None:
            self._thread.join(timeout_s)
        while timeout_s is None and self.busy_s and (left := self._deadline + 30 - time.monotonic()) > 0:
            self.on_wait()
            self._thread.join(min(1.0, left))
        return self._last

    @property
    def busy_s(self) -> float:
        """For how long the save under way has been written; 0 if none is."""
        return time.monotonic() - self._started if self._thread is not None and self._thread.is_alive() else 0.0

    @property
    def claim_number(self) -> int:
        """This attempt's claim; 0 where rank 0 is elsewhere."""
        return self._claim.number if self.rank == 0 else 0

    def results(self) -> list[SaveResult]:
        """Results since the last call, in order."""
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    def _run(self, job: _Job) -> None:
        started = time.monotonic()
        if sys.platform == "linux":  # a priority per thread: else a writer on a busy core doubles the step's time
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        path, num_bytes, error = None, 0, None
        try:
            path, num_bytes = self._commit(job) if self.rank == 0 else self._contribute(job)
        except Exception as failure:  # the thread's edge: training goes on, and hears of it
            error = str(failure) or type(failure).__name__
            logger.warning("checkpoint of step %d failed: %s", job.step, error)
        self._last = SaveResult(job.step, error is None, error, num_bytes, time.monotonic() - started, path)
        self._done.put(self._last)

    def _contribute(self, job: _Job) -> tuple[str, int]:
        """Another rank's part: learn the directory, write, report the index or what went wrong."""
        self._await(f"{job.sequence}/path", job)
        path = self._store.get(f"{job.sequence}/path").decode()
        report = self._write(path, job, self.rank)
        self._store.set(f"{job.sequence}/{self.rank}", _pack(report))
        if "error" in report:
            raise NotFit(report["error"])
        return path, report["bytes"]

    def _commit(self, job: _Job) -> tuple[str, int]:
        """Rank 0's part: write, gather, check the whole, publish, and only then let the old ones go."""
        path = storage.join(self.directory, f"step-{job.step:08d}.{self._claim.number:04d}-{job.sequence}")
        try:
            if self._store is not None:
                self._store.set(f"{job.sequence}/path", path)
            own = []
            for number, pieces in enumerate(itertools.chain([job.pieces], map(snapshot, job.more))):
                own.append(self._write(path, replace(job, pieces=pieces), number))
                if "error" in own[-1]:  # the rest would be written for nothing
                    break
            manifest = self._merge([*own, *self._gather(job)], job)
            data = dump(manifest)
            if len(data) > MAX_MANIFEST_BYTES:
                raise NotFit(f"{path}: its manifest would have {len(data):,} bytes, must have at most "
                             f"{MAX_MANIFEST_BYTES:,}; use fewer data-parallel ranks, or larger layout.ep")
            parse(data)
            with ThreadPoolExecutor(32) as pool:  # thousands of files, each a request
                list(pool.map(lambda name: check_shard(storage.join(path, name), manifest.files[name], content=False,
                                                       retry_s=job.remaining_s()), manifest.files))
            self._claim.check(retry_s=job.remaining_s())
        except Exception:
            with contextlib.suppress(Exception):  # the room it takes; what remains is collected later
                storage.remove_tree(path, retry_s=job.remaining_s())
            raise
        file = storage.join(path, MANIFEST)
        storage.create_exclusive(file, data, retry_s=job.remaining_s())
        if storage.read_bytes(file, retry_s=job.remaining_s()) != data:
            raise CorruptManifest(f"{file}: reads back as something else than was written")
        try:
            self._retire(path, job)
        except Exception as failure:  # the new checkpoint is committed all the same
            logger.warning("an old checkpoint in %s could not be deleted: %s", self.directory, failure)
        return path, sum(shard.bytes for shard in manifest.files.values())

    def _write(self, path: str, job: _Job, number: int) -> dict:
        """Write one shard, numbered by rank, or by group where a rank alone has several; its report, fit for JSON, says
        what the manifest must know, or the error."""
        name = f"rank-{number:05d}.safetensors"
        try:
            if job.error:
                raise Transient(job.error)
            if not job.pieces:
                return {"bytes": 0, "index": []}
            file, index = write_shard(storage.join(path, name), job.pieces, retry_s=job.remaining_s())
        except Exception as failure:  # reported to rank 0, which refuses the checkpoint
            return {"error": f"rank {self.rank}: {failure or type(failure).__name__}"}
        return {"file": name, "bytes": file.bytes, "sha256": file.sha256,
                "index": [[key, entry.dtype, entry.shape, entry.pieces[0].start, entry.pieces[0].stop]
                          for key, entry in index]}

    def _gather(self, job: _Job) -> list[dict]:
        """The other ranks' reports, whose silence is an error too."""
        reports, silent = [], []
        for rank in range(1, self.world_size):
            try:
                self._await(f"{job.sequence}/{rank}", job)
                reports.append(_unpack(self._store.get(f"{job.sequence}/{rank}")))
                self._store.delete_key(f"{job.sequence}/{rank}")
            except dist.DistError:
                silent.append(rank)
        if silent:
            reports.append({"error": f"no word from {len(silent)} of {self.world_size} ranks "
                                     f"({', '.join(map(str, silent[:8]))}) within {self.timeout_s:.0f} s"})
        return reports

    def _merge(self, reports: list[dict], job: _Job) -> Manifest:
        if errors := [report["error"] for report in reports if "error" in report]:
            raise NotFit("; ".join(errors[:4]))
        files, spans, kinds = {}, defaultdict(list), {}
        for report in reports:
            if "file" in report:
                files[report["file"]] = ShardFile(report["bytes"], report["sha256"])
            for key, dtype, shape, start, stop in report["index"]:
                spans[key].append(Span(report["file"], start, stop))
                kind = f"{dtype} {list(shape)}", dtype, tuple(shape)
                if kinds.setdefault(key, kind) != kind:
                    raise ValueError(f"{key}: {kind[0]} in {report['file']}, {kinds[key][0]} elsewhere")
        tensors = {key: Entry(dtype, shape, tuple(sorted(spans[key], key=lambda span: (span.start, span.stop))))
                   for key, (_, dtype, shape) in kinds.items()}
        return Manifest(job.step, self._claim.number, self.fence, job.state, files,
                        expert_census(tensors, self.experts), tensors)

    def _await(self, key: str, job: _Job) -> None:
        self._store.wait([key], timedelta(seconds=job.remaining_s()))

    def _retire(self, committed: str, job: _Job) -> None:
        """Delete checkpoints beyond `keep`, each manifest before its files, and what dead attempts left unfinished."""
        self._claim.check(retry_s=job.remaining_s())
        if self.keep:
            found = list_checkpoints(self.directory, retry_s=job.remaining_s())
            # Of a resume behind damaged ones: those are of no use, and are not counted towards the newest to keep.
            for path in found[: max(0, found.index(committed) + 1 - self.keep)] if committed in found else ():
                if path != committed:
                    storage.remove(storage.join(path, MANIFEST), retry_s=job.remaining_s())
                    storage.remove_tree(path, retry_s=job.remaining_s())
        self._collect_torn(job.remaining_s())

    def _collect_torn(self, retry_s: float) -> None:
        for path in step_paths(self.directory, retry_s):
            torn = not storage.exists(storage.join(path, MANIFEST), retry_s=retry_s)
            if torn and claim_of(path) < self._claim.number:
                storage.remove_tree(path, retry_s=retry_s)


def _pack(report: dict) -> bytes:
    data = zlib.compress(json.dumps(report).encode())
    if len(data) > MAX_INDEX_BYTES:
        return _pack({"error": f"an index of {len(data)} bytes is more than the store carries; use more ranks"})
    return data


def _unpack(data: bytes) -> dict:
    return json.loads(zlib.decompress(data))
