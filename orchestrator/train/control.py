"""What a running rank tells the outside and is told by it: a small thread-safe blackboard, no transport of its own."""

import threading
import time
from dataclasses import dataclass, field

from orchestrator.errors import PeerLost

_BEGAN = time.time() - time.monotonic()


def steady() -> float:
    """Unix time that never jumps: what is waited for and what is charged go by it, and setting a clock is neither."""
    return _BEGAN + time.monotonic()


@dataclass(frozen=True)
class Recovery:
    """Why and from what a group of ranks is formed again within one attempt; the same for all its ranks."""

    generation: int
    """1 for the first recovery of the attempt."""
    fault_at: float
    """Unix time at which the fault was found."""
    events: list[dict] = field(default_factory=list)
    """What the controller decided meanwhile, for rank 0 to log."""
    peak_flops_per_s: float | None = None
    """As measured when the run started."""
    first_claim: int = 0
    """The claim on checkpoint.dir that this attempt started with: older checkpoints there may be another run's."""
    skip_to: int = 0
    """After a rollback: the global index of the sample to go on with; the data before it led to a bad step."""
    kept: dict = field(default_factory=dict)
    """After a rollback: counts of the progress that do not go back."""
    decision: dict = field(default_factory=dict)
    """What was decided: action, cause, rank, node."""
    held: list[tuple[float, int, int]] = field(default_factory=list)
    """From which unix time on how many devices were held, with a rank and without: their number may change."""


class Control:
    """The rank program updates it, its host (a Ray actor, a signal handler) reads it and may ask it to stop."""

    def __init__(self, *, generation: int = 0) -> None:
        self.generation = generation
        self._lock = threading.Lock()
        self._fields: dict = {"phase": "start"}
        self._moved_at = time.monotonic()
        self._stop_cause: str | None = None
        self.must_leave = False
        """The group is broken, though its connections may stand: the rank program is to end at once, without a save."""

    def update(self, **fields) -> None:
        """Set fields of the status; every update is a sign of progress."""
        with self._lock:
            self._fields.update(fields)
            self._moved_at = time.monotonic()

    def alive(self, **fields) -> None:
        """As `update`, from whatever takes long; `PeerLost` where it would be in vain."""
        if self.must_leave:
            raise PeerLost("the group of ranks was given up")
        self.update(**fields)

    def status(self) -> dict:
        """A copy: rank, phase, step, steps, loss, tokens_per_s, usd_total, stages, layers, experts,
        tokens_per_expert, notices (`Accounts.notices`), silent_s (since the last progress), generation."""
        with self._lock:
            return self._fields | {"silent_s": time.monotonic() - self._moved_at, "generation": self.generation}

    def request_stop(self, cause: str) -> None:
        """Ask for a checkpoint and a clean end after the current step; the first cause stands."""
        with self._lock:
            self._stop_cause = self._stop_cause or cause

    @property
    def stop_cause(self) -> str | None:
        with self._lock:
            return self._stop_cause
