"""Silent corruption: what several ranks hold alike is compared, and the rank that differs is named.

Parameters, moments and gradients have one owner each (ZeRO), so that nobody can tell a wrong one by its peers. Held
more than once are the router biases (by all data-parallel ranks of a stage), the embedding and its copy on the last
stage (two), and the counters of the progress (all). They are compared before every copy to memory and every
checkpoint, so that neither is ever made of a state that has drifted.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.errors import Drifted, PeerLost
from orchestrator.parallel.mesh import Mesh
from orchestrator.parallel.pipeline import Pipeline
from orchestrator.parallel.shard import EMBEDDING
from orchestrator.train.state import biases

COUNTERS = ("step", "samples", "tokens", "optimizer_steps")
WHAT = ("router biases", "embedding", "counters")


def check_replicas(mesh: Mesh, pipeline: Pipeline, progress) -> None:
    """All ranks call it at the same step: `Drifted` on the ranks that differ from most, `PeerLost` on the others."""
    if mesh.world is None:
        return
    state = asdict(progress)
    held = [shard.value for shard in pipeline.shards if shard.name == EMBEDDING]
    if len(held) == 1 and pipeline.embedding_group is None:
        held = []  # the only copy, and large: nobody could tell
    embeddings = {digest([value]) for value in held}
    ours = [digest(bias for _, bias in biases(pipeline)),
            # 0 is none; 2 are this rank's own copies that differ, which is like no digest: those are odd numbers
            embeddings.pop() if len(embeddings) == 1 else len(embeddings),
            digest([], json.dumps([state[name] for name in COUNTERS]))]
    table = torch.zeros(mesh.layout.world_size, len(ours), dtype=torch.int64)
    table[mesh.info.rank] = torch.tensor(ours)
    table = table.to(mesh.device)
    dist.all_reduce(table, group=mesh.world)
    rows, layout = table.tolist(), mesh.layout
    for kind, what in enumerate(WHAT):
        alike = defaultdict(dict)
        for rank, row in enumerate(rows):
            place = layout.coordinate(rank)
            group = (place.pp, place.dp, 0)[kind]
            if row[kind]:
                alike[group][rank] = row[kind]
        for values in alike.values():
            _blame(what, odd_ones(values), progress.step, mesh.info.rank)


def odd_ones(values: dict[int, int]) -> list[int]:
    """The ranks whose value is not that of more than half of them; all of them where no value is."""
    value, number = Counter(values.values()).most_common(1)[0]
    if number == len(values):
        return []
    return [rank for rank, own in values.items() if own != value or 2 * number <= len(values)]


def digest(tensors, text: str = "") -> int:
    """A hash as a positive, odd int64; 0 is that of nothing."""
    state, found = hashlib.sha256(text.encode()), bool(text)
    for tensor in tensors:
        state.update(_bytes(tensor))
        found = True
    return int.from_bytes(state.digest()[:8], "little") >> 1 | 1 if found else 0


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _blame(what: str, odd: list[int], step: int, rank: int) -> None:
    if not odd:
        return
    names = ", ".join(map(str, odd))
    cause = f"the {what} of rank{'s' * (len(odd) > 1)} {names} differ from the peers' at step {step}"
    raise (Drifted if rank in odd else PeerLost)(f"{cause}: silent corruption")
