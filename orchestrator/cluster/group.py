"""One forming of the ranks, and the policy's view of it: who is in which state, and what ended it. No Ray."""

from dataclasses import dataclass, field

from orchestrator.cluster.policy import Decision, Fault, Phase, RankState
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, Preempted, Transient

FINAL = {kind.__name__: kind for kind in (BadRequest, NotFit, NotTrustworthy, Preempted, Transient)}
"""Errors that another try at once cannot help. A rank's own Transient is storage that was away for minutes."""


@dataclass
class Group:
    """One forming of the ranks: what was asked of them and what is known of each."""

    runs: list
    infos: list
    ended: dict[int, dict]
    statuses: list[dict]
    asked: dict
    """Outstanding question -> (rank, time.monotonic() of asking)."""
    formed_at: float
    generation: int = 0
    told_to_stop: set[int] = field(default_factory=set)


def fault_of(decision: Decision, group: Group) -> Fault:
    record = group.ended.get(decision.rank, {})
    step = max((status.get("step", 0) for status in group.statuses), default=0)
    return Fault(decision.rank, decision.node, decision.cause, step, decision.exit_code,
                 is_final=record.get("kind") in FINAL, is_lost=decision.is_lost)


def cause_of(record: dict | None) -> str:
    return record["error"] if record else "did not come back from its broken group"


def state_of(rank: int, group: Group, now: float) -> RankState:
    ended, status, node = group.ended.get(rank), group.statuses[rank], group.infos[rank].node_rank
    if ended is None:
        owes = {"answers": status.get("answers", True), "mute_s": status.get("mute_s", 0.0)}
        if status.get("generation") != group.generation:  # nothing yet, or from before this group was formed
            return RankState(rank, Phase.start, now - group.formed_at, str(node), **owes)
        phase = Phase[status["phase"]] if status.get("phase") in Phase.__members__ else Phase.start
        phase = Phase.step if phase is Phase.done else phase
        return RankState(rank, phase, now - status["heartbeat_at"], str(node), **owes)
    if "result" in ended:
        return RankState(rank, Phase.done, node=str(node))
    return RankState(rank, Phase.dead if ended.get("dead") else Phase.failed, node=str(node), cause=ended["error"],
                     at=ended["at"], heard_at=ended.get("heard_at", ended["at"]),
                     exit_code=ended["exit_code"], is_consequence=ended.get("is_consequence", False))


def silent_s(rank: int, group: Group, now: float) -> float:
    """Seconds from a rank's last sign of progress to `now`, both unix times; since the forming if there was none."""
    return round(now - max(group.statuses[rank].get("heartbeat_at", 0.0), group.formed_at), 3)
