"""A run's controller as a detached actor of the cluster, so that a lost driver costs no work: it ends the run with a
checkpoint and a summary, then itself.

The driver only shows what the keeper says and passes on that it should stop. All ranks belong to the keeper and end
with it; it lives on the driver's node, and sees by the process id whether the driver is still there.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import errors
from orchestrator.config import Config, from_dict, to_dict
from orchestrator.train.processes import lives
from orchestrator.train.progress import Progress

ASK_EVERY_S = 0.25
SILENT_S = 60.0
"""A driver whose process cannot be seen from here is gone when it has not asked for this long."""


class Keeper:
    """`attempt(config, progress, notice)` is a run; what it says and shows waits here for the driver to ask."""

    def __init__(self, driver: int):
        self.driver = driver if lives(driver) else None
        self.asked_at, self.started, self.ended = time.monotonic(), False, False
        self.cause: str | None = None
        self.lines: list[str] = []
        self.status: dict = {}
        threading.Thread(target=self._leave_alone, daemon=True, name="driver").start()

    def run(self, attempt: Callable, config: dict) -> dict:
        """The run to its end: {"summary": ...} or {"error": class, "message": ...}."""
        self.started = True
        try:
            return {"summary": attempt(from_dict(Config, config), progress=self, notice=self.notice)}
        except errors.SparingError as error:
            return {"error": errors.public_kind(error), "message": str(error)}
        finally:
            self.ended = True

    def say(self, line: str) -> None:
        self.lines.append(line)

    def show(self, status: dict) -> None:
        self.status = status

    def ask(self, seen: int, cause: str | None) -> dict:
        """What is new since `seen` lines; `cause` asks for the end with a checkpoint."""
        self.asked_at, self.cause = time.monotonic(), self.cause or cause
        return {"lines": self.lines[seen:], "status": self.status}

    def notice(self) -> str | None:
        """Why the run should stop; polled by its controller."""
        return self.cause or ("its driver is gone" if self._is_alone() else None)

    def _is_alone(self) -> bool:
        if self.driver is not None:
            return not lives(self.driver)
        return time.monotonic() - self.asked_at > SILENT_S

    def _leave_alone(self) -> None:
        while (self.started and not self.ended) or not self._is_alone():
            time.sleep(1.0)
        os._exit(0)


def keep(attempt: Callable, config: Config, progress: Progress, *, notice: Callable[[], str | None]) -> dict:
    """Run `attempt` in a keeper and return its summary; raises what it raised, `Transient` if the keeper was lost.
    `notice()`: see `Controller`, of the driver's signals."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper = ray.remote(Keeper).options(num_cpus=0, max_concurrency=4, lifetime="detached", max_restarts=0,
                                        scheduling_strategy=here).remote(os.getpid())
    try:
        outcome = _follow(keeper, keeper.run.remote(attempt, to_dict(config)), notice, progress)
    except RayActorError as error:
        raise errors.Transient(f"the run's controller is lost ({str(error).strip().splitlines()[-1]}); continue with "
                               f"run.dir={config.run.dir} resume=auto") from None
    finally:
        with contextlib.suppress(RayError):
            ray.kill(keeper)
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return outcome["summary"]


def _follow(keeper, running, notice: Callable[[], str | None], progress: Progress) -> dict:
    seen, done = 0, []
    while not done:
        done, _ = ray.wait([running], timeout=ASK_EVERY_S)
        said = ray.get(keeper.ask.remote(seen, notice()))
        seen += len(said["lines"])
        for line in said["lines"]:
            progress.say(line)
        if said["status"]:
            progress.show(said["status"])
    return ray.get(running)
