"""Ranks that exist only as numbers: scripted failures against the real controller, in milliseconds. No Ray, no sleep.

A poll is a step of 0.35 s on a clock of our own. Two ranks live on a node; a rank's state is the step it has reached.
"""

from dataclasses import dataclass

from orchestrator.cluster import placement
from orchestrator.cluster.group import Group
from orchestrator.cluster.ranks import POLL_S

DEADLINE_S = 5000.0
"""No script may need longer than this, seconds of the dummy clock."""


@dataclass(frozen=True)
class FailAt:
    """What happens to `rank` when `step` has been taken; `kind` is a method of `Dummy` that begins with `on_`."""

    rank: int
    step: int
    kind: str
    always: bool = False
    """Again whenever that step is taken again."""


class Dummy:
    """Stands in for `orchestrator.cluster.ranks.Ranks`."""

    def __init__(self, config, *script: FailAt, nodes: int, steps: int = 30):
        self.script, self.steps, self.now, self.placed_at = list(script), steps, 1000.0, 1000.0
        self.nodes = {f"node-{number}": 2 for number in range(nodes)}
        """Places by node."""
        self.members: list[str | None] = []
        for node in list(self.nodes)[: config.layout.pp * config.layout.dp // 2]:
            self.members += [node, node]
        self.leaving: set[str] = set()
        self.reserve: list[str] = []
        self.saved = self.remembered = 0
        self.logged: list[dict] = []
        self.sizes: list[int] = []
        self.signal = lambda: None
        self.released = False

    @property
    def homes(self) -> list[dict]:
        return [{"node": node, "gpu": -1, "host": node, "pid": 1, "address": "-", "port": 1} for node in self.members]

    @property
    def there(self) -> int:
        return len([node for node in [*self.members, *self.reserve] if node in self.nodes and node not in self.leaving])

    @property
    def held(self) -> int:
        return len([node for node in [*self.members, *self.reserve] if node in self.nodes])

    @property
    def leaving_ranks(self) -> list[int]:
        return [rank for rank, node in enumerate(self.members) if node in self.leaving]

    @property
    def ground_leaves(self) -> bool:
        return "head" in self.leaving

    def form(self, config, attempt, recovery) -> Group:
        size = config.layout.pp * config.layout.dp
        assert len(self.members) == size and all(node in self.nodes for node in self.members)
        same = bool(self.sizes) and self.sizes[-1] == size
        self.step, self.blocked, self.sizes = max(self.saved, self.remembered if same else 0), None, [*self.sizes, size]
        self.remembered = self.step
        self.logged += recovery.events if recovery else []
        infos = placement.rank_infos([(home["node"], -1) for home in self.homes], "-", 1)
        generation = recovery.generation if recovery else 0
        return Group([None] * size, infos, {}, [{} for _ in infos], {}, self.now, generation)

    def poll(self, group: Group, stop_cause: str | None) -> None:
        self.now += POLL_S + 0.1
        for status in group.statuses:
            if not status.get("answers", True):
                status["mute_s"] = self.now - self.mute_since
        assert self.now < DEADLINE_S, "the script was not decided by the deadline"
        if self.blocked is not None:
            return
        for fault in [fault for fault in self.script if fault.step == self.step]:
            if not fault.always:
                self.script.remove(fault)
            self.told = fault
            getattr(self, f"on_{fault.kind}")(fault.rank, group)
            if self.blocked is not None:
                return
        if stop_cause is not None or self.step == self.steps:
            self.saved = self.step
            status = "completed" if self.step == self.steps else "preempted"
            group.ended.update({rank: {"result": {"status": status, "steps": self.step}}
                                for rank in range(len(group.runs))})
            return
        self.step += 1
        self.remembered = self.step - 1
        self.saved = self.step // 10 * 10
        for status in group.statuses:
            status.update(generation=group.generation, phase="step", step=self.step, steps=self.steps,
                          heartbeat_at=self.now, claim=1)

    def stacks(self, group) -> list[str]:
        return ["asleep"] * len(self.members)

    def hear(self, group: Group) -> None:
        """Every poll has told all."""

    def drain(self, group: Group, lost: set[int]) -> list[int]:
        return sorted(lost | {rank for rank, record in group.ended.items() if record.get("dead")})

    def refill(self, lost: list[int], *, wanted: int, timeout_s: float, patient: bool, on_wait) -> None:
        for rank in lost:
            self.members[rank] = None
        self.settle()
        for _ in range(2) if self.there < wanted and patient else ():
            self.now += timeout_s / 2
            on_wait()

    def settle(self) -> None:
        """Actors that wait find every free place."""
        held = [node for node in [*self.members, *self.reserve] if node in self.nodes]
        self.reserve = [node for node in self.reserve if node in self.nodes]
        for node, places in self.nodes.items():
            if node not in self.leaving:
                self.reserve += [node] * (places - held.count(node))

    def arrange(self, size: int) -> None:
        if size == len(self.members):
            self.members = [node or self.reserve.pop(0) for node in self.members]
        else:
            pool = sorted(node for node in [*self.members, *self.reserve] if node and node not in self.leaving)
            self.members, self.reserve = pool[:size], pool[size:]

    def release(self) -> None:
        self.released = True

    def _die(self, rank: int, group: Group, at: float) -> None:
        group.ended[rank] = {"dead": True, "error": "its process died", "exit_code": 33, "at": at}
        self.blocked = rank

    def _lose_connections(self, ranks, group: Group) -> None:
        for rank in ranks:
            group.ended[rank] = {"error": "Connection closed by peer", "exit_code": 33, "at": self.now - 1,
                                 "is_consequence": True}
        self.blocked = -1

    def on_killed(self, rank, group):
        self._die(rank, group, self.now)

    def on_killed_after_others_told(self, rank, group):
        self._lose_connections([other for other in range(len(group.runs)) if other != rank], group)
        self._die(rank, group, self.now)

    def on_connection_lost(self, rank, group):
        self._lose_connections(range(len(group.runs)), group)

    def on_error(self, rank, group):
        group.ended[rank] = {"error": "ZeroDivisionError: x", "exit_code": 1, "at": self.now, "kind": "-"}
        self.blocked = rank

    def on_drifted(self, rank, group):
        for other in range(len(group.runs)):
            group.ended[other] = {"error": "the counters of rank differ", "exit_code": 33, "kind": "Drifted",
                                  "at": self.now - (other != rank), "is_consequence": other != rank}
        self.blocked = rank

    def on_no_disk(self, rank, group):
        group.ended[rank] = {"error": "no room", "exit_code": 3, "at": self.now, "kind": "NotFit"}
        self.blocked = rank

    def on_no_storage(self, rank, group):
        group.ended[rank] = {"error": "storage did not answer", "exit_code": 33, "at": self.now, "kind": "Transient"}
        self.blocked = rank

    def on_frozen(self, rank, group):
        self._mute(rank, group)
        self._hang(rank, group, "step")

    def on_frozen_in_start(self, rank, group):
        self._mute(rank, group)
        self._hang(rank, group, "start")
        for status in group.statuses:
            status["generation"] = group.generation

    def on_hang_in_start(self, rank, group):
        self._hang(rank, group, "step")
        for other, status in enumerate(group.statuses):
            status["generation"] = None if other == rank else group.generation

    def on_hang_in_step(self, rank, group):
        self._hang(rank, group, "step")

    def on_hang_in_save(self, rank, group):
        self._hang(rank, group, "save")

    def _mute(self, rank, group):
        group.statuses[rank]["answers"], self.mute_since = False, self.now

    def _hang(self, rank, group, phase):
        """The others wait for it and are silent a little less long."""
        for other, status in enumerate(group.statuses):
            status.update(phase=phase, heartbeat_at=self.now + 0.1 * (other != rank))
        self.blocked = rank

    def on_node_lost(self, rank, group):
        node = self.members[rank]
        del self.nodes[node]
        for other, home in enumerate(self.members):
            if home == node:
                self._die(other, group, self.now)

    def on_node_drained(self, rank, group):
        self.leaving.add(self.members[rank])

    def on_head_drained(self, rank, group):
        self.leaving.add("head")

    def on_node_returns(self, rank, group):
        self.leaving.clear()
        self.nodes["node-9"] = 2
        self.settle()

    def on_sigterm(self, rank, group):
        self.signal()
