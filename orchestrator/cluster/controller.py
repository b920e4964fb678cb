"""One run: place its ranks, watch them, replace or resize when some are lost, end cleanly. A small state machine.

States are `policy.State`; what to do is decided by `policy`, done by `Ranks`, and every decision is an event. The step
loop is inside the actors; no tensor passes here, and nothing here knows Ray but `train`.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from orchestrator.choices import ClusterKind
from orchestrator.cluster import placement
from orchestrator.cluster.group import FINAL, Group, cause_of, fault_of, silent_s, state_of
from orchestrator.cluster.policy import (
    NEXT,
    NO_PROGRESS,
    Action,
    Decision,
    Fault,
    Limits,
    Phase,
    State,
    decide,
    reshape,
    respond,
)
from orchestrator.config import Config
from orchestrator.errors import BadRequest, NoProgress, SparingError, Transient, words
from orchestrator.plan.hardware import resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.train import storage
from orchestrator.train.control import Recovery, steady
from orchestrator.train.finish import finish_run
from orchestrator.train.lineage import look_back
from orchestrator.train.memory import check_state
from orchestrator.train.metrics import append_event
from orchestrator.train.progress import Progress
from orchestrator.train.run_dir import STATUS, claim_run_dir, named

STATUS_EVERY_S, REMOTE_STATUS_EVERY_S = 2.0, 15.0
STALL_S = 10.0
"""What must be written into the run directory is waited for this long: far less than a rank's lease."""


def train(config: Config) -> dict:
    """Run to the end and return the summary; a failed run raises the error of the rank to blame."""
    from orchestrator.cluster.keeper import keep
    from orchestrator.cluster.preflight import check_data, checked_request, has_gpus
    from orchestrator.cluster.session import early_end, gpu_name, ray_session, stop_signals

    kind = config.cluster.kind
    if kind is ClusterKind.auto:
        kind = ClusterKind.ray if "RAY_ADDRESS" in os.environ else ClusterKind.local
    here = kind is ClusterKind.local
    with early_end(), contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        if summary := look_back(config, progress, here=here):
            return summary
        stack.enter_context(ray_session(config, kind))
        gpu = has_gpus(config, progress, here=here)
        config = replace(config, hardware=resolve_hardware(config.hardware, gpu_name() if gpu else None))
        check_run(config)
        check_state(config, on_gpus=gpu, here=here)
        check_data(config, progress, here=here)
        attempt = partial(run_attempt, checked_request(config, gpu=gpu, simulated=here))
        cause = stop_signals()
        if here:
            return attempt(config, progress=progress, notice=cause)
        return keep(attempt, named(config), progress, notice=cause)


def run_attempt(request: placement.Request, config: Config, *, progress: Progress,
                notice: Callable[[], str | None] = lambda: None) -> dict:
    """Claim the run directory, place the ranks and control them to the end. `notice()`: see `Controller`."""
    from orchestrator.cluster.ranks import place

    with claim_run_dir(config) as claim:
        ranks = f"{request.ranks} rank" + "s" * (request.ranks > 1)
        progress.say(f"run {claim.config.run.dir}: {ranks} on {claim.config.hardware.name}")
        controller = Controller(claim.config, claim.attempt, progress, notice=notice)
        return controller.run(lambda: place(claim.config, request))


