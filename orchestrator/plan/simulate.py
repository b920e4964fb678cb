"""When each action of a schedule starts and ends, from durations per stage: an event-driven clock, no processes.

The table is the one that the runtime executes (`schedule.actions`). An action starts when its rank is free and what it
needs has arrived: a forward needs the stage before, a backward the stage after, a weight part its input part. A
transfer delays the neighbour, not the sender; between two stages of one rank it costs nothing.

Durations are in any one unit (seconds in the planner); all results are *simulated*, never measured.
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from orchestrator.plan.schedule import Action


@dataclass(frozen=True)
class StageTime:
    """How long one microbatch takes on one stage. A full backward takes `backward + weight`."""

    forward: float
    backward: float
    """The input-gradient part alone (I)."""
    weight: float
    """The weight-gradient part alone (W)."""
    again: float = 0.0
    """What the weight part of a split backward computes once more, that a full one has from its input part."""
    overlapped: float | None = None
    """A forward and a full backward run as one overlapped slot; None runs them in turn."""


@dataclass(frozen=True)
class Span:
    """One slot of a rank's row on the clock."""

    rank: int
    start: float
    end: float
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    spans: list[Span]
    step_time: float
    busy: list[float]
    """Per rank, time at work."""

    @property
    def bubble(self) -> list[float]:
        """Per rank, time idle inside the step."""
        return [self.step_time - busy for busy in self.busy]

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time."""
        return sum(self.bubble) / (len(self.busy) * self.step_time)


def simulate(table: list[list[tuple[Action, ...]]], times: list[StageTime], *, transfer: float = 0.0,
             chains: int = 1, cores: float | None = None) -> Timeline:
    """Run the table on the clock.

    times: one per stage. transfer: from the end of an action until its neighbour on another rank has the result.
    chains: copies of the pipeline whose stages are numbered on (DualPipe: 2). cores: that all ranks share, where they
    have none of their own (a CPU's): those at work progress alike.
    Raises ValueError if the table can never end.
    """
    order = _order(tuple(map(tuple, table)), len(times) // chains)
    seconds = _seconds(times)
    lengths = [_length(slot.actions, seconds) for slot in order]
    shared = cores is not None and cores < len(table)
    spans = _on_cores(order, lengths, transfer, cores) if shared else _alone(order, lengths, transfer, len(table))
    busy = [0.0] * len(table)
    for span in spans:
        busy[span.rank] += span.end - span.start
    return Timeline(spans, max(span.end for span in spans), busy)


class _Slot(NamedTuple):
    """What a rank runs next, and the earlier slots of other ranks whose results it needs."""

    rank: int
    actions: tuple[Action, ...]
    needs: tuple[int, ...]


@lru_cache(maxsize=512)
def _order(table: tuple, num_stages: int) -> list[_Slot]:
    """All slots, each after those that it needs: the same whatever they take. ValueError if there is no such order."""
    done: dict[tuple[str, int, int], int] = {}
    order: list[_Slot] = []
    waiting: dict[tuple[str, int, int], list[int]] = {}
    cursor, ready = [0] * len(table), deque(range(len(table)))
    while ready:
        rank = ready.popleft()
        for slot in islice(table[rank], cursor[rank], None):
            keys = [key for action in slot for key in _needs(action, num_stages)]
            missing = next((key for key in keys if key not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            needs = {done[key] for key in keys}
            for key in _finished(slot):
                done[key] = len(order)
                ready.extend(waiting.pop(key, ()))
            order.append(_Slot(rank, slot, tuple(i for i in needs if order[i].rank != rank)))
            cursor[rank] += 1
    if waiting:
        raise ValueError(f"the schedule deadlocks: nobody provides {sorted(waiting)[:3]}")
    return order


def _alone(order: list[_Slot], lengths: list[float], transfer: float, ranks: int) -> list[Span]:
    """Every rank runs at full speed whenever it has what it needs."""
    free, ends, spans = [0.0] * ranks, [], []
    for (rank, actions, needs), length in zip(order, lengths, strict=True):
        start = free[rank]
        for other in needs:
            if ends[other] + transfer > start:
                start = ends[other] + transfer
        end = free[rank] = start + length
        ends.append(end)
        spans.append(Span(rank, start, end, actions))
    return spans


def _on_cores(order: list[_Slot], lengths: list[float], transfer: float, cores: float) -> list[Span]:
    """Ranks at work share the cores evenly; one that waits leaves its share to the others."""
    rows: dict[int, deque[int]] = {}
    for number, slot in enumerate(order):
        rows.setdefault(slot.rank, deque()).append(number)
    now, began, ends, left = 0.0, {}, {}, {}
    while rows:
        arrivals = []
        for rank, row in rows.items():
            needs = order[row[0]].needs
            if rank in left or any(other not in ends for other in needs):
                continue
            arrival = max([ends[other] + transfer for other in needs], default=0.0)
            if arrival > now:
                arrivals.append(arrival)
            else:
                left[rank], began[row[0]] = lengths[row[0]], now
        speed = min(1.0, cores / max(1, len(left)))
        then = min([*(now + work / speed for work in left.values()), *arrivals])
        left = {rank: work - (then - now) * speed for rank, work in left.items()}
        now = then
        for rank in [rank for rank, work in left.items() if work <= 1e-9 * now]:
            del left[rank]
            ends[rows[rank].popleft()] = now
            if not rows[rank]:
                del rows[rank]
    return [Span(order[number].rank, began[number], ends[number], order[number].actions) for number in ends]


def _needs(action: Action, num_stages: int) -> list[tuple[str, int, int]]:
    kind, stage, micro = action
    if kind == "F":
        return [("F", stage - 1, micro)] if stage % num_stages else []
    if kind == "W":
        return [("I", stage, micro)]
    return [("F", stage, micro)] + ([("I", stage + 1, micro)] if (stage + 1) % num_stages else [])


def _finished(slot: tuple[Action, ...]) -> list[tuple[str, int, int]]:
    """Results that the slot provides: a full backward is also its two parts."""
    found = []
    for kind, stage, micro in slot:
        found += [("I", stage, micro), ("W", stage, micro)] if kind == "B" else [(kind, stage, micro)]
    return found


def _seconds(times: list[StageTime]) -> list[dict[str, float]]:
    """Of every stage, how long each kind of action takes; `FB` is an overlapped pair, if that is not in turn."""
    return [{"F": time.forward, "I": time.backward, "W": time.weight + time.again, "B": time.backward + time.weight}
            | ({} if time.overlapped is None else {"FB": time.overlapped}) for time in times]


def _length(slot: tuple[Action, ...], seconds: list[dict[str, float]]) -> float:
    if len(slot) == 1:
        return seconds[slot[0].stage][slot[0].kind]
    together = [seconds[action.stage].get("FB") for action in slot]  # half a pair of either stage
    if None not in together:
        return sum(together) / 2
    return sum(seconds[action.stage][action.kind] for action in slot)
