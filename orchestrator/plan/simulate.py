"""When each action of a schedule starts and ends, from durations per stage: an event-driven clock, no processes.

The table is the one that the runtime executes (`schedule.actions`). An action starts when its rank is free and what it
needs has arrived: a forward needs the stage before, a backward the stage after, a weight part its input part. A
transfer delays the neighbour, not the sender; between two stages of one rank it costs nothing.

Durations are in any one unit (seconds in the planner); all results are *simulated*, never measured.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial

from orchestrator.plan.schedule import Action


@dataclass(frozen=True)
class StageTime:
    """How long one microbatch takes on one stage. A full backward takes `backward + weight`."""

    forward: float
    backward: float
    """The input-gradient part alone (I)."""
    weight: float
    """The weight-gradient part alone (W)."""
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
    peak_in_flight: list[list[int]]
    """Per rank, for each of its stages in order of number, the most microbatches whose activations are held at once."""
    peak_held: list[float]
    """Per rank, the most activation held at once, each microbatch weighted by `weights` of its stage."""

    @property
    def bubble(self) -> list[float]:
        """Per rank, time idle inside the step."""
        return [self.step_time - busy for busy in self.busy]

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time."""
        return sum(self.bubble) / (len(self.busy) * self.step_time)


def simulate(table: list[list[tuple[Action, ...]]], times: list[StageTime], *, transfer: float = 0.0,
             weights: list[float] | None = None, chains: int = 1, cores: float | None = None) -> Timeline:
    """Run the table on the clock.

    times: one per stage. transfer: from the end of an action until its neighbour on another rank has the result.
    weights: activation of one microbatch per stage, any unit; one each by default. Activations are held from the
    forward until the weight part is done. chains: copies of the pipeline whose stages are numbered on (DualPipe: 2).
    cores: that all ranks share, where they have none of their own (a CPU's): those at work progress alike.
    Raises ValueError if the table can never end.
    """
    num_stages = len(times) // chains
    rank_of = {action.stage: rank for rank, row in enumerate(table) for slot in row for action in slot}
    counts, peak = held(table, weights or [1.0] * len(times))
    run = _alone if cores is None or cores >= len(table) else partial(_shared, cores=cores)
    spans = run(table, times, rank_of, num_stages, transfer)
    busy = [0.0] * len(table)
    for span in spans:
        busy[span.rank] += span.end - span.start
    return Timeline(spans, max(span.end for span in spans), busy, counts, peak)


def _alone(table: list, times: list[StageTime], rank_of: dict, num_stages: int, transfer: float) -> list[Span]:
    """Every rank runs at full speed whenever it has what it needs."""
    done: dict[tuple[str, int, int], float] = {}
    free, cursor = [0.0] * len(table), [0] * len(table)
    spans: list[Span] = []
    waiting: dict[tuple[str, int, int], list[int]] = {}
    ready = deque(range(len(table)))
    while ready:
        rank = ready.popleft()
        row = table[rank]
        while cursor[rank] < len(row):
            slot = row[cursor[rank]]
            start, missing = _start(slot, free[rank], done, rank_of, num_stages, transfer)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            end = start + _length(slot, times)
            for key in _finished(slot):
                done[key] = end
                ready.extend(waiting.pop(key, ()))
            spans.append(Span(rank, start, end, slot))
            free[rank], cursor[rank] = end, cursor[rank] + 1
    if any(cursor[rank] < len(row) for rank, row in enumerate(table)):
        raise ValueError(f"the schedule deadlocks: nobody provides {sorted(waiting)[:3]}")
    return spans


def _shared(table: list, times: list[StageTime], rank_of: dict, num_stages: int, transfer: float, *,
            cores: float) -> list[Span]:
    """Ranks at work share the cores evenly; one that waits leaves its share to the others."""
    now, spans = 0.0, []
    done: dict[tuple[str, int, int], float] = {}
    cursor, began = [0] * len(table), [0.0] * len(table)
    left: dict[int, float] = {}
    while True:
        arrivals = []
        for rank, row in enumerate(table):
            if rank in left or cursor[rank] == len(row):
                continue
            start, missing = _start(row[cursor[rank]], now, done, rank_of, num_stages, transfer)
            if missing is None and start <= now * (1 + 1e-9):
                left[rank], began[rank] = _length(row[cursor[rank]], times), now
            elif missing is None:
                arrivals.append(start - now)
        speed = min(1.0, cores / max(1, len(left)))
        if not left and not arrivals:
            break
        step = min([*(work / speed for work in left.values()), *arrivals])
        now += step
        for rank in list(left):
            left[rank] -= step * speed
            if left[rank] <= 1e-9 * now:
                slot = table[rank][cursor[rank]]
                del left[rank]
                done |= dict.fromkeys(_finished(slot), now)
                spans.append(Span(rank, began[rank], now, slot))
                cursor[rank] += 1
    if any(cursor[rank] < len(row) for rank, row in enumerate(table)):
        raise ValueError("the schedule deadlocks")
    return spans


def _start(slot: tuple[Action, ...], free: float, done: dict, rank_of: dict, num_stages: int,
           transfer: float) -> tuple[float, tuple | None]:
    """When the slot can start, or the first result that it still waits for."""
    start = free
    for action in slot:
        for key in _needs(action, num_stages):
            if key not in done:
                return 0.0, key
            delay = transfer if rank_of[key[1]] != rank_of[action.stage] else 0.0
            start = max(start, done[key] + delay)
    return start, None


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


def _length(slot: tuple[Action, ...], times: list[StageTime]) -> float:
    if len(slot) == 2:
        backward = next(action for action in slot if action.kind != "F")
        overlapped = times[backward.stage].overlapped
        if overlapped is not None:
            return overlapped
    return sum(_one(action, times[action.stage]) for action in slot)


def _one(action: Action, time: StageTime) -> float:
    return {"F": time.forward, "I": time.backward, "W": time.weight, "B": time.backward + time.weight}[action.kind]


def held(table: list[list[tuple[Action, ...]]], weights: list[float]) -> tuple[list[list[int]], list[float]]:
    """`peak_in_flight` and `peak_held` of a Timeline. They follow from each rank's own order; no clock is needed.

    Up with a forward, down with a full backward or a weight part. Of an overlapped pair the forward comes first.
    """
    counts, peaks = [], []
    for row in table:
        now: dict[int, int] = {}
        most: dict[int, int] = {}
        weight = peak = 0.0
        for slot in row:
            for kind, stage, _ in slot:
                change = _HELD[kind]
                if change:
                    now[stage] = now.get(stage, 0) + change
                    weight += change * weights[stage]
                    if change > 0:
                        most[stage] = max(most.get(stage, 0), now[stage])
                        peak = max(peak, weight)
        counts.append([most[stage] for stage in sorted(most)])
        peaks.append(peak)
    return counts, peaks


_HELD = {"F": 1, "B": -1, "W": -1, "I": 0}