class Controller:
    """One attempt at a run, from placement to release."""

    def __init__(self, config: Config, attempt: int, progress: Progress, *, clock: Callable[[], float] = steady,
                 notice: Callable[[], str | None] = lambda: None):
        """notice: gives a reason why the run should stop with a checkpoint, once there is one."""
        self.config, self.attempt, self.progress, self.clock, self.notice = config, attempt, progress, clock, notice
        self.layouts = placement.layouts(config)
        self.layout = config.layout
        self.state = State.placing
        self.stop_cause: str | None = None
        """Why the run is to end with a checkpoint."""
        self.regroup_cause: str | None = None
        """Why the ranks are to stop with a checkpoint and be formed anew."""
        self.held: list[tuple[float, int, int]] = [(0.0, self._size, config.cluster.spares)]
        """From when on how many devices were held, with a rank and without."""
        self.said: str | None = None
        self.events: list[dict] = []
        """Decisions that no rank has logged yet."""
        self.wrote_status_at = 0.0
        self.writing: threading.Thread | None = None

    def run(self, place) -> dict:
        """`place()` gives the actors. The summary; a failed run raises."""
        config, result, error, placed_at = self.config, {"status": "failed"}, None, steady()
        ranks = None
        try:
            ranks = place()
            placed_at = ranks.placed_at
            result = self._live(ranks)
        except Exception as caught:  # Ray's or a mistake of ours too: what was held is charged all the same
            error = caught
        finally:
            self._enter(State.ended)
            if ranks is not None:
                ranks.release()
        released_at = steady()
        if ranks is None:  # nothing was held, nothing is charged
            placed_at = released_at
        sum_up = partial(finish_run, config, result, placed_at=placed_at, released_at=released_at, devices=self._size,
                         attempts=self.attempt, spares=self.held[-1][2])
        if error is None:
            return sum_up()
        try:
            for event in self.events:
                append_event(config.run.dir, **event)
            sum_up(refused=isinstance(error, BadRequest),
                   failure={"cause": words(error), **{key: getattr(error, key, None) for key in ("rank", "node")}})
        except SparingError as caught:
            self.progress.say(f"the summary of the failed run was not written: {caught}")
        raise error

    def _live(self, ranks) -> dict:
        """The ranks' result; they are formed anew after every fault as long as the policy sees sense in it."""
        faults: list[Fault] = []
        recovery: Recovery | None = None
        while True:
            self._enter(State.forming)
            group = ranks.form(self._present_config(), self.attempt, recovery)
            decision = self._watch(ranks, group)
            found_at = self.clock()
            if decision.action is Action.finish:
                result = group.ended[0]["result"]
                if self.regroup_cause is None or self.stop_cause is not None or result["status"] != "preempted":
                    return result
                decision, lost = Decision(Action.resize, self.regroup_cause), ranks.leaving_ranks
            else:
                faults.append(fault_of(decision, group))
                decision, lost = self._answer(ranks, group, faults)
            decision = self._refill(ranks, group, decision, lost)
            self._note(decision, group, lost, found_at)
            recovery = self._recovery(group, recovery, decision, found_at)

    def _watch(self, ranks, group: Group) -> Decision:
        """Poll until every rank is done or one of them is to blame for the end."""
        cluster = self.config.cluster
        limits = Limits(cluster.start_timeout_s, cluster.step_timeout_s, cluster.save_timeout_s)
        while True:
            ranks.poll(group, self.stop_cause or self.regroup_cause)
            self.stop_cause = self.stop_cause or self.notice()
            now = self.clock()
            states = [state_of(rank, group, now) for rank in range(len(group.infos))]
            if self.state is State.forming and all(state.phase is not Phase.start for state in states):
                self._enter(State.training)
            decision = decide(states, limits, now)
            is_over = decision.action is not Action.wait
            if is_over:
                ranks.hear(group)
            self._forget_logged(group)
            self._tell(group, ranks.homes, force=is_over)
            if is_over:
                return decision
            if self.state is State.training:
                self._look_around(ranks)

    def _forget_logged(self, group: Group) -> None:
        """Events of the recovery before, once rank 0 has logged them, which it does before its first step."""
        status = group.statuses[0]
        if status.get("generation") == group.generation and status.get("phase") in ("step", "validate", "save", "done"):
            self.events = []

    def _look_around(self, ranks) -> None:
        """Whether the ranks should stop: their nodes are about to go, or there is room for more of them."""
        elastic = len(self.layouts) > 1
        if ranks.ground_leaves:
            self.stop_cause = self.stop_cause or "the node of the controller or of Ray's head is being drained"
        elif leaving := ranks.leaving_ranks:
            names = ", ".join(dict.fromkeys(ranks.homes[rank]["host"] for rank in leaving))
            cause = f"node {names} is being drained"
            if elastic:
                self.regroup_cause = self.regroup_cause or cause
            else:
                self.stop_cause = self.stop_cause or cause
        elif elastic and max((size for size in self.layouts if size <= ranks.there), default=0) > self._size:
            self.regroup_cause = self.regroup_cause or f"there is room for {ranks.there} ranks"
        cause = self.stop_cause or self.regroup_cause
        if cause is not None and cause != self.said:
            self.said = cause
            self.progress.say(f"{cause}: a checkpoint, then " + (
                "the end (again to end at once)" if self.stop_cause else "on with other ranks"))

    def _answer(self, ranks, group: Group, faults: list[Fault]) -> tuple[Decision, list[int]]:
        """After a fault: what to do, and which ranks are lost. Raises where the run is to end."""
        fault, decision = faults[-1], respond(faults)
        if decision.action is Action.stop or self.stop_cause is not None:
            raise self._failure(replace(decision, exit_code=decision.exit_code or fault.exit_code), group.ended)
        self.progress.say(f"rank {fault.rank} on node {fault.node}: {fault.cause}; " + (
            "replacing it" if decision.is_lost else "connecting again"))
        self._enter(State.draining)
        if fault.rank not in group.ended:  # a hang
            self._keep_stacks(ranks.stacks(group), len(faults))
        lost = ranks.drain(group, {fault.rank} if decision.is_lost else set())
        return (replace(decision, action=Action.replace) if lost else decision), lost

    def _refill(self, ranks, group: Group, decision: Decision, lost: list[int]) -> Decision:
        """Find places for the lost ranks, or a layout that does without."""
        self._enter(State.refilling)
        size, timeout_s = self._size, self.config.cluster.replace_timeout_s
        wanted = ranks.there if decision.action is Action.resize else size
        waiting = f"a place for rank {', '.join(map(str, lost))} ({decision.cause}), {timeout_s:g} s at most"
        self.wrote_status_at = 0.0
        ranks.refill(lost, wanted=wanted, timeout_s=timeout_s, patient=len(self.layouts) == 1,
                     on_wait=partial(self._tell, group, ranks.homes, waiting=waiting))
        self.wrote_status_at = 0.0  # whoever asks hears at once that it is over
        decision, size = reshape(decision, size=size, there=ranks.there, sizes=list(self.layouts))
        if decision.action is Action.stop:
            waited = f"{decision.cause} (cluster.replace_timeout_s={timeout_s:g})"
            raise self._failure(replace(decision, cause=waited), {})
        spares = max(0, ranks.held - size)
        if (size, spares) != self.held[-1][1:]:
            self.held = [*self.held, (self.clock(), size, spares)]
        if size != self._size:
            self.progress.say(f"going on with {size} of {max(self.layouts)} ranks")
        self.layout, self.regroup_cause = self.layouts[size], None
        ranks.arrange(size)
        return decision

    def _note(self, decision: Decision, group: Group, lost: list[int], found_at: float) -> None:
        """The decision as events, for rank 0 of the next group to log."""
        step = max((status.get("step", 0) for status in group.statuses), default=0)
        told = {"time": self.clock(), "step": step, "found_at": found_at}
        self.events = [{"kind": "decision", **told, "action": decision.action.name, "cause": decision.cause,
                        "rank": decision.rank, "node": decision.node, "ranks": self._size, "lost": lost}]
        self.events += [
            {"kind": "rank_replaced" if decision.action is Action.replace else "rank_lost", **told, "rank": rank,
             "node": group.infos[rank].node_rank, "silent_s": silent_s(rank, group, found_at),
             "cause": decision.cause if rank == decision.rank or "result" in group.ended.get(rank, {})
             else cause_of(group.ended.get(rank))} for rank in lost]

    def _recovery(self, group: Group, before: Recovery | None, decision: Decision, found_at: float) -> Recovery:
        lead = max(group.statuses, key=lambda status: status.get("claim", 0))
        return Recovery(
            generation=group.generation + 1, fault_at=found_at, events=self.events,
            peak_flops_per_s=lead.get("peak_flops_per_s") or (before.peak_flops_per_s if before else None),
            first_claim=before.first_claim if before and before.first_claim else lead.get("claim", 0),
            decision={"action": decision.action.name, "cause": decision.cause, "rank": decision.rank,
                      "node": decision.node}, held=self.held)

    def _present_config(self) -> Config:
        """The run's, with the layout that it has now; a smaller one is on whatever nodes are left."""
        if self.layout == self.config.layout:
            return self.config
        return replace(self.config, layout=self.layout, cluster=replace(self.config.cluster, nodes=0, ranks_per_node=0))

    @property
    def _size(self) -> int:
        return self.layout.world_size

    def _enter(self, state: State) -> None:
        assert state is self.state or state in NEXT[self.state], (self.state, state)
        self.state = state

    def _keep_stacks(self, texts: list[str], number: int) -> None:
        """After a hang: what every rank that answers was doing, into the run directory."""
        text = "\n".join(f"rank {rank}\n{text}\n" for rank, text in enumerate(texts))
        self._write(f"stacks-{number}.txt", text, wait=True)

    def _tell(self, group: Group, homes: list[dict], *, force: bool = False, waiting: str | None = None) -> None:
        """To the screen, and to whoever asks `sparing status`. waiting: for what, while no rank runs."""
        if group.statuses[0] and waiting is None:
            self.progress.show(group.statuses[0])
        local = storage.local_path(self.config.run.dir) is not None
        every_s = STATUS_EVERY_S if local else REMOTE_STATUS_EVERY_S
        if force or time.monotonic() - self.wrote_status_at > every_s:
            self.wrote_status_at = time.monotonic()
            rows = [{"rank": info.rank, "node_rank": info.node_rank, "host": home["host"], "pid": home["pid"], **status}
                    for info, home, status in zip(group.infos, homes, group.statuses, strict=True)]
            data = {"time": time.time(), "attempt": self.attempt, "state": self.state.name, "ranks": rows,
                    "waiting": waiting}
            self._write(STATUS, json.dumps(data), wait=force)

    def _write(self, name: str, text: str, *, wait: bool) -> None:
        """Into the run directory, from a thread of its own: where storage stands still the ranks must be asked on, or
        they would end themselves. What cannot be waited for is left out while the write before is under way."""
        if self.writing is not None:
            self.writing.join(STALL_S if wait else 0.0)
            if self.writing.is_alive() and not wait:
                return

        def write() -> None:
            with contextlib.suppress(SparingError):
                storage.write_bytes(storage.join(self.config.run.dir, name), text.encode(), retry_s=1)

        self.writing = threading.Thread(target=write, daemon=True, name="status")
        self.writing.start()
        if wait:
            self.writing.join(STALL_S)

    def _failure(self, decision: Decision, ended: dict[int, dict]) -> SparingError:
        record = ended.get(decision.rank, {})
        kind = FINAL.get(record.get("kind", ""), {33: Transient, NO_PROGRESS: NoProgress}.get(
            decision.exit_code, SparingError))
        message = decision.cause
        if kind in (SparingError, Transient) and decision.rank is not None:
            message = f"rank {decision.rank} on node {decision.node}: {decision.cause}"
        if kind is Transient:
            message += f"; continue with run.dir={self.config.run.dir} resume=auto"
        if record.get("traceback"):
            self._write("error.txt", record["traceback"], wait=True)
            message += f"; the rank's traceback is in {storage.join(self.config.run.dir, 'error.txt')}"
        error = kind(message)
        error.rank, error.node = decision.rank, decision.node
        return error
