"""The placed actors of a run, and all that the controller asks of Ray: form, poll, drain, refill, release.

Members are actors with a rank, in rank order. The reserve are actors without one: warm spares, those left over when a
run goes on with fewer ranks, and those that Ray has found no place for yet. Waiting for room is asking an actor of the
reserve where it lives. `tests/orchestrator/cluster/dummy.py` stands in for this class in milliseconds.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from orchestrator.cluster import nodes, placement
from orchestrator.cluster.group import Group
from orchestrator.cluster.places import Places
from orchestrator.cluster.worker import THREADS, Worker, why_dead
from orchestrator.config import Config, LayoutConfig, to_dict
from orchestrator.errors import Transient
from orchestrator.train.control import Recovery, steady

OUT_OF_MEMORY = "out of memory: Ray ended its process when the machine had hardly any left (RAY_memory_usage_threshold)"
POLL_S = 0.25
"""Between two looks at who has ended."""
ASK_S = 0.5
"""Between two questions to a rank how it is, which it answers beside its work."""
ANSWER_S = 1.5
"""A rank that has not said how it is for this long does not answer."""
DRAIN_S = 10.0
"""After a fault, how long the other ranks may take to notice their lost connections."""
LOOK_S = 1.0
"""Between two looks at what moves slowly: nodes that are about to go, room for actors that wait."""


@dataclass
class Member:
    worker: object
    place: int
    home: dict | None = None
    """As `Worker.home` told it; None while the actor has no place."""


class Ranks:
    """Actors from their placement to their release."""

    def __init__(self, request: placement.Request, places: Places, layout: LayoutConfig):
        """places: of the request's bundles, then of spares."""
        self.request, self.places, self.layout = request, places, layout
        self.placed_at = steady()
        self.members: list[Member] = []
        self.reserve: list[Member] = []
        self.homing: dict = {}
        """Question to an actor of the reserve where it lives -> the actor."""
        self.leaving: set[str] = set()
        """Ray's ids of the nodes that are being drained."""
        self.looked_at = self.asked_at = 0.0
        self.doors: dict[str, tuple[str, int]] = {}
        """Ray's id of a node -> where its raylet listens."""
        self.unreachable: set[str] = set()
        """Ids of nodes that were lost since the ranks were formed, though Ray may not know yet."""

    @property
    def homes(self) -> list[dict]:
        return [member.home for member in self.members]

    @property
    def there(self) -> int:
        """Actors that have a place and keep it."""
        return len(self._placed([*self.members, *self.reserve]))

    @property
    def held(self) -> int:
        """Devices that the run pays for, with a rank or without: its share of nodes that live."""
        alive, each = {node["NodeID"] for node in nodes.alive()}, self.request.ranks_per_bundle
        return sum(each if place < self.request.bundles else 1 for place, node in enumerate(self.places.nodes())
                   if node in alive)

    @property
    def leaving_ranks(self) -> list[int]:
        """Ranks on nodes that are being drained."""
        return [rank for rank, member in enumerate(self.members) if member.home["node"] in self.leaving]

    @property
    def ground_leaves(self) -> bool:
        """The node of this process or that of Ray's head is being drained: no other rank can help then."""
        return bool(self.leaving) and bool(self.leaving & nodes.ground())

    def form(self, config: Config, attempt: int, recovery: Recovery | None) -> Group:
        """Start the rank program on every member; rank 0 names a port that nobody has used."""
        with contextlib.suppress(RayError):
            self.members[0].home = ray.get(self.members[0].worker.home.remote(), timeout=10)
        self.unreachable = set()
        self.doors = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes.alive()}
        homes = [(home["node"], home["gpu"]) for home in self.homes]
        here = len({node for node, _ in homes}) == 1
        if not self.request.gpu and here:
            homes = placement.simulated_homes(config)
        infos = placement.rank_infos(homes, self.homes[0]["address"], self.homes[0]["port"])
        plain = to_dict(config)
        if infos[0].local_world_size != infos[0].world_size and here:
            share = max(1, (os.cpu_count() or 1) // len(infos))
            plain["cluster"]["threads_per_rank"] = plain["cluster"]["threads_per_rank"] or share
        runs = [member.worker.run.remote(plain, info, self.placed_at, attempt, recovery)
                for member, info in zip(self.members, infos, strict=True)]
        return Group(runs, infos, {}, [{} for _ in runs], {}, steady(), recovery.generation if recovery else 0)

    def poll(self, group: Group, stop_cause: str | None) -> None:
        """Wait a moment for ranks to end, ask the others how they are, and tell them to stop if they are to."""
        self._collect(group, POLL_S)
        self._ask(group)
        self._knock(group)
        for rank, member in enumerate(self.members):
            runs = rank not in group.ended and group.statuses[rank].get("generation") == group.generation
            if stop_cause is not None and runs and rank not in group.told_to_stop:
                group.told_to_stop.add(rank)
                member.worker.request_stop.remote(stop_cause, group.generation)
        if time.monotonic() - self.looked_at > LOOK_S:
            self.looked_at = time.monotonic()
            self._look()

    def hear(self, group: Group) -> None:
        """At the end of a group: how far the ranks have come that can still say so."""
        self.asked_at = 0.0
        self._ask(group, wait_s=0.5)

    def stacks(self, group: Group) -> list[str]:
        """What the threads of every rank are doing; a rank that does not answer says so, and is not waited for."""
        refs = {member.worker.stacks.remote(): rank for rank, member in enumerate(self.members)
                if group.statuses[rank].get("answers", True)}
        answered, _ = ray.wait(list(refs), num_returns=len(refs), timeout=2.0) if refs else ([], [])
        texts = ["does not answer"] * len(self.members)
        for ref in answered:
            with contextlib.suppress(RayError):
                texts[refs[ref]] = ray.get(ref)
        return texts

    def drain(self, group: Group, lost: set[int]) -> list[int]:
        """End the lost ranks for good and let the others come back from their broken group; the ranks to replace."""
        deadline, told = time.monotonic() + DRAIN_S, None
        for rank in lost:
            kill(self.members[rank].worker)
        while True:
            lost = lost | {rank for rank, record in group.ended.items() if record.get("dead")}
            if told != (silent := self._silent_addresses(lost)):  # the ranks of a node are found dead one by one
                told = silent
                for rank, member in enumerate(self.members):
                    if rank not in group.ended.keys() | lost:
                        member.worker.leave.remote(silent)
            if len(group.ended.keys() | lost) == len(group.runs) or time.monotonic() > deadline:
                return sorted(lost | {rank for rank in range(len(group.runs)) if rank not in group.ended})
            self._collect(group, POLL_S)

    def refill(self, lost: list[int], *, wanted: int, timeout_s: float, patient: bool, on_wait: Callable) -> None:
        """Give up the lost ranks and wait until `wanted` actors have a place. Who is not patient waits only for as
        many as Ray knows of room for. `on_wait()` is called all the while."""
        for rank in sorted(lost, reverse=True):
            member = self.members[rank]
            kill(member.worker)
            self.reserve.append(self._start(member.place))
            member.home = None
        for member in self.reserve:
            member.home = None
            self._ask_home(member)
        deadline = time.monotonic() + timeout_s
        while self.there < (wanted if patient else min(wanted, self._room())) and time.monotonic() < deadline:
            self._arrivals(POLL_S)
            on_wait()
            for member in self._placed(self.members):
                member.worker.status.remote()  # keeps its lease

    def arrange(self, size: int) -> None:
        """Hand out the ranks. With as many as before, all but the lost ones stay who they are."""
        fresh = self._placed(self.reserve)
        if size == len(self.members):
            self.members = [member if self._placed([member]) else fresh.pop(0) for member in self.members]
        else:
            pool = [*self._placed(self.members), *fresh]
            order = self.order(pool)[:size]
            left = [member for i, member in enumerate(pool) if i not in order]
            self.members = [pool[i] for i in order]
            self.reserve += [member for member in left if member not in self.reserve]
        self.reserve = [member for member in self.reserve if member not in self.members]

    def order(self, members: list[Member]) -> list[int]:
        """The members in rank order: stable by node, expert groups inside a node where one can hold them."""
        return placement.order_ranks([(f"{member.home['address']} {member.home['node']}", member.home["gpu"])
                                      for member in members], self.layout.ep, self.layout.ep_per_node)

    def release(self) -> None:
        for member in [*self.members, *self.reserve]:
            kill(member.worker)
        self.places.remove()

    def _silent_addresses(self, lost: set[int]) -> set[str]:
        """Of machines that only lost ranks live on: they may be gone without having closed a connection. Not those of
        Ray's head and of this process, which are heard of."""
        context = ray.get_runtime_context()
        known = {context.gcs_address.rpartition(":")[0], ray.util.get_node_ip_address()}
        known |= {member.home["address"] for rank, member in enumerate(self.members) if rank not in lost}
        return {self.members[rank].home["address"] for rank in lost} - known

    def _collect(self, group: Group, timeout_s: float) -> None:
        """Wait a moment for ranks to end; note how they did."""
        pending = [ref for rank, ref in enumerate(group.runs) if rank not in group.ended]
        done, _ = ray.wait(pending, num_returns=1, timeout=timeout_s) if pending else ([], [])
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=0) if done else ([], [])  # however many they are
        for ref in done:
            rank = group.runs.index(ref)
            try:
                group.ended[rank] = ray.get(ref) | {"heard_at": steady()}
            except RayActorError as error:
                group.ended[rank] = {"dead": True, "error": why_dead(error), "exit_code": 33, "at": steady()}
            except OutOfMemoryError:
                group.ended[rank] = {"dead": True, "error": OUT_OF_MEMORY, "exit_code": 1, "at": steady()}
            except RayError as error:
                group.ended[rank] = {"error": str(error).splitlines()[-1], "exit_code": 1, "at": steady()}

    def _ask(self, group: Group, wait_s: float = 0.1) -> None:
        """One question a rank is under way at any time; nobody waits for a rank that does not answer."""
        now, waiting = time.monotonic(), {rank for rank, _ in group.asked.values()}
        if now - self.asked_at > ASK_S:
            self.asked_at = now
            for rank, member in enumerate(self.members):
                if rank not in waiting and not group.ended.get(rank, {}).get("dead"):
                    group.asked[member.worker.status.remote()] = (rank, now)
        refs = list(group.asked)
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=wait_s) if refs else ([], [])
        for ref in answered:
            rank, _ = group.asked.pop(ref)
            with contextlib.suppress(RayError):
                status = ray.get(ref)  # ages, since clocks of other machines may be off
                group.statuses[rank] = status | {"answers": True, "heartbeat_at": steady() - status["silent_s"]}
        for rank, since in group.asked.values():
            mute_s = time.monotonic() - since
            group.statuses[rank] = group.statuses[rank] | {"answers": mute_s < ANSWER_S, "mute_s": mute_s}

    def _knock(self, group: Group) -> None:
        """Ranks are dead whose machine is gone: none of its ranks answers, and its raylet takes no connection (the
        kernel of a live machine does that, whatever its processes are at)."""
        silent = {member.home["node"] for rank, member in enumerate(self.members)
                  if group.statuses[rank].get("answers") is False and rank not in group.ended}
        silent -= {member.home["node"] for rank, member in enumerate(self.members)
                   if group.statuses[rank].get("answers", True)} | {ray.get_runtime_context().get_node_id()}
        if not silent:
            return
        lost = nodes.unreachable({node: door for node, door in self.doors.items() if node in silent})
        self.unreachable |= lost
        for rank, member in enumerate(self.members):
            if member.home["node"] in lost and rank not in group.ended:
                group.ended[rank] = {"dead": True, "error": f"node {member.home['host']} cannot be reached",
                                     "exit_code": 33, "at": steady()}

    def _look(self) -> None:
        """What has changed around the ranks: nodes about to go, reserves that have found a place."""
        self.leaving = nodes.leaving()
        for place in {member.place for member in self.reserve} - {member.place for member in self.members}:
            if self.places.renew(place):
                self.reserve = [self._start(place) if member.place == place else member for member in self.reserve]
                self.homing = {ref: member for ref, member in self.homing.items() if member in self.reserve}
        for member in self.reserve:
            if member not in self.homing.values():
                self._ask_home(member)
        self._arrivals(0)

    def _arrivals(self, timeout_s: float) -> None:
        refs = list(self.homing)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        for ref in ready:
            member = self.homing.pop(ref)
            try:
                member.home = ray.get(ref)
            except RayError:  # it died with its node: another one waits in its stead
                self.reserve.remove(member)
                self.reserve.append(self._start(member.place))
                self._ask_home(self.reserve[-1])

    def _ask_home(self, member: Member) -> None:
        self.homing = {ref: asked for ref, asked in self.homing.items() if asked is not member}
        self.homing[member.worker.home.remote()] = member

    def _placed(self, members: list[Member]) -> list[Member]:
        return [member for member in members if member.home is not None and member.home["node"] not in self.leaving]

    def _room(self) -> int:
        """Actors that could have a place now, by what Ray knows of its nodes."""
        kind = "GPU" if self.request.gpu else "CPU"
        return int(sum(node["Resources"].get(kind, 0) for node in nodes.alive()
                       if node["NodeID"] not in self.leaving | self.unreachable))

    def _start(self, place: int) -> Member:
        """One actor; a lost one is not restarted behind our back."""
        environment = placement.environment(gpu=self.request.gpu, beside_gpus=bool(ray.cluster_resources().get("GPU")))
        worker = ray.remote(Worker).options(
            num_cpus=1, num_gpus=1 if self.request.gpu else 0, resources=self.request.custom,
            max_concurrency=THREADS, max_restarts=0,
            scheduling_strategy=self.places.strategy(place),
            runtime_env={"env_vars": environment} if environment else None).remote()
        worker.warm.remote()
        return Member(worker, place)


