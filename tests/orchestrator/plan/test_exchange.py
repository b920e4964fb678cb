"""The expert all-to-all: which share of a token's copies leaves the domain, by the number of domains it lies on."""

from dataclasses import replace

import pytest

from orchestrator.compose import compose_config
from orchestrator.plan.exchange import dispatch_bytes, nodes_reached
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.workload import Workload


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(compose_config(["model=glm_4_5"]).model, catalogue()["h100"], 4096, 640, 1, 640, 8, "1f1b", 1)


@pytest.mark.parametrize("ep, nodes", [(5, 1), (8, 1), (10, 2), (16, 2), (20, 3), (32, 4)])
def test_a_group_lies_on_as_many_nodes_as_hold_it(work, ep, nodes):
    sent, _ = dispatch_bytes(replace(work, ep=ep))
    payload = work.microbatch_tokens * work.model.dim * 4
    assert sent == pytest.approx(payload * nodes_reached(work.model, nodes) * (nodes - 1) / nodes)


def test_more_than_a_rack_leaves_it(work):
    racks = replace(work, hardware=catalogue()["gb200"], model=compose_config(["model=deepseek_v3"]).model)
    inside, half = (dispatch_bytes(replace(racks, ep=ep)) for ep in (64, 128))
    assert inside[0] == 0 < half[0]


def test_whole_nodes_have_eight_ranks_each(work):
    """As the V3 report counts them: 64 ranks are 8 nodes of 8, of which a token reaches at most 4."""
    model = compose_config(["model=deepseek_v3"]).model
    sent, up = dispatch_bytes(replace(work, model=model, ep=64))
    reached = nodes_reached(model, 8)
    draws = model.n_activated_experts / reached
    payload = 4096 * 7168 * 4
    assert sent == pytest.approx(payload * reached * 7 / 8) and reached < 4.001
    assert up == pytest.approx(payload * reached * 8 * (1 - (7 / 8) ** draws) * 7 / 8)
