"""A run's directory: named, claimed by one live run at a time, with the resolved config in it before anything starts.

A local directory is held by a file lock that the kernel drops with its holder; an object store by an exclusively
created `lock.json`, which its holder renews and a later attempt takes over once its holder is known to be gone.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from orchestrator.config import Config, from_dict, to_dict
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, SparingError
from orchestrator.train import storage
from orchestrator.train.finish import SUMMARY, read_kept
from orchestrator.train.lineage import list_checkpoints
from orchestrator.train.metrics import EVENTS, METRICS, append_event, read_lines
from orchestrator.train.processes import born, try_lock

logger = logging.getLogger(__name__)

CONFIG, LOCK, STATUS = "config.yaml", "lock.json", "status.json"
STALE_S, LOOK_S, RENEW_S = 120.0, 2.0, 30.0
"""Age of the last sign of a run (status.json, lock.json) after which its holder on another machine counts as gone; how
often it is looked for, and how often a holder renews its lock.json."""


@dataclass(frozen=True)
class Claim:
    """A run directory that is ours until the context ends."""

    config: Config
    """With `run.dir` and `checkpoint.dir` filled in, absolute where local."""
    attempt: int
    """1 for the first start in this directory."""


@contextlib.contextmanager
def claim_run_dir(config: Config) -> Iterator[Claim]:
    """Make or re-open the run directory and hold it."""
    config = named(config)
    run_dir = config.run.dir
    with contextlib.ExitStack() as stack:
        local = storage.local_path(run_dir)
        stack.enter_context(_locked_folder(local, run_dir) if local else _locked_url(run_dir))
        _refuse_used(config)
        attempt = 1 + len([row for row in read_lines(run_dir, EVENTS) if row.get("kind") == "attempt_claimed"])
        path = storage.join(run_dir, CONFIG)
        before = storage.read_bytes(path) if storage.exists(path) else None
        storage.write_bytes(path, _yaml(config).encode())
        append_event(run_dir, "attempt_claimed", attempt=attempt, node=socket.gethostname(), pid=os.getpid())
        try:
            yield Claim(config, attempt)
        except BadRequest:  # the ranks', and the next resume goes on with the run's config, not with what they refused
            if before is not None:
                storage.write_bytes(path, before)
            raise


def named(config: Config) -> Config:
    """With `run.dir` and `checkpoint.dir` filled in; a default run directory is made."""
    run = config.run
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name):
        raise BadRequest(f"run.name={run.name}: must be letters, digits, dots, dashes and underscores; choose another")
    run_dir = run.dir if run.dir is not None else _new_dir(run.name)
    if storage.local_path(run_dir):
        run_dir = os.path.abspath(storage.local_path(run_dir))
    checkpoints = config.checkpoint.dir or storage.join(run_dir, "checkpoints")
    if storage.local_path(checkpoints):
        checkpoints = os.path.abspath(storage.local_path(checkpoints))
    resume = config.resume
    if resume not in ("none", "auto") and storage.local_path(resume):
        resume = os.path.abspath(storage.local_path(resume))
    return replace(config, run=replace(run, dir=run_dir), checkpoint=replace(config.checkpoint, dir=checkpoints),
                   resume=resume)


def read_config(path: str) -> Config:
    """Of a `config.yaml`, as runs keep it."""
    import yaml

    local = storage.local_path(path)
    try:
        if local is not None and (os.path.isdir(local) or not os.path.exists(local)):
            raise ValueError("no such file")
        return from_dict(Config, yaml.safe_load(storage.read_bytes(path)))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, FileNotFoundError) as error:
        raise BadRequest(f"{path}: is no config of a run ({str(error).splitlines()[0]}); repair it, or name another "
                         "run.dir") from error


def _new_dir(name: str) -> str:
    """runs/<name>-<time>, made here so that two runs of one second get two directories."""
    stem = os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    for number in range(1, 1000):
        path = stem if number == 1 else f"{stem}-{number}"
        try:
            os.makedirs(path)
        except FileExistsError:
            continue
        except OSError as error:
            raise NotFit(f"run.dir={path}: cannot be made ({error.strerror}); choose another run.dir") from error
        return path
    raise NotFit(f"run.dir={stem}: a thousand runs of this second exist; name another run.dir")


def _refuse_used(config: Config) -> None:
    """A new run has both directories to itself: it would delete another one's checkpoints as its own older ones, and
    go on from them under resume=auto."""
    if config.resume == "auto":
        return
    used = [name for name in (METRICS, SUMMARY) if storage.exists(storage.join(config.run.dir, name))]
    if used:
        raise BadRequest(f"run.dir={config.run.dir}: holds a run already ({used[0]}); continue it with resume=auto, or "
                         "choose another run.dir")
    if found := list_checkpoints(config.checkpoint.dir):
        raise BadRequest(f"checkpoint.dir={config.checkpoint.dir}: holds checkpoints already ({found[-1]}), and a run "
                         "that does not continue them needs a directory of its own; continue with resume=auto, or "
                         "choose another checkpoint.dir")


@contextlib.contextmanager
def _locked_folder(folder: str, run_dir: str) -> Iterator[None]:
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, LOCK), "a+")
    except OSError as error:
        raise NotFit(f"run.dir={run_dir}: cannot be written ({error.strerror}); choose another run.dir") from error
    with file:
        file.seek(0)
        locked = partial(try_lock, file, "run.dir", run_dir)
        if not locked() and _is_live(run_dir, file.read(), is_free=locked):
            file.seek(0)
            raise _in_use(run_dir, file.read())
        file.truncate(0)
        file.write(_holder())
        file.flush()
        yield


@contextlib.contextmanager
def _locked_url(run_dir: str) -> Iterator[None]:
    path = storage.join(run_dir, LOCK)
    try:
        storage.create_exclusive(path, _holder().encode())
    except FileExistsError:
        held = storage.read_bytes(path).decode()
        if _is_live(run_dir, held, is_free=lambda: not storage.exists(path)):
            raise _in_use(run_dir, held) from None
        storage.write_bytes(path, _holder().encode())
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, ended), daemon=True, name="lock")
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join(RENEW_S)
        if _still_ours(path):
            storage.remove(path)


def _renew(path: str, ended: threading.Event) -> None:
    """Until the end, or until somebody else has taken it over. A write that fails is made up for by the next."""
    while not ended.wait(RENEW_S):
        with contextlib.suppress(SparingError):
            if not _still_ours(path):
                logger.warning("%s: another run has taken this directory over", path)
                return
            storage.write_bytes(path, _holder().encode(), retry_s=1)


def _is_live(run_dir: str, held: str, *, is_free: Callable[[], bool]) -> bool:
    """Whether the holder still has the directory. One on another machine is waited for until it is seen at work or has
    been silent for long: where a run's machine was lost, its next start comes sooner than that, and a file server may
    not know yet that the machine is gone."""
    is_local = storage.local_path(run_dir) is not None  # there the lock itself ends with its holder
    try:
        holder = json.loads(held)
    except ValueError:
        return is_local
    if holder.get("host") == socket.gethostname():
        start = born(holder.get("pid"))
        return is_local or not _is_ours(holder) and start is not None and holder.get("born", start) == start
    first = _last_sign(run_dir, holder)
    deadline = time.monotonic() + min(STALE_S, first + STALE_S - time.time())
    while time.monotonic() < deadline and not is_free():
        time.sleep(LOOK_S)
        if _last_sign(run_dir, holder) != first:
            return True
    return is_local and not is_free()


def _last_sign(run_dir: str, holder: dict) -> float:
    signs = [holder.get("since", 0.0)]
    with contextlib.suppress(NotTrustworthy, KeyError):
        signs.append((read_kept(run_dir, STATUS) or {"time": 0.0})["time"])
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        signs.append(json.loads(storage.read_bytes(storage.join(run_dir, LOCK)))["since"])
    return max(signs)


def _in_use(run_dir: str, held: str) -> BadRequest:
    try:
        holder = json.loads(held)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):
        who = "another process"
    return BadRequest(f"run.dir={run_dir}: is in use by a live run ({who}); wait for it, stop it, or choose another "
                      "run.dir")


def _holder() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()),
                       "since": time.time()})


def _still_ours(path: str) -> bool:
    try:
        return _is_ours(json.loads(storage.read_bytes(path)))
    except (FileNotFoundError, ValueError):
        return False


def _is_ours(holder: dict) -> bool:
    return all(holder.get(key) == value for key, value in json.loads(_holder()).items() if key != "since")


def _yaml(config: Config) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)
