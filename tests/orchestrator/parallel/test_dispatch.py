"""The all-to-all dispatcher equals the local one: outputs and gradients, with experts and ranks that get nothing."""

import pytest
import torch

from model.moe import LocalDispatcher, Received, Routing
from orchestrator.parallel.dispatch import AllToAllDispatcher
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import Layout

EXPERTS, DIM, TOKENS, TOP_K = 8, 6, 10, 2


def routing_of(case: str, rank: int) -> Routing:
    generator = torch.Generator().manual_seed(rank)
    if case == "random":
        indices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    elif case == "one rank gets all":
        indices = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    else:  # "an expert gets none": everybody avoids expert 5
        indices = torch.tensor([[0, 7], [4, 6]]).repeat(TOKENS // 2, 1)
    return Routing(indices, torch.rand(TOKENS, TOP_K, generator=generator))


def tokens_of(rank: int) -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(100 + rank), requires_grad=True)


def apply_experts(received: Received, first: int, weight: torch.Tensor) -> torch.Tensor:
    owners = torch.repeat_interleave(torch.arange(len(received.counts)), received.counts) + first
    return torch.tanh(received.rows * weight[owners]) * received.weights


def run_dispatch(info: RankInfo, case: str, num_tokens: int) -> dict:
    mesh = connect(Layout(1, info.world_size, info.world_size), info, torch.device("cpu"), timeout_s=30)
    share = EXPERTS // info.world_size
    weight = torch.linspace(0.5, 2, EXPERTS * DIM).view(EXPERTS, DIM).requires_grad_()
    tokens, routing = tokens_of(info.rank), routing_of(case, info.rank)
    keep = num_tokens if info.rank else TOKENS
    tokens = tokens[:keep].detach().requires_grad_()
    routing = Routing(routing.indices[:keep], routing.weights[:keep].requires_grad_())
    dispatcher = AllToAllDispatcher(mesh.ep, EXPERTS)
    handle = dispatcher.dispatch(tokens, routing)
    received = dispatcher.receive(handle)
    out = dispatcher.combine(apply_experts(received, info.rank * share, weight), handle)
    out.square().sum().backward()
    local = LocalDispatcher(EXPERTS)
    mine = tokens.detach().requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    handle = local.dispatch(mine, Routing(routing.indices, weights))
    all_rows = local.receive(handle)
    expected = local.combine(apply_experts(all_rows, 0, weight.detach()), handle)
    expected.square().sum().backward()
    return {"out": torch.equal(out, expected), "tokens": torch.equal(tokens.grad, mine.grad),
            "weights": torch.equal(routing.weights.grad, weights.grad), "counts": received.counts.tolist(),
            "sent": all_rows.counts.tolist()}


@pytest.mark.parametrize("case", ["random", "one rank gets all", "an expert gets none"])
@pytest.mark.parametrize("num_tokens", [TOKENS, 3, 0])
def test_all_to_all_equals_local_bit_for_bit(ranks, case, num_tokens):
    results = ranks.run(run_dispatch, case, num_tokens, world=4)
    assert all(result["out"] and result["tokens"] and result["weights"] for result in results)
    sent = torch.tensor([result["sent"] for result in results]).sum(0)
    assert [count for result in results for count in result["counts"]] == sent.tolist()
