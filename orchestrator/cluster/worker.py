"""The actor around one rank: runs the rank program in one of its threads while others answer questions about it."""

import contextlib
import dataclasses
import gc
import os
import socket
import stat
import sys
import threading
import time
import traceback

import ray
from ray.exceptions import RayActorError

from orchestrator.config import Config, from_dict
from orchestrator.errors import PeerLost, SparingError, Transient, public_kind
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.control import Control, Recovery, steady

THREADS = 4
"""One for the rank program, the others for `status`, `request_stop` and the like."""
LEASE_S, FIRST_LEASE_S = 60.0, 600.0
"""An actor that nobody has asked anything this long ends itself: its controller is gone, or its node is. The first
lease is that of an actor which waits for others to be placed."""


class Worker:
    """Method results are plain data, so that a driver needs nothing but this room's classes to read them; torch is for
    the actor alone to import."""

    def __init__(self) -> None:
        from orchestrator.train.replica import Replicas

        self.control = Control(generation=-1)
        self.store_at: tuple[str, int] | None = None
        self.replicas = Replicas()
        self.asked_at, self.lease_s = time.monotonic(), FIRST_LEASE_S
        self.raylet = os.getppid()
        self.lock, self.listener = threading.Lock(), None
        threading.Thread(target=self._keep_lease, daemon=True, name="lease").start()

    def home(self) -> dict:
        """Where this actor lives: Ray node id, address, host, pid, GPU index (-1 is none), a port it listens at."""
        self.asked_at = time.monotonic()
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        with self.lock:
            if self.listener is None:  # the same until it is used: answers may cross
                dual = socket.has_dualstack_ipv6()
                self.listener = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET,
                                                     backlog=socket.SOMAXCONN, dualstack_ipv6=dual)
            port = self.listener.getsockname()[1]
        gpu = device_index(gpus[0], os.environ.get("CUDA_VISIBLE_DEVICES")) if gpus else -1
        return {"node": context.get_node_id(), "address": ray.util.get_node_ip_address(), "host": socket.gethostname(),
                "pid": os.getpid(), "gpu": gpu, "port": port}

    def warm(self) -> None:
        """Import what a rank needs, beside whatever else is asked, so that it is ready at once."""
        import orchestrator.train.loop  # noqa: F401

    def run(self, config: dict, info: RankInfo, placed_at: float, attempt: int,
            recovery: Recovery | None = None) -> dict:
        """The rank program to its end: {"result": ...} or {"error": ..., "at": ..., ...}; never raises."""
        self.asked_at, self.lease_s = time.monotonic(), LEASE_S
        self.control = Control(generation=recovery.generation if recovery else 0)
        self.store_at = info.master_addr, info.master_port
        if info.rank == 0:
            with self.lock:
                if self.listener is not None and self.listener.getsockname()[1] == info.master_port:
                    info, self.listener = dataclasses.replace(info, listen_fd=self.listener.detach()), None
        outcome = self._run(config, info, placed_at, attempt, recovery)
        gc.collect()  # a broken group's connections, so that its other ranks hear of it, and its devices' memory
        return outcome

    def _run(self, config: dict, info: RankInfo, placed_at: float, attempt: int, recovery: Recovery | None) -> dict:
        try:
            from orchestrator.train.loop import run_rank

            return {"result": run_rank(from_dict(Config, config), info, control=self.control, placed_at=placed_at,
                                       attempt=attempt, replicas=self.replicas, recovery=recovery)}
        except SparingError as error:
            return {"error": str(error), "exit_code": error.exit_code, "at": steady(), "kind": public_kind(error),
                    "is_consequence": isinstance(error, PeerLost)}
        except BaseException as error:
            lost = _is_lost_connection(error)
            return {"error": f"{type(error).__name__}: {error}", "exit_code": Transient.exit_code if lost else 1,
                    "at": steady(), "kind": type(error).__name__, "traceback": traceback.format_exc(),
                    "is_consequence": lost}

    def stacks(self) -> str:
        """What every thread of this process is doing."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
                         for ident, frame in sys._current_frames().items())

    def status(self) -> dict:
        self.asked_at = time.monotonic()
        return self.control.status()

    def request_stop(self, cause: str, generation: int) -> None:
        """For the forming of the ranks that it was meant for, and no later one."""
        if self.control.generation == generation:
            self.control.request_stop(cause)

    def leave(self, silent: set[str] = frozenset()) -> None:
        """Leave the group of ranks: one of them is lost, even if its process lives on and the steps go on with it.

        silent: addresses of machines that nothing more is to be expected from."""
        self.control.must_leave = True
        hang_up(silent, self.store_at)
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            # A kernel of NCCL hears of nothing else, and its watchdog would end the process.
            with contextlib.suppress(Exception):  # already gone
                torch.distributed.distributed_c10d._abort_process_group()

    def _keep_lease(self) -> None:
        """Also end with the raylet: Ray itself waits to become a child of process 1, which an orphan of a desktop
        session or of some containers never does."""
        while True:
            time.sleep(1.0)
            if time.monotonic() - self.asked_at > self.lease_s or os.getppid() != self.raylet:
                os._exit(33)


def hang_up(addresses: set[str], store_at: tuple[str, int] | None = None) -> None:
    """Shut this process's connections to those addresses: TCP would wait for a machine whose cable is cut for many
    minutes, and gloo with it. And those to the ranks' store, by which this one may be waiting for what the lost one
    was to write there."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(int(entry)).st_mode):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        host, port = connection.getpeername()[:2]
                        host = host.removeprefix("::ffff:")
                        if host in addresses or (host, port) == store_at:
                            connection.shutdown(socket.SHUT_RDWR)


def device_index(name: str, visible: str | None) -> int:
    """Ray gives a device its name on the machine, as in CUDA_VISIBLE_DEVICES; torch counts those that are visible."""
    return visible.split(",").index(name) if visible else int(name)


def why_dead(error: RayActorError) -> str:
    """One line of Ray's account of an actor's death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "killed" in line.lower() or "died" in line.lower()]
    line = (telling or lines)[-1].split("Worker exit detail: ")[-1].split(" Some common causes")[0]
    return f"its process died ({line.rstrip('.')})"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because its other end went away: the other end is to blame."""
    from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

    if isinstance(error, DistBackendError | DistNetworkError | DistStoreError | ConnectionError):
        return True
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue",
             "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
