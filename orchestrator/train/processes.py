"""What the kernel says of a process and to it, and the file locks that it drops with their holder."""

import fcntl
import signal
from typing import IO

from orchestrator.errors import NotFit


def stop_signals() -> list[signal.Signals]:
    """Those that ask a run to end with a checkpoint: SIGTERM, Ctrl-C, and a terminal that is closed, of which shell and
    kernel may tell twice; but not where nohup has made a process deaf to it."""
    deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if deaf else [signal.SIGHUP])]


def born(pid: int | None) -> str | None:
    """When a process started, in ticks since the machine did: a restarted container gives the same numbers again."""
    fields = _stat(pid)
    return fields[19] if fields else None


def lives(pid: int) -> bool:
    """Zombies do not: nobody may come to collect them."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _stat(pid: int | None) -> list[str]:
    """From the state on: the name before it may hold anything."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def try_lock(file: IO, key: str, folder: object) -> bool:
    """Whether the lock on an open file in `folder`, which the config has at `key`, is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise NotFit(f"{key}={folder}: its file system takes no locks ({error.strerror}); mount it with them, or "
                     f"choose another {key}") from error
