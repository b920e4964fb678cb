"""Where a run's numbers go: JSON lines always, Weights & Biases beside them. Rank 0 holds the one `Tracker`.

Each sink has `log(row)`, `event(kind, **fields)` and `finish(summary)`. Weights & Biases is imported here and
nowhere else, lazily; it is offline unless asked, needs no key, prints nothing and never stops a training:
whatever it raises becomes one event. The environment and the command line are never recorded.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from orchestrator.config import Config, WandbMode
from orchestrator.errors import NotFit, SparingError
from orchestrator.train import storage
from orchestrator.train.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

METRICS, EVENTS, WANDB_ID = "metrics.jsonl", "events.jsonl", "wandb/run_id"
EVENT_KEYS = ("time", "kind", "rank", "node", "step", "cause")
MANY_COUNTS, MANY_COUNTS_EVERY = 4096, 10
"""A step's tokens by layer and expert are in every row where they are few, else in every tenth: V3's take 130 kB."""
UPLOAD_SHARE = 0.05
"""Of a run's time in which its growing files are uploaded; with ten times the usual interval it may be more."""


class Sink(Protocol):
    def log(self, row: dict) -> None: ...
    def event(self, kind: str, **fields) -> None: ...
    def finish(self, summary: dict) -> None: ...


@dataclass(frozen=True)
class Dropped:
    """Rows of an earlier attempt beyond the step that this one resumes from: work that will be done again."""

    rows: int = 0
    seconds: float = 0.0
    """Wall time of those steps."""
    charged_s: float = 0.0
    """Device-seconds that the run had been charged at its last row, dropped or not: for `Ledger.catch_up`."""


class Tracker:
    """All sinks of a run behind the interface of one."""

    def __init__(self, sinks: Iterable[Sink], *, dropped: Dropped | None = None, wandb_id: str | None = None,
                 failures: list[str] | None = None):
        """failures: of sinks that were given up, as they come."""
        self.sinks, self.failures = list(sinks), [] if failures is None else failures
        self.dropped = dropped or Dropped()
        self.wandb_id = wandb_id

    def log(self, row: dict) -> None:
        """One step's row; `step` is among its keys."""
        for sink in self.sinks:
            sink.log(row)

    def event(self, kind: str, **fields) -> None:
        for sink in self.sinks:
            sink.event(kind, **fields)

    def finish(self, summary: dict) -> None:
        """Flush and close; W&B first, so that its failure can still be told. Nothing may be logged afterwards."""
        for sink in reversed(self.sinks):
            sink.finish(summary)


def open_tracker(config: Config, *, resumed_step: int = 0, row: dict | None = None, wandb_id: str | None = None,
                 upload_every_s: float = 30.0) -> Tracker:
    """The sinks that `config.tracker` asks for, in `config.run.dir`; rows beyond `resumed_step` are dropped. row: of
    that step, as its checkpoint has it; whoever was killed in between had saved the step and not yet told it.

    wandb_id: of the checkpoint's state, where it has one; else that of the run directory; else a new one.
    """
    mirror = Mirror(config.run.dir, every_s=upload_every_s)
    failures: list[str] = []
    lines = JsonlSink(mirror, resumed_step=resumed_step, on_failure=failures.append)
    if row is not None and row.get("step") == resumed_step == (lines.last_step or 0) + 1 > 1:
        lines.log(row)
    if config.tracker.wandb is WandbMode.off:
        return Tracker([lines], dropped=lines.dropped, failures=failures)
    earlier = mirror.fetch(WANDB_ID)
    wandb_id = wandb_id or (earlier.read_text() if earlier.exists() else "") or secrets.token_hex(4)
    earlier.write_text(wandb_id)

    def failed(cause: str) -> None:
        failures.append(f"notice: {cause}; all rows are in metrics.jsonl")
        lines.event("tracker_failed", cause=cause)

    wandb = WandbSink(config, mirror.root, run_id=wandb_id, on_failure=failed)
    return Tracker([lines, wandb], dropped=lines.dropped, wandb_id=wandb_id, failures=failures)


def read_lines(run_dir: str, name: str, *, last: int | None = None) -> list[dict]:
    """What `METRICS` or `EVENTS` of a run directory holds, or the `last` lines of it; none where there is no file."""
    path = storage.join(run_dir, name)
    lines = storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else []
    return _rows(lines if last is None else lines[-last:])


