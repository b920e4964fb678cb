"""Scripted failures against the controller's decisions: a dummy group of ranks, a clock that is a number, no Ray."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cluster.group import Group, fault_of, silent_s, state_of
from orchestrator.cluster.policy import Action, Decision, Limits, decide, respond
from orchestrator.parallel.mesh import RankInfo

LIMITS = Limits(start_s=60, step_s=30, save_s=45)
DEADLINE = 1000.0
"""No script may need longer than this to be decided, seconds of the dummy clock."""


@dataclass(frozen=True)
class FailAt:
    """What happens to `rank` when it would finish `step`; `kind` is one of the branches of `happen`."""

    rank: int
    step: int
    kind: str


def formed(world_size: int = 4) -> Group:
    infos = [RankInfo(rank=rank, world_size=world_size, local_rank=rank % 2, local_world_size=2, node_rank=rank // 2,
                      master_addr="here", master_port=1) for rank in range(world_size)]
    return Group([None] * world_size, infos, {}, [{} for _ in infos], {}, formed_at=0.5)


def happen(fault: FailAt, group: Group, now: float) -> None:
    others = [rank for rank in range(len(group.runs)) if rank != fault.rank]
    status = group.statuses[fault.rank]
    if fault.kind == "killed":
        group.ended[fault.rank] = {"dead": True, "error": "its process died", "exit_code": 33, "at": now}
    elif fault.kind == "killed, others told first":
        for rank in others:
            group.ended[rank] = {"error": "Connection closed by peer", "exit_code": 1, "at": now - 1,
                                 "is_consequence": True}
        happen(FailAt(fault.rank, fault.step, "killed"), group, now)
    elif fault.kind == "bug":
        group.ended[fault.rank] = {"error": "ZeroDivisionError: x", "exit_code": 1, "at": now, "kind": "-"}
    elif fault.kind == "no disk":
        group.ended[fault.rank] = {"error": "no room", "exit_code": 3, "at": now, "kind": "NotFit"}
    elif fault.kind == "frozen":
        status["answers"] = False
    elif fault.kind == "hangs in a save":
        for each in group.statuses:  # a save ends for all ranks together
            each["phase"] = "save"
    else:
        assert fault.kind == "hangs in a step"


def play(fault: FailAt) -> tuple[Group, Decision, float]:
    """Steps of a second until `fault` strikes, then polls until somebody is blamed; how long that took, seconds."""
    group = formed()
    for step in range(1, fault.step + 1):
        for status in group.statuses:
            status.update(heartbeat_at=float(step), phase="step", step=step)
    now = struck = float(fault.step)
    happen(fault, group, now)
    while now < DEADLINE:
        decision = decide([state_of(rank, group, now) for rank in range(4)], LIMITS, now)
        if decision.action is not Action.wait:
            return group, decision, now - struck
        now += 0.25
        if fault.kind.startswith(("hangs", "frozen")):  # a rank that waits for another is as silent; only a little less
            for rank, status in enumerate(group.statuses):
                status["heartbeat_at"] = struck + 0.1 * (rank != fault.rank)
    raise AssertionError(f"{fault} was not decided by the deadline")


@pytest.mark.parametrize("kind, within_s, then", [
    ("killed", 0, Action.replace), ("killed, others told first", 0, Action.replace), ("bug", 0, Action.replace),
    ("no disk", 0, Action.fail), ("frozen", 31, Action.replace), ("hangs in a step", 31, Action.replace),
    ("hangs in a save", 46, Action.replace)])
@pytest.mark.parametrize("rank", range(4))
def test_the_rank_at_fault_is_blamed_in_time_and_answered_by_the_policy(kind, within_s, then, rank):
    group, decision, found_after_s = play(FailAt(rank, 7, kind))
    fault = fault_of(decision, group)
    assert (fault.rank, fault.node, fault.step) == (rank, str(rank // 2), 7) and fault.cause
    assert found_after_s <= within_s
    assert respond([fault]).action is then


def test_a_rank_that_never_starts_is_found_within_the_timeout_of_the_start():
    group = formed()
    for status in group.statuses[:3]:
        status.update(heartbeat_at=59.0, phase="step", step=1)
    assert decide([state_of(rank, group, 60.5) for rank in range(4)], LIMITS, 60.5).action is Action.wait
    decision = decide([state_of(rank, group, 61.0) for rank in range(4)], LIMITS, 61.0)
    assert (decision.rank, decision.action) == (3, Action.fail) and "phase start" in decision.cause
    assert silent_s(3, group, 61.0) == 60.5 and silent_s(0, group, 61.0) == 2.0


def test_the_table_of_faults_names_tests_that_exist():
    root = Path(__file__).parents[3]
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", (root / "docs" / "faults.md").read_text(), re.MULTILINE)
    there = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(rows) >= 11 and not [name for name in rows if f"def {name}(" not in there]
