"""What a rank holds while a simulated step runs: activations over time, from the clock's own spans."""

from orchestrator.plan.simulate import Timeline


def held_over_time(timeline: Timeline, weights: list[float]) -> list[list[tuple[float, float]]]:
    """Per rank, (time, activation held from then on), from 0 to the end of the step.

    weights: activation of one microbatch per stage, any unit. Held from the start of a forward until its full backward
    or weight part has ended.
    """
    changes: list[list[tuple[float, int, float]]] = [[] for _ in timeline.busy]
    for span in timeline.spans:
        for kind, stage, _ in span.actions:
            if kind == "F":
                changes[span.rank].append((span.start, 1, weights[stage]))
            elif kind in "BW":
                changes[span.rank].append((span.end, 0, -weights[stage]))
    found = []
    for rank in changes:
        now, points = 0.0, [(0.0, 0.0)]
        for time, _, change in sorted(rank):
            now += change
            if time == points[-1][0]:
                points[-1] = (time, now)
            else:
                points.append((time, now))
        found.append([*points, (timeline.step_time, now)])
    return found