def _rows(lines: Iterable[str]) -> list[dict]:
    """Of JSON-lines; one that holds no JSON object is left out, wherever it stands: a crash tears lines."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_event(run_dir: str, kind: str, **fields) -> None:
    """One event from outside the training loop, while no `Tracker` is open on the run directory."""
    path, line = storage.join(run_dir, EVENTS), _event_line(kind, fields)
    before = storage.read_bytes(path) if storage.exists(path) else b""
    storage.write_bytes(path, before + line.encode())


class JsonlSink:
    """metrics.jsonl and events.jsonl, one flushed line each, floats in full (repr) precision, never NaN: null.

    A disk that takes no line, full or gone, stops no training: lines are left out until it takes them again, which
    `on_failure` is told once."""

    def __init__(self, mirror: "Mirror", *, resumed_step: int = 0, on_failure: Callable[[str], None]):
        self.mirror, self.on_failure = mirror, on_failure
        self.torn: set[TextIO] = set()
        """Files whose last line may not be whole."""
        self.last_step: int | None = None
        """Of the rows that stayed."""
        self.dropped = self._truncate(resumed_step)
        self.metrics, self.events = (open(path, "a", encoding="ascii")
                                     for path in (mirror.path(METRICS), mirror.fetch(EVENTS)))

    def log(self, row: dict) -> None:
        self._write(self.metrics, _to_json(row) + "\n")

    def event(self, kind: str, **fields) -> None:
        self._write(self.events, _event_line(kind, fields))

    def finish(self, summary: dict) -> None:
        for file in (self.metrics, self.events):
            with contextlib.suppress(OSError):
                file.close()
        self.mirror.close()

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write("\n" * (file in self.torn) + line)
            file.flush()
            self.torn.discard(file)
        except OSError as error:
            self.torn.add(file)
            tell, self.on_failure = self.on_failure, lambda cause: None
            tell(f"notice: {file.name}: {error.strerror}; lines are left out until it can be written")
        self.mirror.sync()

    def _truncate(self, resumed_step: int) -> Dropped:
        """Rows are in the order of their steps: only those that go are read, from the end, and the last that stays."""
        lost, hours = [], 0.0
        with open(self.mirror.fetch(METRICS), "a+b") as file:
            end = file.tell()
            for start, line in _lines_from_the_end(file):
                rows = _rows([line.decode("ascii", "replace")])  # none where a crash tore it
                hours = max([hours, *(row.get("cost/device_hours") or 0.0 for row in rows)])
                if rows and rows[0]["step"] <= resumed_step:
                    self.last_step = rows[0]["step"]
                    break
                lost, end = lost + rows, start
            file.truncate(end)
        return Dropped(len(lost), math.fsum(row.get("time/step_s") or 0.0 for row in lost), hours * 3600)


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a file that may be long, the last line first."""
    if end := file.seek(0, os.SEEK_END):
        with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as whole:
            while end:
                start = whole.rfind(b"\n", 0, end - 1) + 1
                yield start, whole[start:end]
                end = start


class Mirror:
    """The growing files of a run directory: in place where it is local, else in a temporary one that is uploaded.

    Object stores cannot append, so whole files go up, every `every_s` seconds in the background and at the end; less
    often as they grow, so that no more than a share of the time goes into it.
    """

    def __init__(self, run_dir: str, *, every_s: float):
        self.run_dir, self.every_s = run_dir, every_s
        local = storage.local_path(run_dir)
        self.is_remote = local is None
        self.root = Path(tempfile.mkdtemp(prefix="sparing-") if local is None else local)
        self.uploader = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self.upload: Future | None = None
        self.uploaded_at, self.took_s = time.monotonic(), 0.0

    def path(self, name: str) -> Path:
        """Where to write `name` now; its directory exists."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def fetch(self, name: str) -> Path:
        """`path(name)`, with what an earlier attempt left in `name`, if anything."""
        path, url = self.path(name), storage.join(self.run_dir, name)
        if self.is_remote and storage.exists(url):
            storage.download(url, str(path))
        return path

    def sync(self) -> None:
        """Upload if it is time and the last upload has ended; one that fails is told and tried again."""
        every_s = max(self.every_s, min(self.took_s / UPLOAD_SHARE, 10 * self.every_s))
        if not self.is_remote or time.monotonic() - self.uploaded_at < every_s:
            return
        if self.upload is not None:
            if not self.upload.done():
                return
            if error := self.upload.exception():
                logger.warning("metrics were not uploaded, trying again: %s", error)
        self.uploaded_at = time.monotonic()
        self.upload = self.uploader.submit(self._put, [METRICS, EVENTS, WANDB_ID])

    def close(self) -> None:
        """Upload everything, the W&B run too. Where that fails the files stay here, and the error says so."""
        self.uploader.shutdown(wait=True)
        if not self.is_remote:
            return
        try:
            self._put([str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()])
        except (SparingError, OSError) as error:
            raise NotFit(f"run.dir={self.run_dir}: metrics could not be uploaded ({error}); they are in {self.root}, "
                         "copy them by hand") from error
        shutil.rmtree(self.root)

    def _put(self, names: list[str]) -> None:
        began = time.monotonic()
        for name in names:
            if (path := self.root / name).exists():
                storage.write_bytes(storage.join(self.run_dir, name), path.read_bytes())
        self.took_s = time.monotonic() - began


def _event_line(kind: str, fields: dict) -> str:
    return _to_json({**dict.fromkeys(EVENT_KEYS), "time": time.time(), "kind": kind, **fields}) + "\n"


def _to_json(value: dict) -> str:
    return json.dumps(plain(value), allow_nan=False)


def plain(value: object) -> object:
    """JSON's own types; NaN and infinity, which JSON has not, as null; arrays and tensors as lists."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value if value is None or isinstance(value, bool | int | str) else str(value)
