"""The clock against closed forms (DualPipe README, 1F1B and zero-bubble papers) and against itself."""

import pytest

from orchestrator.config import Schedule
from orchestrator.plan.layout import stages_per_rank
from orchestrator.plan.schedule import Action, actions, dualpipe
from orchestrator.plan.simulate import StageTime, Timeline, simulate
from orchestrator.plan.trace import held_over_time

F, B, W = 1.0, 1.25, 0.75


def run(name: str, pp: int, microbatches: int, time: StageTime | None = None, **options):
    schedule = Schedule[name]
    table = actions(schedule, pp, microbatches)
    stages = pp * stages_per_rank(schedule, 2)
    return simulate(table, [time or StageTime(F, B, W)] * stages, **options)


def most_held(timeline: Timeline, weights: list[float]) -> list[float]:
    return [max(value for _, value in points) for points in held_over_time(timeline, weights)]


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (4, 8), (8, 32), (16, 120)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_stage_a_rank_has_the_textbook_bubble(name, pp, microbatches):
    timeline = run(name, pp, microbatches)
    assert timeline.step_time == pytest.approx((microbatches + pp - 1) * (F + B + W))
    assert timeline.bubble == pytest.approx([(pp - 1) * (F + B + W)] * pp)
    assert most_held(timeline, [1.0] * pp) == [microbatches if name == "gpipe" else min(microbatches, pp - rank)
                                               for rank in range(pp)]


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (4, 8), (8, 16)])
def test_interleaving_divides_the_bubble_by_the_stages_a_rank(pp, microbatches):
    whole = run("1f1b", pp, microbatches)
    halves = run("interleaved_1f1b", pp, microbatches, StageTime(F / 2, B / 2, W / 2))
    assert halves.busy == pytest.approx(whole.busy)
    assert max(halves.bubble) == pytest.approx((pp - 1) * (F + B + W) / 2)


@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 16), (8, 32)])
def test_split_backwards_leave_a_smaller_bubble(pp, microbatches):
    """All ranks' bubbles, with equal parts, in units of F: at most what the papers give, which is below 1F1B's."""
    even = StageTime(1.0, 1.0, 1.0)
    whole = run("1f1b", pp, microbatches, even)
    half = StageTime(0.5, 0.5, 0.5)
    for name in ("interleaved_zero_bubble", "zbv", "dualpipev"):
        timeline = run(name, pp, microbatches, half)
        assert timeline.busy == pytest.approx(whole.busy)
        assert timeline.bubble_fraction < whole.bubble_fraction / 2


@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 16), (8, 32)])
def test_dualpipev_equals_its_readme_where_its_assumptions_hold(pp, microbatches):
    """DualPipe README with PP = 2 * pp stages: bubble (PP/2 - 1)(F&B + B - 3W),
    with an overlapped pair taking F + B."""
    f, b, w = 1.0, 2.0, 1.0
    timeline = run("dualpipev", pp, microbatches, StageTime(f, b - w, w, overlapped=f + b))
    assert max(timeline.bubble) == pytest.approx((pp - 1) * ((f + b) + b - 3 * w))
    assert max(most_held(timeline, [1.0] * 2 * pp)) <= 2 * pp + 1


@pytest.mark.parametrize("rank", range(16))
def test_dualpipes_table_has_the_counts_of_deepseeks_code(rank):
    """PP=16, 120 microbatches: 97 + h overlapped pairs, 23 - h forwards and backwards alone, 15 - h weight parts."""
    row, h = dualpipe(16, 120)[rank], min(rank, 15 - rank)
    middle = int(h == 7)
    alone = [slot[0].kind for slot in row if len(slot) == 1]
    assert sum(len(slot) == 2 for slot in row) == 97 + h - middle
    assert alone.count("F") == 23 - h + middle
    assert alone.count("B") + alone.count("I") == 23 - h + middle
    assert alone.count("W") == alone.count("I") == 15 - h
    done = [(action.kind.replace("I", "B"), action.stage, action.microbatch) for slot in row for action in slot
            if action.kind != "W"]
    stages = {rank, 31 - rank}
    assert sorted(done) == sorted((kind, stage, micro) for kind in "FB" for stage in stages for micro in range(60))


