"""Tokens that go by node make what the local dispatcher makes, outputs and gradients within 1e-6 (sums are taken in
another order), and cross to each node once. Ranks of a node are consecutive ones; where they run does not matter here.
"""

import pytest
import torch
import torch.distributed as dist

from model.moe import LocalDispatcher, Received, Routing
from orchestrator.parallel import exchange
from orchestrator.parallel.dispatch import AllToAllDispatcher
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.node_limited import NodeLimitedDispatcher, copied, pairs_of, summed
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import Layout

EXPERTS, DIM, TOKENS, TOP_K, RANKS = 16, 6, 40, 4, 4
WIDE = 256
TOLERANCE = 1e-6
CPU = torch.device("cpu")


def test_copies_and_sums_are_each_others_gradient():
    wanted = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    wanted[3], wanted[:, 2] = False, False
    pairs = pairs_of(wanted, int(wanted.sum()))
    x, rows = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n), requires_grad=True)
               for n in (12, int(wanted.sum())))
    place, token = wanted.T.nonzero(as_tuple=True)
    assert torch.equal(pairs.place, place) and torch.equal(copied(x, pairs), x[token])
    plain = torch.zeros(12, 7, dtype=torch.float64).index_add(0, token, rows)
    torch.testing.assert_close(summed(rows, pairs), plain)
    assert torch.autograd.gradcheck(lambda x: copied(x, pairs), (x,))
    assert torch.autograd.gradcheck(lambda rows: summed(rows, pairs), (rows,))
    nothing = pairs_of(torch.zeros(3, 5, dtype=torch.bool), 0)
    assert summed(torch.empty(0, 7), nothing).tolist() == [[0.0] * 7] * 3


def routing_of(case: str, rank: int) -> Routing:
    generator = torch.Generator().manual_seed(rank)
    if case == "random":
        indices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    elif case == "one rank gets all":
        indices = torch.arange(TOP_K).repeat(TOKENS, 1)
    else:  # "a node gets none": its ranks hold the upper half of the experts
        indices = torch.stack([torch.randperm(EXPERTS // 2, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return Routing(indices, torch.rand(TOKENS, TOP_K, generator=generator))


def apply_experts(received: Received, first: int, weight: torch.Tensor) -> torch.Tensor:
    owners = torch.repeat_interleave(torch.arange(len(received.counts)), received.counts) + first
    return torch.tanh(received.rows * weight[owners]) * received.weights


def run(info: RankInfo, case: str, num_tokens: int, per_node: int, dtype: torch.dtype) -> dict:
    mesh = connect(Layout(1, RANKS, RANKS, per_node), info, CPU, timeout_s=30)
    share, routing = EXPERTS // RANKS, routing_of(case, info.rank)
    weight = torch.linspace(0.5, 2, EXPERTS * DIM).view(EXPERTS, DIM)
    keep = num_tokens if info.rank else TOKENS
    values = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(100 + info.rank))[:keep]

    def both(dispatcher, first: int) -> tuple:
        mine = Routing(routing.indices[:keep], routing.weights[:keep].clone().requires_grad_())
        tokens, experts = values.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            handle = dispatcher.dispatch(tokens, mine)
            received = dispatcher.receive(handle)
            out = dispatcher.combine(apply_experts(received, first, experts), handle)
        out.float().square().sum().backward()
        grads = [tokens.grad, mine.weights.grad, experts.grad]
        return (handle, received.rows.detach()), received.counts, [out.float(), *grads]

    (handle, rows), counts, ours = both(NodeLimitedDispatcher(mesh.hops, EXPERTS), info.rank * share)
    _, all_counts, theirs = both(LocalDispatcher(EXPERTS), 0)
    (_, copies), *_ = both(AllToAllDispatcher(mesh.ep, EXPERTS), info.rank * share)
    for grad in (ours[3], theirs[3], all_counts):
        dist.all_reduce(grad)
    errors = [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(ours, theirs, strict=True)]
    mine = routing.indices[:keep] // (EXPERTS // RANKS * per_node)
    nodes = sum(len(set(row)) for row in mine.tolist())
    return {"errors": errors, "same_rows": torch.equal(rows, copies),
            "counts": counts.tolist(), "sent": sum(handle.legs[0].rows.sent), "nodes": nodes,
            "expected": all_counts[info.rank * share :][:share].tolist(), "hops": len(handle.legs)}


@pytest.mark.parametrize("case, num_tokens", [("random", TOKENS), ("random", 0), ("one rank gets all", TOKENS),
                                              ("a node gets none", TOKENS)])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_it_equals_the_local_dispatcher_and_a_token_crosses_to_a_node_once(ranks, case, num_tokens, per_node):
    for result in ranks.run(run, case, num_tokens, per_node, torch.float32, world=RANKS):
        assert max(result["errors"]) < TOLERANCE, result
        assert result["counts"] == result["expected"] and result["same_rows"], "in the order of one process"
        assert result["hops"] == (2 if per_node == 2 else 1)
        if per_node < RANKS:
            assert result["sent"] == result["nodes"]


def test_under_autocast_rows_travel_in_its_dtype(ranks):
    for result in ranks.run(run, "random", TOKENS, 2, torch.bfloat16, world=RANKS):
        assert max(result["errors"]) < 0.02, result


def bytes_out(info: RankInfo, per_node: int) -> int:
    """Of rows and their weights, to experts on the other of two nodes."""
    mesh, node, out = connect(Layout(1, RANKS, RANKS, per_node), info, CPU, timeout_s=30), info.rank // 2, 0

    class Counted(exchange.Crossing):
        def __init__(self, rows, arriving, leaving, group, precision):
            nonlocal out
            super().__init__(rows, arriving, leaving, group, precision)
            out += sum(num * rows.shape[-1] * rows.element_size()
                       for rank, num in zip(dist.get_process_group_ranks(group), leaving, strict=True)
                       if rank // 2 != node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "Crossing", Counted)
        dispatcher = NodeLimitedDispatcher(mesh.hops, EXPERTS) if per_node else AllToAllDispatcher(mesh.ep, EXPERTS)
        tokens = torch.randn(TOKENS, WIDE, generator=torch.Generator().manual_seed(info.rank))
        dispatcher.receive(dispatcher.dispatch(tokens, routing_of("random", info.rank)))
    return out


def test_what_leaves_a_node_is_a_token_once_and_its_weights_not_a_copy_for_each_expert(ranks):
    by_node, by_copies = (ranks.run(bytes_out, per_node, world=RANKS) for per_node in (2, 0))
    for rank in range(RANKS):
        away = routing_of("random", rank).indices // (EXPERTS // 2) != rank // 2
        assert by_node[rank] == away.any(1).sum() * (WIDE + TOP_K) * 4
        assert by_copies[rank] == away.sum() * (WIDE + 1) * 4
    assert sum(by_node) < 0.55 * sum(by_copies)