def place(config: Config, request: placement.Request) -> Ranks:
    """An actor per rank, in rank order; `Transient` if the room is not free in time."""
    each, spares = request.ranks_per_bundle, config.cluster.spares
    began, limit = steady(), config.cluster.start_timeout_s
    places = Places([request.bundle(each)] * request.bundles, spread=request.spread,
                    apart=config.cluster.min_ranks > 0, spares=[request.bundle(1)] * spares)
    try:
        places.wait(limit)
        ranks = Ranks(request, places, config.layout)
        members = [ranks._start(i // each) for i in range(request.ranks)]
        homes = ray.get([member.worker.home.remote() for member in members],
                        timeout=max(10.0, limit - (ranks.placed_at - began)))
    except RayError as error:
        places.remove()
        if not isinstance(error, GetTimeoutError):
            raise Transient(f"the ranks could not be started: {str(error).splitlines()[-1]}") from None
        free = ray.available_resources()
        have = ", ".join(f"{free.get(name, 0):g} of {number * request.ranks:g} {name}"
                         for name, number in request.bundle(1).items())
        raise Transient(f"cluster.start_timeout_s={limit:g}: {request.ranks} ranks could not be placed in that time; "
                        f"the cluster is busy (free: {have}): wait, free its actors, or raise cluster.start_timeout_s"
                        ) from None
    for member, home in zip(members, homes, strict=True):
        member.home = home
    order = ranks.order(members)
    ranks.members = [members[i] for i in order]
    ranks.reserve = [ranks._start(request.bundles + i) for i in range(spares)]
    return ranks


def kill(worker) -> None:
    with contextlib.suppress(RayError):
        ray.kill(worker)
