"""One run on Ray: start or join a cluster, place one actor per rank, watch them, end cleanly, write the summary.

The step loop is inside the actors; this loop asks how they are and acts on `policy.decide`. No tensor passes here.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster import placement
from orchestrator.cluster.policy import Action, Decision, Limits, Phase, RankState, decide
from orchestrator.cluster.session import gpu_name, ray_session
from orchestrator.cluster.worker import THREADS, Worker
from orchestrator.config import ClusterKind, Config, DataKind, to_dict
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, Preempted, SparingError, Transient
from orchestrator.plan.hardware import resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.train import storage
from orchestrator.train.finish import finish_run
from orchestrator.train.metrics import append_event
from orchestrator.train.progress import Progress
from orchestrator.train.run_dir import STATUS, claim_run_dir

POLL_S = 1.0
STATUS_EVERY_S = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ERRORS = {kind.__name__: kind for kind in (BadRequest, NotFit, NotTrustworthy, Preempted, Transient)}


@dataclass
class Ranks:
    """The placed actors in rank order."""

    group: PlacementGroup
    workers: list
    homes: list[dict]
    placed_at: float


def train(config: Config) -> dict:
    """Run to the end and return the summary; a failed run raises the error of the rank to blame."""
    kind = config.cluster.kind
    if kind is ClusterKind.auto:
        kind = ClusterKind.ray if "RAY_ADDRESS" in os.environ else ClusterKind.local
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        stack.enter_context(ray_session(config, kind))
        gpu = _has_gpus(config, progress, here=kind is ClusterKind.local)
        config = replace(config, hardware=resolve_hardware(config.hardware, gpu_name() if gpu else None))
        check_run(config)
        _check_data(config, progress, here=kind is ClusterKind.local)
        request = _checked_request(config, gpu=gpu, simulated=kind is ClusterKind.local)
        claim = stack.enter_context(claim_run_dir(config))
        ranks = f"{request.ranks} rank" + "s" * (request.ranks > 1)
        progress.say(f"run {claim.config.run.dir}: {ranks} on {claim.config.hardware.name}")
        return Controller(claim.config, claim.attempt, request, progress).run()


class Controller:
    """One attempt at a run, from placement to release."""

    def __init__(self, config: Config, attempt: int, request: placement.Request, progress: Progress):
        self.config, self.attempt, self.request, self.progress = config, attempt, request, progress
        self.stop_cause: str | None = None
        self.wrote_status_at = 0.0

    def run(self) -> dict:
        config, result, error, placed_at = self.config, {"status": "failed"}, None, time.time()
        ranks = None
        with self._signals():
            try:
                ranks = place(config, self.request)
                placed_at = ranks.placed_at
                result = self._watch(ranks)
            except SparingError as caught:
                error = caught
            finally:
                if ranks is not None:
                    release(ranks)
        released_at = time.time()
        if error is not None:
            append_event(config.run.dir, "run_failed", cause=str(error), rank=getattr(error, "rank", None),
                         node=getattr(error, "node", None))
        summary = finish_run(config, result, placed_at=placed_at, released_at=released_at, devices=self.request.ranks,
                             attempts=self.attempt)
        if error is not None:
            raise error
        return summary

    def _watch(self, ranks: Ranks) -> dict:
        """Poll until every rank is done or the policy says that the run is lost."""
        config, workers = self.config, ranks.workers
        homes = [(home["node"], home["gpu"]) for home in ranks.homes]
        if not self.request.gpu and len(set(homes)) == 1:
            homes = _simulated(config)
        infos = placement.rank_infos(homes, ranks.homes[0]["address"], ranks.homes[0]["port"])
        limits = Limits(config.cluster.start_timeout_s, config.cluster.step_timeout_s)
        plain = to_dict(config)
        if infos[0].local_world_size != infos[0].world_size and len({home["node"] for home in ranks.homes}) == 1:
            plain["cluster"]["threads_per_rank"] = plain["cluster"]["threads_per_rank"] or _threads(len(workers))
        runs = [worker.run.remote(plain, info, ranks.placed_at, self.attempt)
                for worker, info in zip(workers, infos, strict=True)]
        ended: dict[int, dict] = {}
        statuses: list[dict] = [{} for _ in workers]
        while True:
            self._collect(runs, ended)
            self._ask(workers, ended, statuses)
            states = [_state(rank, ended.get(rank), statuses[rank], infos[rank].node_rank)
                      for rank in range(len(workers))]
            decision = decide(states, limits, time.time())
            self._tell(statuses, infos, ranks.homes)
            if decision.action is Action.finish:
                self._tell(statuses, infos, ranks.homes, force=True)
                return ended[0]["result"]
            if decision.action is Action.fail:
                raise self._failure(decision, ended)

    def _collect(self, runs: list, ended: dict[int, dict]) -> None:
        """Wait a moment for ranks to end; note how they did."""
        pending = [ref for rank, ref in enumerate(runs) if rank not in ended]
        done, _ = ray.wait(pending, num_returns=1, timeout=POLL_S) if pending else ([], [])
        for ref in done:
            rank = runs.index(ref)
            try:
                ended[rank] = ray.get(ref)
            except RayActorError as error:
                ended[rank] = {"dead": True, "error": _why_dead(error), "exit_code": 33, "at": time.time()}
            except RayError as error:
                ended[rank] = {"error": str(error).splitlines()[-1], "exit_code": 1, "at": time.time()}

    def _ask(self, workers: list, ended: dict[int, dict], statuses: list[dict]) -> None:
        asked = {worker.status.remote(): rank for rank, worker in enumerate(workers)
                 if ended.get(rank, {}).get("dead") is None}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=2.0) if asked else ([], [])
        for ref, rank in asked.items():
            statuses[rank] = statuses[rank] | {"answers": ref in answered}
        for ref in answered:
            with contextlib.suppress(RayError, GetTimeoutError):
                statuses[asked[ref]] = ray.get(ref)
        if self.stop_cause is not None:
            for rank, worker in enumerate(workers):
                if rank not in ended:
                    worker.request_stop.remote(self.stop_cause)

    def _tell(self, statuses: list[dict], infos: list, homes: list[dict], *, force: bool = False) -> None:
        """To the screen, and to whoever asks `sparing status`."""
        lead = statuses[0]
        if lead:
            self.progress.show(lead)
        local = storage.local_path(self.config.run.dir) is not None
        if force or time.monotonic() - self.wrote_status_at > (STATUS_EVERY_S if local else 15.0):
            self.wrote_status_at = time.monotonic()
            rows = [{"rank": info.rank, "node_rank": info.node_rank, "host": home["host"], "pid": home["pid"], **status}
                    for info, home, status in zip(infos, homes, statuses, strict=True)]
            with contextlib.suppress(SparingError):
                storage.write_bytes(storage.join(self.config.run.dir, STATUS),
                                    json.dumps({"time": time.time(), "attempt": self.attempt, "ranks": rows}).encode())

    def _failure(self, decision: Decision, ended: dict[int, dict]) -> SparingError:
        record = ended.get(decision.rank, {})
        kind = ERRORS.get(record.get("kind", ""), Transient if decision.exit_code == 33 else SparingError)
        message = decision.cause
        if kind in (SparingError, Transient):
            message = f"rank {decision.rank} on node {decision.node}: {decision.cause}"
            if kind is Transient:
                message += f"; continue with run.dir={self.config.run.dir} resume=auto"
        if record.get("traceback"):
            path = storage.join(self.config.run.dir, "error.txt")
            storage.write_bytes(path, record["traceback"].encode())
            message += f"; the rank's traceback is in {path}"
        error = kind(message)
        error.rank, error.node = decision.rank, decision.node
        return error

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A first SIGTERM or Ctrl-C asks for a checkpoint and a clean end; a second one ends at once."""
        def caught(number, _frame):
            if self.stop_cause is not None:
                raise Transient(f"ended at once by a second {signal.Signals(number).name}; the last checkpoint stands")
            self.stop_cause = signal.Signals(number).name
            self.progress.say(f"{self.stop_cause}: a checkpoint, then the end (again to end at once)")

        before = {number: signal.signal(number, caught) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def place(config: Config, request: placement.Request) -> Ranks:
    """A placement group and one actor per rank, in rank order; `Transient` if the room is not free in time."""
    each = request.ranks_per_bundle
    bundle = {"CPU": each} | ({"GPU": each} if request.gpu else {})
    began, limit = time.time(), config.cluster.start_timeout_s
    group = placement_group([bundle] * request.bundles, strategy="STRICT_SPREAD" if request.spread else "PACK")
    try:
        ray.get(group.ready(), timeout=limit)
        placed_at = time.time()
        workers = [_start(request, PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i // each))
                   for i in range(request.ranks)]
        homes = ray.get([worker.home.remote() for worker in workers], timeout=max(10.0, limit - (placed_at - began)))
    except GetTimeoutError:
        remove_placement_group(group)
        raise Transient(f"cluster.start_timeout_s={limit:g}: {request.ranks} ranks could not be placed in that time; "
                        "the cluster is busy: wait, free its actors, or raise cluster.start_timeout_s") from None
    except RayError as error:
        remove_placement_group(group)
        raise Transient(f"the ranks could not be started: {str(error).splitlines()[-1]}") from None
    order = placement.order_ranks([(home["node"], home["gpu"]) for home in homes])
    return Ranks(group, [workers[i] for i in order], [homes[i] for i in order], placed_at)


def release(ranks: Ranks) -> None:
    for worker in ranks.workers:
        ray.kill(worker)
    remove_placement_group(ranks.group)


def _start(request: placement.Request, strategy: PlacementGroupSchedulingStrategy):
    """One actor; devices are not masked (ray#61073), a lost one is not restarted behind our back."""
    environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1"}
    if not request.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return ray.remote(Worker).options(
        num_cpus=1, num_gpus=1 if request.gpu else 0, max_concurrency=THREADS, max_restarts=0,
        scheduling_strategy=strategy, runtime_env={"env_vars": environment}).remote()


def _has_gpus(config: Config, progress: Progress, *, here: bool) -> bool:
    """Whether ranks take GPUs: where there are any, but for a machine with too few of them, whose ranks take CPUs."""
    there, ranks = int(ray.cluster_resources().get("GPU", 0)), config.layout.pp * config.layout.dp
    if here and 0 < there < ranks:
        progress.say(f"{ranks} ranks and {there} GPU{'s' * (there > 1)}: running on the CPU; a layout of {there} or "
                     "fewer ranks takes the GPU")
        return False
    return there > 0


def _checked_request(config: Config, *, gpu: bool, simulated: bool) -> placement.Request:
    request = placement.request_of(config, gpu=gpu, simulated=simulated)
    alive = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    nodes = [placement.Node(name, resources.get("CPU", 0), resources.get("GPU", 0)) for name, resources in alive]
    missing = placement.what_is_missing(request, nodes)
    if missing:
        raise NotFit(f"layout.pp={config.layout.pp} x layout.dp={config.layout.dp}: no room on the cluster: {missing}; "
                     "add nodes or use a smaller layout")
    return request


def _check_data(config: Config, progress: Progress, *, here: bool) -> None:
    """Find out that the data cannot be used before a device is paid for; on this machine also tokenise it."""
    from orchestrator.train import data, tokens

    if config.data.kind is not DataKind.text:
        return
    if here:
        data.prepare(config.data, model=config.model, seq_len=config.train.seq_len,
                     n_extra=1 + config.model.n_mtp_layers, on_progress=progress.tokenising)
    else:
        tokens.find_files(config.data.path)
        tokens.load_tokenizer(config.data.tokenizer)


def _simulated(config: Config) -> list[tuple[str, int]]:
    nodes, per_node = placement.nodes_of(config)
    return [(f"node-{n:04d}", -1) for n in range(nodes) for _ in range(per_node)]


def _threads(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def _state(rank: int, ended: dict | None, status: dict, node: int) -> RankState:
    if ended is None:
        phase = Phase[status["phase"]] if status.get("phase") in Phase.__members__ else Phase.start
        phase = Phase.step if phase is Phase.done else phase
        return RankState(rank, phase, time.time() - status.get("heartbeat_at", time.time()), str(node),
                         answers=status.get("answers", True))
    if "result" in ended:
        return RankState(rank, Phase.done, node=str(node))
    return RankState(rank, Phase.dead if ended.get("dead") else Phase.failed, node=str(node), cause=ended["error"],
                     at=ended["at"], exit_code=ended["exit_code"], is_consequence=ended.get("is_consequence", False))


def _why_dead(error: RayActorError) -> str:
    """One line of Ray's account of an actor's death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "killed" in line.lower() or "died" in line.lower()]
    return f"its process died ({(telling or lines)[-1]})"
