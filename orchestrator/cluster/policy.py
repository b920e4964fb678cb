"""What to do next, as pure functions of what is known about the ranks: typed states in, one decision out. No Ray.

`decide` watches a group of ranks and names the one to blame for its end; `respond` says what to do about it, and
`reshape` what to go on with when some ranks have found no place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """A run as its controller sees it."""

    placing = "placing"
    forming = "forming"
    """The ranks connect, build the model and fetch their state."""
    training = "training"
    draining = "draining"
    """After a fault: the lost ranks are ended for good, the others come back from their broken group."""
    refilling = "refilling"
    """Other ranks are put into the places of the lost ones."""
    ended = "ended"


NEXT = {
    State.placing: {State.forming, State.ended},
    State.forming: {State.training, State.draining, State.refilling, State.ended},
    State.training: {State.draining, State.refilling, State.ended},
    State.draining: {State.refilling, State.ended},
    State.refilling: {State.forming, State.ended},
    State.ended: set(),
}
"""Which state may follow which. From `training` straight to `refilling`: ranks that stopped to be formed anew."""


class Phase(Enum):
    """A rank's life as the controller sees it."""

    start = "start"
    data = "data"
    step = "step"
    validate = "validate"
    save = "save"
    done = "done"
    failed = "failed"
    dead = "dead"


class Action(Enum):
    """`wait`: nothing to do. `finish`: all ranks are done. `blame`: a group has ended by the fault of one rank.

    Then what to do about it. `retry`: form the same ranks again, since only a connection was lost. `replace`: put
    another rank into the place of the lost one; the others keep their processes and their memory. `resize`: go on with
    fewer or more ranks. `stop`: end the run with an error."""

    wait = "wait"
    finish = "finish"
    blame = "blame"
    retry = "retry"
    replace = "replace"
    resize = "resize"
    stop = "stop"


@dataclass(frozen=True)
class RankState:
    """One rank, now. `cause`, `at` (unix time on its machine), `heard_at` (here; clocks may differ) and `exit_code`
    belong to a failed or dead one."""

    rank: int
    phase: Phase
    silent_s: float = 0.0
    """Seconds since its last sign of progress."""
    node: str = ""
    cause: str = ""
    at: float = 0.0
    heard_at: float = 0.0
    exit_code: int = 1
    is_consequence: bool = False
    """Its error is that of a lost connection: some other rank failed first."""
    answers: bool = True
    """Its process answered when last asked; a stopped or frozen one does not."""
    mute_s: float = 0.0
    """Seconds that its process has owed an answer."""


@dataclass(frozen=True)
class Limits:
    """Longest silence per phase, seconds."""

    start_s: float
    step_s: float
    save_s: float = 600.0
    settle_s: float = 3.0
    """After a first failure, how long the others may take to tell what they saw: the root cause may come second."""


@dataclass(frozen=True)
class Decision:
    action: Action
    cause: str = ""
    rank: int | None = None
    node: str = ""
    exit_code: int = 0
    is_lost: bool = False
    """The rank's process is gone, or does not come back by itself."""


def decide(states: list[RankState], limits: Limits, now: float) -> Decision:
    """Wait, finish, or blame a rank: the first that failed on its own account."""
    broken = [state for state in states if state.phase in (Phase.failed, Phase.dead)]
    if broken:
        culprit = min(broken, key=lambda state: (state.is_consequence, state.phase is not Phase.dead, state.at))
        frozen = [state for state in states if not state.answers and state not in broken]
        if culprit.is_consequence and frozen:
            return _hung(frozen[0])
        settled = now - min(state.heard_at for state in broken) >= limits.settle_s
        if settled or not culprit.is_consequence or len(broken) == len(states):
            return Decision(Action.blame, culprit.cause, culprit.rank, culprit.node, culprit.exit_code,
                            is_lost=not culprit.is_consequence)
        return Decision(Action.wait)
    if all(state.phase is Phase.done for state in states):
        return Decision(Action.finish)
    limit = {Phase.start: limits.start_s, Phase.save: limits.save_s, Phase.done: float("inf"), Phase.data: float("inf")}
    late = [state for state in states if state.silent_s > limit.get(state.phase, limits.step_s)
            or state.mute_s > limits.step_s]  # whatever it is at, a process that lives answers beside it
    if late:  # all wait for the one that hangs: one that does not answer (its phase is stale), else the most silent
        waiting = [state for state in states if state.phase is not Phase.done]
        frozen = [state for state in waiting if not state.answers]
        return _hung(max(frozen or waiting, key=lambda state: state.silent_s))
    return Decision(Action.wait)


@dataclass(frozen=True)
class Fault:
    """What ended a group of ranks."""

    rank: int
    node: str
    cause: str
    step: int
    """The last step that any rank had finished."""
    exit_code: int
    is_final: bool = False
    """Another try cannot help: a bad request, an unfit environment, results not to be trusted."""
    is_lost: bool = True
    """The rank is gone for good; otherwise only a connection was."""


NO_PROGRESS = 93
"""Exit code of a crash loop: starting again would only burn money."""
TRANSIENT = 33


def respond(faults: Sequence[Fault], *, max_in_vain: int = 3) -> Decision:
    """Retry or replace, unless the same error came twice at one step or faults kept coming without progress."""
    last = faults[-1]
    told = (last.rank, last.node)
    if last.is_final:
        return Decision(Action.stop, last.cause, *told, last.exit_code)
    before = faults[-2] if len(faults) > 1 else None
    if before and last.exit_code == 1 and (before.cause, before.step) == (last.cause, last.step):
        return Decision(Action.stop, last.cause, *told, 1)
    recent = faults[-max_in_vain:]
    if len(recent) == max_in_vain and all(fault.step <= recent[0].step for fault in recent):
        causes = "; ".join(dict.fromkeys(f"rank {fault.rank}: {fault.cause}" for fault in recent))
        return Decision(Action.stop, f"{max_in_vain} faults without progress since step {recent[0].step} ({causes})",
                        *told, NO_PROGRESS)
    again = before is not None and before.step >= last.step
    return Decision(Action.replace if last.is_lost or again else Action.retry, last.cause, *told,
                    is_lost=last.is_lost or again)


def reshape(decision: Decision, *, size: int, there: int, sizes: Sequence[int]) -> tuple[Decision, int]:
    """What to go on with, and how many ranks: the largest of `sizes` for which there are enough with a place.

    size: ranks before. there: ranks with a place, warm spares included. sizes: allowed numbers of ranks.
    """
    fitting = max((allowed for allowed in sizes if allowed <= there), default=0)
    if not fitting:
        cause = f"{decision.cause}; {there} ranks have a place, the run needs {min(sizes)}"
        return Decision(Action.stop, cause, decision.rank, decision.node, TRANSIENT), 0
    if fitting == size:
        return decision, size
    return Decision(Action.resize, decision.cause, decision.rank, decision.node), fitting


def _hung(state: RankState) -> Decision:
    limit = state.phase.name if state.phase in (Phase.start, Phase.save) else Phase.step.name
    cause = f"no progress for {state.silent_s:.0f} s in phase {state.phase.name}" + (
        f" (cluster.{limit}_timeout_s)" if state.answers else ", and its process does not answer")
    return Decision(Action.blame, cause, state.rank, state.node, TRANSIENT, is_lost=True)
