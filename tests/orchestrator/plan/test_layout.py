"""Rank arithmetic, at sizes no test machine has."""

import pytest
import yaml

from model.config import ModelConfig
from model.count import head_flops, layer_flops, mtp_flops
from orchestrator.config import Config, Recompute, Schedule, from_dict
from orchestrator.errors import BadRequest
from orchestrator.plan.layout import Layout, check_run, split_stages, stages_of


def shipped(name: str) -> ModelConfig:
    with open(f"conf/model/{name}.yaml") as file:
        values = yaml.safe_load(file)
    values.pop("defaults")
    return from_dict(ModelConfig, values)


def test_deepseek_v3_on_2048_ranks_holds_every_expert_twice_and_every_coordinate_once():
    layout = Layout(pp=16, dp=128, ep=64)
    assert layout.world_size == 2048 and layout.edp == 2
    coordinates = [layout.coordinate(rank) for rank in range(2048)]
    assert len(set(coordinates)) == 2048
    held = [expert for rank in range(128) for expert in layout.experts_of(rank, 256)]
    assert sorted(held) == sorted([*range(256)] * 2)


def test_expert_parallel_ranks_are_consecutive_so_that_a_node_can_hold_them():
    layout = Layout(pp=2, dp=8, ep=4)
    for rank in range(0, 16, 4):
        group = [layout.coordinate(r) for r in range(rank, rank + 4)]
        assert [c.ep for c in group] == [0, 1, 2, 3] and len({(c.pp, c.edp) for c in group}) == 1


@pytest.mark.parametrize("name, stages", [("deepseek_v3", 16), ("deepseek_v3", 32), ("tiny", 2), ("tiny", 4),
                                          ("qwen3_30b_a3b", 8), ("llama_3_1_8b", 4)])
def test_stages_cover_all_layers_and_no_split_has_a_cheaper_largest_stage(name, stages):
    model = shipped(name)
    split = split_stages(model, stages, 1024)
    assert [layer for part in split for layer in part] == list(range(model.n_layers))
    assert all(len(part) > 0 for part in split)
    costs = [layer_flops(model, layer, 1024) for layer in range(model.n_layers)]
    costs[-1] += head_flops(model) + mtp_flops(model, 1024)
    largest = max(sum(costs[layer] for layer in part) for part in split)
    # A greedy fill proves the optimum: with any smaller limit it needs more stages than there are.
    limit, needed, load = largest * (1 - 1e-9), 1, 0.0
    feasible = all(cost <= limit for cost in costs)
    for cost in costs:
        if load + cost > limit:
            needed, load = needed + 1, 0.0
        load += cost
    assert not feasible or needed > stages


def test_v_schedules_give_rank_0_the_first_and_the_last_stage():
    assert stages_of(0, 4, Schedule.dualpipev) == [0, 7]
    assert stages_of(3, 4, Schedule.zbv) == [3, 4]
    assert stages_of(1, 4, Schedule.interleaved_1f1b, 3) == [1, 5, 9]


def valid() -> Config:
    config = Config(model=shipped("tiny"))
    config.layout.pp, config.layout.dp, config.layout.ep, config.layout.microbatches = 2, 2, 2, 4
    config.hardware.name = "unpriced"
    return config


BAD = [
    ("layout.ep", 3, "must divide layout.dp=2"),
    ("layout.ep_per_node", 3, r"must divide layout.ep=2; use one of \[1, 2\], or 0"),
    ("layout.pp", 5, "more than model.n_layers=4"),
    ("layout.microbatches", 1, "at least the 2 stages"),
    ("train.batch_size", 12, "use 8 or 16"),
    ("train.validate_sequences", 10, "multiple of"),
    ("train.steps", 0, "at least 1"),
    ("train.seq_len", 4096, "model.max_seq_len=1024"),
    ("optim.lr", 0.0, "positive"),
    ("optim.min_lr_ratio", 1.5, "between 0 and 1"),
    ("data.validation_fraction", 1.0, "1 excluded"),
    ("budget.max_usd", 1.0, "needs a price"),
    ("cluster.nodes", 3, "must divide the 4 ranks"),
    ("model.n_activated_experts", 9, "between 1 and n_routed_experts=8"),
    ("model.n_expert_groups", 3, "must divide n_routed_experts=8"),
    ("model.qk_rope_head_dim", 15, "even number"),
    ("layout.recompute", Recompute.full, "split backward"),
]


@pytest.mark.parametrize("per_node, fits", [(0, True), (4, True), (8, True), (16, True), (12, False)])
def test_ranks_of_an_expert_groups_node_are_parts_of_machines_or_whole_ones(per_node, fits):
    """Eight of one NVLink domain are half a machine, one, or two of a GB200's four."""
    config = valid()
    config.model.n_routed_experts = config.layout.dp = config.layout.ep = 48
    config.layout.ep_per_node, config.cluster.ranks_per_node = 8, per_node
    config.train.batch_size = config.train.validate_sequences = 48 * 4
    if fits:
        check_run(config)
    else:
        with pytest.raises(BadRequest, match=r"layout.ep_per_node=8: must divide cluster.ranks_per_node=12.*; use 12"):
            check_run(config)


@pytest.mark.parametrize("key, value, words", BAD)
def test_a_request_that_cannot_be_names_key_value_rule_and_remedy(key, value, words):
    config = valid()
    check_run(config)
    if key == "layout.recompute":
        config.layout.schedule = Schedule.zbv
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=words) as raised:
        check_run(config)
    assert isinstance(raised.value, BadRequest) and raised.value.exit_code == 2
    shown = value.name if isinstance(value, Recompute) else value
    assert f"{key}={shown}" in str(raised.value) and ";" in str(raised.value)
