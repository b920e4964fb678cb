"""The router and the balance loss against the report's equations written out token by token."""

import dataclasses

import pytest
import torch

from model.config import ModelConfig, ScoreFunc
from model.moe import GroupedExperts, MoE, Router, permute, unpermute
from model.ops import swiglu
from model.transformer import Transformer, routers

CONFIG = ModelConfig(dim=16, n_routed_experts=8, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2,
                     moe_inter_dim=12, route_scale=2.5, balance_loss_weight=0.01)


def make_router(config: ModelConfig, bias: bool = True) -> Router:
    generator = torch.Generator().manual_seed(3)
    router = Router(config)
    router.gate.weight.data.normal_(generator=generator)
    if config.expert_bias and bias:
        router.expert_bias.uniform_(-0.3, 0.3, generator=generator)
    return router


@pytest.mark.parametrize("score_func", list(ScoreFunc))
@pytest.mark.parametrize("expert_bias", [True, False])
def test_router_follows_the_report_token_by_token(score_func, expert_bias):
    config = dataclasses.replace(CONFIG, score_func=score_func, expert_bias=expert_bias)
    router = make_router(config)
    x = torch.randn(2, 5, config.dim, generator=torch.Generator().manual_seed(1))
    routing, _ = router(x)
    for token, chosen, weights in zip(x.flatten(0, 1), routing.indices, routing.weights, strict=True):
        logits = (router.gate.weight @ token).tolist()
        scores = torch.tensor(logits).sigmoid() if score_func is ScoreFunc.sigmoid else torch.tensor(logits).softmax(0)
        biased = scores + (router.expert_bias if expert_bias else 0)
        best_two = 2 if expert_bias else 1
        group_scores = [sum(sorted(biased[g * 2 : g * 2 + 2].tolist())[-best_two:]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: group_scores[g])[-2:]
        allowed = [e for e in range(8) if e // 2 in kept]
        expected = sorted(allowed, key=lambda e: biased[e].item())[-2:]
        assert set(chosen.tolist()) == set(expected)
        raw = scores[chosen]
        torch.testing.assert_close(weights, raw / raw.sum() * config.route_scale, rtol=1e-5, atol=1e-6)


def test_balance_loss_follows_equations_17_to_20():
    router = make_router(CONFIG)
    x = torch.randn(3, 6, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    _, loss = router(x)
    scores = (x @ router.gate.weight.T).sigmoid()
    expected = 0.0
    for sequence in scores:
        top = sequence.topk(2, dim=-1).indices.flatten().tolist()
        for expert in range(8):
            f = 8 / (2 * 6) * top.count(expert)
            p = (sequence[:, expert] / sequence.sum(-1)).mean()
            expected = expected + f * p
    torch.testing.assert_close(loss, expected)


def test_balance_loss_reaches_the_gate_as_if_it_were_added_to_the_loss():
    x = torch.randn(2, 6, CONFIG.dim, generator=torch.Generator().manual_seed(1))

    def gate_grad(attached: bool) -> torch.Tensor:
        torch.manual_seed(0)
        moe = MoE(CONFIG)
        for parameter in moe.parameters():
            parameter.data.normal_(std=0.3)
        moe.balance_scale = 0.05 if attached else 0.0
        total = moe(x).square().sum()
        if not attached:
            total = total + 0.05 * moe.router(x)[1]
        return torch.autograd.grad(total, moe.router.gate.weight)[0]

    torch.testing.assert_close(gate_grad(True), gate_grad(False))


def test_bias_moves_by_its_speed_against_the_load():
    router = make_router(CONFIG, bias=False)
    router.update_bias(torch.tensor([10, 0, 5, 5, 5, 5, 5, 5]))
    expected = torch.zeros(8)
    expected[0], expected[1] = -CONFIG.bias_update_speed, CONFIG.bias_update_speed
    assert torch.equal(router.expert_bias, expected)


def test_counts_are_taken_in_training_only_and_once_under_recompute():
    config = ModelConfig(vocab_size=32, n_layers=2, n_mtp_layers=1, balance_loss_weight=0.01)
    tokens = torch.randint(0, 32, (2, 18), generator=torch.Generator().manual_seed(0))
    counts, grads = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.05)
        model.eval()(tokens, tokens)
        assert all(router.tokens_per_expert.sum() == 0 for _, router in routers(model))
        model.train().recompute = recompute
        model(tokens, tokens).sum().backward()
        counts.append([router.tokens_per_expert.tolist() for _, router in routers(model)])
        grads.append([parameter.grad for parameter in model.parameters()])
    assert counts[0] == counts[1] and sum(counts[0][0]) == 2 * 16 * config.n_activated_experts
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dim, inner", [(8, 12), (9, 5), (8, 7), (6, 8)])
@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
def test_grouped_experts_equal_a_loop_over_experts(counts, dim, inner):
    generator = torch.Generator().manual_seed(0)
    experts = GroupedExperts(dim, inner, 4)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(sum(counts), dim, generator=generator, requires_grad=True)
    weights = torch.rand(sum(counts), 1, generator=generator, requires_grad=True)
    out = experts(x, torch.tensor(counts), weights)
    parts = [swiglu(rows @ w13.T) @ w2.T for rows, w13, w2 in
             zip(x.split(counts), experts.w13, experts.w2, strict=True)]
    expected = torch.cat(parts) * weights
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    inputs = (x, weights, experts.w13, experts.w2)
    upstream = torch.randn(out.shape, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream),
                            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_unpermute_undoes_permute():
    router = make_router(CONFIG)
    x = torch.randn(2, 5, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    routing, _ = router(x)
    tokens = x.flatten(0, 1)
    (rows, counts, weights), permutation = permute(tokens, routing, 8)
    assert counts.tolist() == torch.bincount(routing.indices.flatten(), minlength=8).tolist()
    owners = torch.repeat_interleave(torch.arange(8), counts)
    assert torch.equal(owners, routing.indices.flatten().sort(stable=True).values)
    summed = unpermute(rows * weights, permutation)
    torch.testing.assert_close(summed, tokens * routing.weights.sum(-1, keepdim=True))
