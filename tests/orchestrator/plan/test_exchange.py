"""The expert all-to-all: which share of a token's copies leaves the domain, by the number of domains it lies on."""

import random
from dataclasses import replace

import pytest

from orchestrator.compose import compose_config
from orchestrator.plan.exchange import dispatch_bytes, domains, reached
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.workload import Workload


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(compose_config(["model=glm_4_5"]).model, catalogue()["h100"], 4096, 640, 1, 640, 8, "1f1b", 1)


@pytest.mark.parametrize("ep, nodes", [(5, 2), (4, 1), (8, 1), (10, 2), (16, 2), (20, 3), (32, 4)])
def test_a_group_lies_on_as_many_nodes_as_hold_it(work, ep, nodes):
    sent, _ = dispatch_bytes(replace(work, ep=ep))
    payload = work.microbatch_tokens * work.model.dim * 4
    assert sent == pytest.approx(payload * reached(work.model, nodes) * (nodes - 1) / nodes)


def test_more_than_a_rack_leaves_it(work):
    racks = replace(work, hardware=catalogue()["gb200"], model=compose_config(["model=deepseek_v3"]).model)
    inside, half = (dispatch_bytes(replace(racks, ep=ep)) for ep in (64, 128))
    assert inside[0] == 0 < half[0]


def test_whole_nodes_have_eight_ranks_each(work):
    """As the V3 report counts them: 64 ranks are 8 nodes of 8, of which a token reaches at most 4."""
    model = compose_config(["model=deepseek_v3"]).model
    sent, up = dispatch_bytes(replace(work, model=model, ep=64))
    nodes, payload = reached(model, 8), 4096 * 7168 * 4
    assert sent == pytest.approx(payload * nodes * 7 / 8) and nodes == pytest.approx(4)
    assert up == pytest.approx(payload * reached(model, 64) * 7 / 8)


@pytest.mark.parametrize("name, places, apart", [
    ("deepseek_v2", 5, 0.03), ("deepseek_v2", 10, 0.05), ("deepseek_v3", 2, 0.01), ("deepseek_v3", 8, 0.02),
    ("deepseek_v3", 16, 0.07), ("deepseek_v3", 64, 0.02), ("mixtral_8x7b", 8, 0.01), ("qwen3_30b_a3b", 4, 0.01)])
def test_places_that_a_token_reaches_are_those_of_random_scores(name, places, apart):
    """Chosen as the models do: groups by the sum of their two best experts (V2: by the best), then the best of all."""
    model, rng = compose_config([f"model={name}"]).model, random.Random(0)
    groups, experts, seen = model.n_expert_groups, range(model.n_routed_experts), []
    each, best = len(experts) // groups, 1 if name == "deepseek_v2" else 2
    for _ in range(3000):
        scores = [rng.random() for _ in experts]
        kept = sorted(range(groups), key=lambda group: -sum(sorted(scores[group * each:(group + 1) * each])[-best:]))
        able = [expert for expert in experts if expert // each in kept[:model.n_limited_groups]]
        chosen = sorted(able, key=lambda expert: -scores[expert])[:model.n_activated_experts]
        seen.append(len({expert * places // len(experts) for expert in chosen}))
    assert reached(model, places) == pytest.approx(sum(seen) / len(seen), rel=apart)


def test_a_group_that_does_not_divide_a_node_lies_across_two_only_where_nodes_are_filled(work):
    assert domains(work, 5) == 2 and domains(replace(work, dp=5), 5) == 1
    rack = replace(work, hardware=catalogue()["gb200"])
    assert domains(replace(rack, dp=256), 64) == 1, "64 of a rack's 72"
    assert domains(replace(rack, dp=576), 64) == 2
