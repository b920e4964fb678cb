"""The placed actors of a run: taken from Ray once, refilled when one is lost, given back at the end."""

import contextlib
import time
from dataclasses import dataclass, field

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster import placement
from orchestrator.cluster.worker import THREADS, Worker
from orchestrator.config import Config
from orchestrator.errors import Transient


@dataclass
class Ranks:
    """Actors, homes and bundles in rank order; spares are warm actors without a rank, each with its bundle."""

    group: PlacementGroup
    workers: list
    homes: list[dict]
    bundles: list[int]
    placed_at: float
    spares: list[tuple] = field(default_factory=list)
    wanted_spares: int = 0


def place(config: Config, request: placement.Request) -> Ranks:
    """A placement group and one actor per rank, in rank order; `Transient` if the room is not free in time."""
    each, spares = request.ranks_per_bundle, config.cluster.spares
    bundles = [request.bundle(each)] * request.bundles + [request.bundle(1)] * spares
    began, limit = time.time(), config.cluster.start_timeout_s
    group = placement_group(bundles, strategy="STRICT_SPREAD" if request.spread else "PACK")
    try:
        ray.get(group.ready(), timeout=limit)
        placed_at = time.time()
        workers = [_start(request, group, i // each) for i in range(request.ranks)]
        homes = ray.get([worker.home.remote() for worker in workers], timeout=max(10.0, limit - (placed_at - began)))
    except GetTimeoutError:
        remove_placement_group(group)
        free = ray.available_resources()
        have = ", ".join(f"{free.get(name, 0):g} of {number * request.ranks:g} {name}"
                         for name, number in request.bundle(1).items())
        raise Transient(f"cluster.start_timeout_s={limit:g}: {request.ranks} ranks could not be placed in that time; "
                        f"the cluster is busy (free: {have}): wait, free its actors, or raise cluster.start_timeout_s"
                        ) from None
    except RayError as error:
        remove_placement_group(group)
        raise Transient(f"the ranks could not be started: {str(error).splitlines()[-1]}") from None
    order = placement.order_ranks([(f"{home['address']} {home['node']}", home["gpu"]) for home in homes],
                                  config.layout.ep)
    ranks = Ranks(group, [workers[i] for i in order], [homes[i] for i in order], [i // each for i in order], placed_at,
                  wanted_spares=spares)
    for i in range(spares):
        _add_spare(ranks, request, request.bundles + i)
    return ranks


def refill(ranks: Ranks, lost: list[int], request: placement.Request, *, timeout_s: float) -> None:
    """Put a warm spare, else a new actor, into the place of every lost rank; the others stay who they are."""
    for rank in lost:
        free = ranks.bundles[rank]
        if ranks.spares:
            ranks.workers[rank], ranks.bundles[rank] = ranks.spares.pop(0)
        else:
            ranks.workers[rank] = _start(request, ranks.group, free)
            free = None
        if free is not None and len(ranks.spares) < ranks.wanted_spares:
            _add_spare(ranks, request, free)
    try:
        for rank in {0, *lost}:  # rank 0's again, for a port that nobody has used
            ranks.homes[rank] = ray.get(ranks.workers[rank].home.remote(), timeout=timeout_s)
    except (GetTimeoutError, RayError):
        raise Transient(f"cluster.replace_timeout_s={timeout_s:g}: there was no place for lost rank {rank} in that "
                        "time; continue with resume=auto when there is room") from None


def kill(worker) -> None:
    with contextlib.suppress(RayError):
        ray.kill(worker)


def release(ranks: Ranks) -> None:
    for worker in [*ranks.workers, *(spare for spare, _ in ranks.spares)]:
        kill(worker)
    remove_placement_group(ranks.group)


def why_dead(error: RayActorError) -> str:
    """One line of Ray's account of an actor's death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "killed" in line.lower() or "died" in line.lower()]
    line = (telling or lines)[-1].split("Worker exit detail: ")[-1].split(" Some common causes")[0]
    return f"its process died ({line.rstrip('.')})"


def _add_spare(ranks: Ranks, request: placement.Request, bundle: int) -> None:
    spare = _start(request, ranks.group, bundle)
    spare.warm.remote()
    ranks.spares.append((spare, bundle))


def _start(request: placement.Request, group: PlacementGroup, bundle: int):
    """One actor; devices are not masked (ray#61073), a lost one is not restarted behind our back."""
    environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1"}
    if not request.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return ray.remote(Worker).options(
        num_cpus=1, num_gpus=1 if request.gpu else 0, resources=request.custom, max_concurrency=THREADS,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        runtime_env={"env_vars": environment}).remote()