@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 16), (8, 32), (16, 120)])
def test_dualpipe_equals_its_readme_where_its_assumptions_hold(pp, microbatches):
    """Bubble (PP/2 - 1)(F&B + B - 3W) on the rank that idles most, activations PP + 1."""
    f, b, w = 1.0, 2.0, 1.0
    for pair in (f + b, 2.5):
        timeline = simulate(dualpipe(pp, microbatches), [StageTime(f, b - w, w, overlapped=pair)] * 2 * pp, chains=2)
        assert max(timeline.bubble) == pytest.approx((pp / 2 - 1) * (pair + b - 3 * w))
        assert max(most_held(timeline, [1.0] * 2 * pp)) == pp + 1


@pytest.mark.parametrize("pp, microbatches", [(3, 12), (4, 6), (4, 9)])
def test_dualpipe_refuses_what_it_cannot_schedule(pp, microbatches):
    with pytest.raises(ValueError, match="dualpipe wants an even number"):
        dualpipe(pp, microbatches)


def test_transfers_between_ranks_cost_and_inside_a_rank_do_not():
    assert run("1f1b", 4, 8, transfer=0.5).step_time > run("1f1b", 4, 8).step_time
    table = [[(Action("F", 0, 0),), (Action("F", 1, 0),), (Action("B", 1, 0),), (Action("B", 0, 0),)]]
    assert simulate(table, [StageTime(F, B, W)] * 2, transfer=9.0).step_time == 2 * (F + B + W)


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
def test_ranks_that_share_cores_leave_none_idle_and_end_no_sooner_than_on_their_own(name):
    """One core does all work in turn; as many cores as ranks are ranks of their own; the step lies between for two."""
    own, work = run(name, 4, 8), sum(run(name, 4, 8).busy)
    assert run(name, 4, 8, cores=1).step_time == pytest.approx(work)
    assert run(name, 4, 8, cores=4).spans == own.spans
    two = run(name, 4, 8, cores=2, transfer=1e-6)
    assert max(own.step_time, work / 2) < two.step_time < min(2 * own.step_time, work)
    assert len(two.spans) == len(own.spans)


def test_a_slow_stage_sets_the_pace_and_weights_count_its_memory():
    schedule = Schedule["1f1b"]
    times = [StageTime(F, B, W)] * 3 + [StageTime(2 * F, 2 * B, 2 * W)]
    timeline = simulate(actions(schedule, 4, 64), times)
    assert timeline.busy[3] == pytest.approx(64 * 2 * (F + B + W))
    assert timeline.step_time == pytest.approx(timeline.busy[3] + 3 * (F + B + W))
    assert most_held(timeline, [3.0, 1.0, 1.0, 1.0]) == [12.0, 3.0, 2.0, 1.0]


def test_a_table_that_can_never_end_is_refused():
    with pytest.raises(ValueError, match="the schedule deadlocks: nobody provides"):
        simulate([[(Action("B", 0, 0),), (Action("F", 0, 0),)]], [StageTime(F, B, W)])


@pytest.mark.parametrize("schedule", list(Schedule), ids=lambda schedule: schedule.name)
def test_no_rank_does_two_things_at_once_and_nothing_runs_before_what_it_needs(schedule):
    pp, stages = 4, 4 * stages_per_rank(schedule, 2)
    timeline = simulate(actions(schedule, pp, 16), [StageTime(F, B, W)] * stages, transfer=0.1)
    ends, starts = {}, {}
    for rank in range(pp):
        row = sorted((span for span in timeline.spans if span.rank == rank), key=lambda span: span.start)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(row, row[1:], strict=False))
    for span in timeline.spans:
        for kind, stage, micro in span.actions:
            starts[kind, stage, micro], ends[kind, stage, micro] = span.start, span.end
    for (kind, stage, micro), start in starts.items():
        if kind == "F" and stage:
            assert start >= ends["F", stage - 1, micro] - 1e-9
        if kind in "BI" and stage + 1 < stages:
            after = ends.get(("B", stage + 1, micro), ends.get(("I", stage + 1, micro)))
            assert start >= after - 1e-9
