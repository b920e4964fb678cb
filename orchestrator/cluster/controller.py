"""One run on Ray: start or join a cluster, place one actor per rank, watch them, replace what is lost, end cleanly.

The step loop is inside the actors; this loop asks how they are and acts on `policy.decide`. No tensor passes here.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import ray
from ray.exceptions import RayActorError, RayError

from orchestrator.cluster import placement
from orchestrator.cluster.group import FINAL, Group, cause_of, fault_of, silent_s, state_of
from orchestrator.cluster.policy import NO_PROGRESS, Action, Decision, Fault, Limits, decide, respond
from orchestrator.cluster.ranks import Ranks, kill, place, refill, release, why_dead
from orchestrator.cluster.session import gpu_name, ray_session
from orchestrator.config import ClusterKind, Config, DataKind, to_dict
from orchestrator.errors import NoProgress, NotFit, SparingError, Transient
from orchestrator.plan.hardware import resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.train import storage
from orchestrator.train.control import Recovery
from orchestrator.train.finish import finish_run
from orchestrator.train.metrics import append_event
from orchestrator.train.progress import Progress
from orchestrator.train.run_dir import STATUS, claim_run_dir

POLL_S = 0.25
ANSWER_S = 1.5
"""A rank that has not said how it is for this long does not answer."""
DRAIN_S = 10.0
"""After a fault, how long the other ranks may take to notice their lost connections."""
STATUS_EVERY_S = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ERRORS = FINAL | {"Transient": Transient}


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
        self.said_stop = False
        self.events: list[dict] = []
        self.wrote_status_at = 0.0

    def run(self) -> dict:
        config, result, error, placed_at = self.config, {"status": "failed"}, None, time.time()
        ranks = None
        with self._signals():
            try:
                ranks = place(config, self.request)
                placed_at = ranks.placed_at
                result = self._survive(ranks)
            except SparingError as caught:
                error = caught
            finally:
                if ranks is not None:
                    release(ranks)
        released_at = time.time()
        if error is not None:
            for event in self.events:
                append_event(config.run.dir, **event)
            append_event(config.run.dir, "run_failed", cause=str(error), rank=getattr(error, "rank", None),
                         node=getattr(error, "node", None))
        summary = finish_run(config, result, placed_at=placed_at, released_at=released_at, devices=self.request.ranks,
                             attempts=self.attempt)
        if error is not None:
            raise error
        return summary

    def _survive(self, ranks: Ranks) -> dict:
        """The ranks' result; a lost rank is replaced as long as the policy sees sense in it."""
        faults: list[Fault] = []
        recovery: Recovery | None = None
        while True:
            group = self._form(ranks, recovery)
            decision = self._watch(ranks, group)
            if decision.action is Action.finish:
                return group.ended[0]["result"]
            fault, found_at = fault_of(decision, group), time.time()
            faults.append(fault)
            response = respond(faults)
            if response.action is Action.fail or self.stop_cause is not None:
                raise self._failure(replace(response, exit_code=response.exit_code or fault.exit_code), group.ended)
            self.progress.say(f"rank {fault.rank} on node {fault.node}: {fault.cause}; replacing it")
            self._keep_stacks(ranks, group, len(faults))
            lost = self._drain(ranks, group, fault.rank)
            self.events = [{"kind": "rank_replaced", "time": time.time(), "rank": rank, "step": fault.step,
                            "node": group.infos[rank].node_rank, "cause": fault.cause if rank == fault.rank
                            else cause_of(group.ended.get(rank)), "found_at": found_at,
                            "silent_s": silent_s(rank, group, found_at)} for rank in lost]
            refill(ranks, lost, self.request, timeout_s=self.config.cluster.replace_timeout_s)
            lead = max(group.statuses, key=lambda status: status.get("claim", 0))
            first_claim = recovery.first_claim if recovery and recovery.first_claim else lead.get("claim", 0)
            peak = lead.get("peak_flops_per_s") or (recovery.peak_flops_per_s if recovery else None)
            recovery = Recovery(len(faults), found_at, self.events, peak, first_claim)

    def _form(self, ranks: Ranks, recovery: Recovery | None) -> Group:
        config = self.config
        homes = [(home["node"], home["gpu"]) for home in ranks.homes]
        if not self.request.gpu and len(set(homes)) == 1:
            homes = placement.simulated_homes(config)
        infos = placement.rank_infos(homes, ranks.homes[0]["address"], ranks.homes[0]["port"])
        plain = to_dict(config)
        if infos[0].local_world_size != infos[0].world_size and len({home["node"] for home in ranks.homes}) == 1:
            share = max(1, (os.cpu_count() or 1) // len(infos))
            plain["cluster"]["threads_per_rank"] = plain["cluster"]["threads_per_rank"] or share
        runs = [worker.run.remote(plain, info, ranks.placed_at, self.attempt, recovery)
                for worker, info in zip(ranks.workers, infos, strict=True)]
        return Group(runs, infos, {}, [{} for _ in runs], {}, time.time())

    def _watch(self, ranks: Ranks, group: Group) -> Decision:
        """Poll until every rank is done or one of them is to blame for the end."""
        cluster = self.config.cluster
        limits = Limits(cluster.start_timeout_s, cluster.step_timeout_s, cluster.save_timeout_s)
        while True:
            self._collect(group)
            self._ask(ranks.workers, group)
            now = time.time()
            decision = decide([state_of(rank, group, now) for rank in range(len(group.runs))], limits, now)
            self._say_stop()
            self._tell(group.statuses, group.infos, ranks.homes, force=decision.action is not Action.wait)
            if decision.action is not Action.wait:
                return decision

    def _collect(self, group: Group, timeout_s: float = POLL_S) -> None:
        """Wait a moment for ranks to end; note how they did."""
        pending = [ref for rank, ref in enumerate(group.runs) if rank not in group.ended]
        done, _ = ray.wait(pending, num_returns=1, timeout=timeout_s) if pending else ([], [])
        for ref in done:
            rank = group.runs.index(ref)
            try:
                group.ended[rank] = ray.get(ref)
            except RayActorError as error:
                group.ended[rank] = {"dead": True, "error": why_dead(error), "exit_code": 33, "at": time.time()}
            except RayError as error:
                group.ended[rank] = {"error": str(error).splitlines()[-1], "exit_code": 1, "at": time.time()}

    def _ask(self, workers: list, group: Group) -> None:
        """One question a rank is under way at any time; nobody waits for a rank that does not answer."""
        now, waiting = time.monotonic(), {rank for rank, _ in group.asked.values()}
        for rank, worker in enumerate(workers):
            if rank not in waiting and not group.ended.get(rank, {}).get("dead"):
                group.asked[worker.status.remote()] = (rank, now)
        refs = list(group.asked)
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0.1) if refs else ([], [])
        for ref in answered:
            rank, _ = group.asked.pop(ref)
            with contextlib.suppress(RayError):
                group.statuses[rank] = ray.get(ref) | {"answers": True}
        for rank, since in group.asked.values():
            group.statuses[rank] = group.statuses[rank] | {"answers": time.monotonic() - since < ANSWER_S}
        if self.stop_cause is not None:
            for rank, worker in enumerate(workers):
                if rank not in group.ended:
                    worker.request_stop.remote(self.stop_cause)

    def _drain(self, ranks: Ranks, group: Group, culprit: int) -> list[int]:
        """End the lost rank for good and let the others come back from their broken group; the ranks to replace."""
        lost = {culprit} | {rank for rank, record in group.ended.items() if record.get("dead")}
        for rank in lost:
            kill(ranks.workers[rank])
        deadline = time.monotonic() + DRAIN_S
        while len(group.ended.keys() | lost) < len(group.runs) and time.monotonic() < deadline:
            self._collect(group)
        lost |= {rank for rank in range(len(group.runs)) if rank not in group.ended}
        for rank in lost:
            kill(ranks.workers[rank])
        return sorted(lost)

    def _keep_stacks(self, ranks: Ranks, group: Group, number: int) -> None:
        """After a hang: what every rank that answers was doing, into the run directory."""
        if any(record.get("dead") or "error" in record for record in group.ended.values()):
            return
        refs = [worker.stacks.remote() for worker in ranks.workers]
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=2.0)
        texts = []
        for rank, ref in enumerate(refs):
            text = "does not answer"
            if ref in answered:
                with contextlib.suppress(RayError):
                    text = ray.get(ref)
            texts.append(f"rank {rank}\n{text}\n")
        with contextlib.suppress(SparingError):
            storage.write_bytes(storage.join(self.config.run.dir, f"stacks-{number}.txt"), "\n".join(texts).encode())

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

    def _say_stop(self) -> None:
        if self.stop_cause is not None and not self.said_stop:
            self.said_stop = True
            self.progress.say(f"{self.stop_cause}: a checkpoint, then the end (again to end at once)")

    def _failure(self, decision: Decision, ended: dict[int, dict]) -> SparingError:
        record = ended.get(decision.rank, {})
        kind = ERRORS.get(record.get("kind", ""), {33: Transient, NO_PROGRESS: NoProgress}.get(
            decision.exit_code, SparingError))
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
            self.stop_cause = signal.Signals(number).name  # no print: the signal may have come in the middle of one

        before = {number: signal.signal(number, caught) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _has_gpus(config: Config, progress: Progress, *, here: bool) -> bool:
    """Whether ranks take GPUs: where there are any, but for a machine with too few of them, whose ranks take CPUs."""
    there, ranks = int(ray.cluster_resources().get("GPU", 0)), config.layout.pp * config.layout.dp
    if here and 0 < there < ranks:
        progress.say(f"{ranks} ranks and {there} GPU{'s' * (there > 1)}: running on the CPU; a layout of {there} or "
                     "fewer ranks takes the GPU")
        return False
    return there > 0


def _checked_request(config: Config, *, gpu: bool, simulated: bool) -> placement.Request:
    """What to ask of Ray; `NotFit`, with what is missing, where the nodes that joined in time can never give it."""
    deadline = time.monotonic() + config.cluster.join_timeout_s
    while True:
        nodes = [placement.Node(node["NodeManagerAddress"], node["Resources"].get("CPU", 0),
                                node["Resources"].get("GPU", 0), node["Resources"]) for node in ray.nodes()
                 if node["Alive"]]
        request = placement.request_for(config, nodes, gpu=gpu, simulated=simulated)
        missing = placement.what_is_missing(request, nodes)
        if missing is None:
            return request
        if time.monotonic() > deadline:
            raise NotFit(f"layout.pp={config.layout.pp} x layout.dp={config.layout.dp}: no room on the cluster: "
                         f"{missing}; add nodes or use a smaller layout")
        time.sleep(1.0)


def _check_data(config: Config, progress: Progress, *, here: bool) -> None:
    """Find out that the data cannot be used before a device is paid for; on this machine also tokenise it."""
    from orchestrator.train import data, tokenizer, tokens

    if config.data.kind is not DataKind.text:
        return
    if here:
        data.prepare(config.data, model=config.model, seq_len=config.train.seq_len,
                     n_extra=1 + config.model.n_mtp_layers, on_progress=progress.tokenising)
    else:
        tokens.find_files(config.data.path)
        tokenizer.load_tokenizer(config.data.tokenizer)
