"""Ray for the length of a run: our own on this machine, or the cluster that this process is in; signals to stop it."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import ray
from ray.exceptions import RayError

from orchestrator.choices import ClusterKind
from orchestrator.config import Config
from orchestrator.errors import NotFit, Preempted, Transient
from orchestrator.train import processes

RANK_PROGRAM = "orchestrator.train.loop"
ECHO_S = 1.0
"""`timeout` and batch systems send a signal twice, to a process and to its group."""


@contextlib.contextmanager
def ray_session(config: Config, kind: ClusterKind) -> Iterator[None]:
    """Ray for the length of the run: our own on this machine, or the cluster we are in. Quiet, without telemetry."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what Ray says of a lost process is no picture in a log
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if ray.is_initialized():
        yield
        return
    heard_by = signal.getsignal(signal.SIGTERM)
    try:
        if kind is ClusterKind.ray:
            _knock(os.environ.get("RAY_ADDRESS", ""), patience_s=config.cluster.join_timeout_s)
            ray.init(address="auto", **quiet)
        else:
            ranks = config.layout.world_size + config.cluster.spares
            _start(ranks, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=128 << 20,
                   **quiet)
    except ConnectionError as error:
        raise NotFit("cluster=ray: no Ray cluster is reachable from here; start one with `ray start --head`, set "
                     "RAY_ADDRESS (and RAY_AUTH_MODE and the token of a cluster that asks for one), or use "
                     "cluster=local") from error
    except (RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise NotFit(f"Ray could not be started: {str(error).splitlines()[0]}") from error
    except Exception as error:  # Ray raises a bare one when its processes do not come up in time
        raise Transient(f"Ray did not come up ({str(error).split('. ')[0]}); try again when the machine is less busy"
                        ) from error
    signal.signal(signal.SIGTERM, heard_by)  # not by Ray, whose handler aborts the process three seconds later
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def early_end() -> Iterator[None]:
    """Until `stop_signals`, SIGTERM ends the run at once, as one that is to be started again. Afterwards the handlers
    are those of before. It is an exit, as in Ray's own handler while Ray starts, which takes an Exception for a failure
    of what it tries."""
    before = {number: signal.getsignal(number) for number in processes.stop_signals()}
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
    try:
        yield
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        signal.alarm(0)  # Ray's: see `ray_session`
        raise Preempted("SIGTERM before there were ranks; nothing is lost, the same command starts it again") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> Callable[[], str | None]:
    """A function that names the first SIGTERM, Ctrl-C or closed terminal from now on: it asks for a checkpoint and a
    clean end. A second one ends at once, but for its echo. Within `early_end`, which puts the handlers back."""
    heard: list[tuple[str, float]] = []

    def caught(number, _frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if heard and number != signal.SIGHUP and now - heard[0][1] > ECHO_S:
            raise Transient(f"ended at once by a second {name}; the last checkpoint stands")
        heard.append((name, now))  # no print: the signal may have come in the middle of one

    for number in processes.stop_signals():
        signal.signal(number, caught)
    return lambda: heard[0][0] if heard else None


def _start(ranks: int, **options) -> None:
    """A Ray of our own; once more where a busy machine does not bring it up in the 30 s that Ray allows itself. It has
    a process ready for every rank, which imports what a rank needs while the driver is still at work."""
    path = os.pathsep.join(filter(None, [_source_root(), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "RAY_preload_python_modules": RANK_PROGRAM, "RAY_ADDRESS": None,
                   "RAY_num_workers_soft_limit": str(ranks), "RAY_kill_worker_timeout_milliseconds": "500"}
    with _process_group_of_its_own(), _deaf_to_hangups(), _environment(**environment):
        try:
            ray.init(address="local", num_cpus=ranks, **options)
        except Exception:
            ray.shutdown()
            ray.init(address="local", num_cpus=ranks, **options)


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Of processes that are started meanwhile; None takes a variable away."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _process_group_of_its_own() -> Iterator[None]:
    """For the processes that are started meanwhile: `timeout`, a batch system and the like send SIGTERM to the whole
    group of the driver, and Ray must outlive it by a checkpoint. Not on a terminal, where the group gets the keys."""
    group = os.getpgrp()
    if sys.stdin is None or sys.stdin.isatty() or os.getsid(0) == os.getpid():
        yield
        return
    os.setpgid(0, 0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the group may be gone, with whoever led it
            os.setpgid(0, group)


@contextlib.contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """The processes that are started meanwhile: a terminal that is closed tells all of them, and Ray must outlive the
    driver by a checkpoint."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _knock(address: str, *, patience_s: float) -> None:
    """Whether anybody listens there; Ray itself would try for minutes. A head that is just starting is waited for."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience_s
    while host and port.isdigit() and "/" not in address:
        try:
            return socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"{address}: {error}") from error
        time.sleep(1.0)


def _source_root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def gpu_name() -> str | None:
    """The cluster's GPU model as Ray reports it; None where there is no GPU."""
    resources = ray.cluster_resources()
    if not resources.get("GPU"):
        return None
    types = [key.split(":", 1)[1] for key in resources if key.startswith("accelerator_type:")]
    return types[0] if types else "GPU"
