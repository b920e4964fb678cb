"""The action table: complete, in order, and bounded as the schedules' papers say."""

import pytest

from orchestrator.config import Schedule
from orchestrator.plan.layout import stages_of, stages_per_rank
from orchestrator.plan.schedule import actions


def flat(row):
    for slot in row:
        yield from slot


@pytest.mark.parametrize("schedule", list(Schedule), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 8), (8, 32)])
def test_every_stage_runs_every_microbatch_forward_and_back_once(schedule, pp, microbatches):
    table = actions(schedule, pp, microbatches)
    for rank, row in enumerate(table):
        expected = {(stage, micro) for stage in stages_of(rank, pp, schedule) for micro in range(microbatches)}
        done = {kind: [] for kind in "FBIW"}
        for action in flat(row):
            done[action.kind].append((action.stage, action.microbatch))
        assert sorted(done["F"]) == sorted(expected)
        assert sorted(done["B"] + done["I"]) == sorted(expected)
        assert sorted(done["I"]) == sorted(done["W"])


@pytest.mark.parametrize("pp, microbatches", [(4, 8), (8, 32)])
def test_1f1b_holds_at_most_pp_microbatches_and_gpipe_all(pp, microbatches):
    def most_in_flight(schedule):
        held = most = 0
        for action in flat(actions(Schedule[schedule], pp, microbatches)[0]):
            held += 1 if action.kind == "F" else -1
            most = max(most, held)
        return most

    assert most_in_flight("1f1b") == pp and most_in_flight("gpipe") == microbatches


def test_only_v_and_looped_schedules_have_several_stages_a_rank():
    assert {s.name: stages_per_rank(s, 3) for s in Schedule} == {
        "gpipe": 1, "1f1b": 1, "interleaved_1f1b": 3, "interleaved_zero_bubble": 3, "zbv": 2, "dualpipev": 2}
