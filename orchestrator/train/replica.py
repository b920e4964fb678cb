"""The newest state of a rank and of its buddy on another node, in host memory: the first tier to recover from.

A `Replicas` lives as long as its process and outlives the process group. `Buddies` fills it while a group lives:
every `checkpoint.memory_every` steps each rank packs its state, takes a checksum, keeps it and sends it to its buddy,
over a gloo group of its own. When the ranks meet again after one was replaced, `agree` finds the newest step whose
every rank's state is held by somebody, and `fetch` brings it home. Two steps are kept of each, so that a failure in the
middle of an exchange costs nothing. (The idea is GEMINI's, SOSP 2023.)
"""

import datetime
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.errors import NotTrustworthy
from orchestrator.parallel.mesh import Mesh
from orchestrator.train.shards import DTYPES, Piece, header_of

KEPT_STEPS = 2
COPIES = 2 * (KEPT_STEPS + 1)
"""States that a rank's process holds: of its own and of another, those that are kept and one that is being written."""
STATE_BYTES = 1 << 14
"""The state's JSON is padded to a multiple of this, so that a rank's replicas are all of one size."""


@dataclass(frozen=True)
class Replica:
    """One rank's packed state after `step`: a safetensors file in memory and its `checksum`."""

    owner: int
    step: int
    data: Tensor
    """uint8, on the CPU."""
    checksum: int

    def check(self) -> None:
        if checksum(self.data) != self.checksum:
            raise NotTrustworthy(f"the copy in memory of rank {self.owner}'s state after step {self.step} is damaged")


class Replicas:
    """What one process holds, by owner and step, for one layout at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], Replica] = {}
        self._retired: dict[int, Tensor] = {}
        self._layout: object = None
        self.has_room = True
        """The machine's memory can hold what a rank keeps."""

    def use(self, layout: object) -> None:
        """Forget everything if the ranks mean something else than before."""
        with self._lock:
            if layout != self._layout:
                self._held.clear()
                self._retired.clear()
            self._layout = layout

    def put(self, replica: Replica) -> None:
        with self._lock:
            self._held[replica.owner, replica.step] = replica
            steps = sorted((step for owner, step in self._held if owner == replica.owner), reverse=True)
            for step in steps[KEPT_STEPS:]:
                self._retired[replica.owner] = self._held.pop((replica.owner, step)).data

    def room(self, owner: int, num_bytes: int) -> Tensor:
        """Memory for a replica, uint8: that of the one just forgotten, since fresh pages cost more than what is
        written to them."""
        with self._lock:
            retired = self._retired.pop(owner, None)
        return retired if retired is not None and len(retired) == num_bytes else torch.empty(num_bytes,
                                                                                             dtype=torch.uint8)

    def get(self, owner: int, step: int) -> Replica:
        with self._lock:
            return self._held[owner, step]

    def drop_after(self, step: int) -> None:
        """Forget the steps that are about to be taken again."""
        with self._lock:
            self._held = {key: replica for key, replica in self._held.items() if key[1] <= step}

    def held(self) -> list[tuple[int, int]]:
        """(owner, step) of all."""
        with self._lock:
            return sorted(self._held)


class Buddies:
    """One rank's half of the exchange within one group of ranks; all ranks `offer` and `advance` at the same steps.

    The thread checks; only the training thread communicates, so that a broken group is left at once. An exchange takes
    three steps: copy, send, and keep what has come.
    """

    def __init__(self, mesh: Mesh, replicas: Replicas, *, timeout_s: float):
        self.rank, self.world, self.replicas = mesh.info.rank, mesh.layout.world_size, replicas
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        nodes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(nodes, torch.tensor([mesh.info.node_rank]), group=self.group)
        self.shift = buddy_shift([int(node) for node in nodes])
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="replica")
        self._packing: Future | None = None
        self._moving: tuple[list, Replica] | None = None

    def offer(self, step: int, pieces: Iterable[Piece], state: dict) -> None:
        """Copy the state now; an exchange that is under way is ended before."""
        self.finish()
        data = pack(pieces, state, room=lambda num_bytes: self.replicas.room(self.rank, num_bytes))
        self._packing = self._packer.submit(_checked, self.rank, step, data)

    def finish(self) -> None:
        """Take an exchange that is under way to its end."""
        while self._packing is not None or self._moving is not None:
            self.advance()

    def advance(self) -> None:
        """The next stage of an exchange under way, once a step."""
        if self._moving is not None:
            self.settle()
        elif self._packing is not None:
            mine, self._packing = self._packing.result(), None
            self.replicas.put(mine)
            to, source = (self.rank + self.shift) % self.world, (self.rank - self.shift) % self.world
            sent, header = _header(mine), torch.empty(2, dtype=torch.int64)
            works = [dist.isend(sent, to, group=self.group), dist.isend(mine.data, to, group=self.group)]
            dist.recv(header, source, group=self.group)
            theirs = _replica(source, mine.step, header, self.replicas.room(source, int(header[0])))
            self._moving = [*works, dist.irecv(theirs.data, source, group=self.group)], theirs

    def settle(self) -> None:
        """Keep what is on its way; what is only packed yet stays unsent."""
        if self._moving is not None:
            works, theirs = self._moving
            for work in works:
                work.wait()
            self.replicas.put(theirs)
            self._moving = None

    def close(self) -> None:
        self._packer.shutdown(wait=False, cancel_futures=True)


class MemoryLoader:
    """A replica read like a checkpoint: `state`, and rows of tensors by key, which are views of it and no copies."""

    def __init__(self, replica: Replica):
        replica.check()
        data = replica.data
        begin = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        self._tensors = {}
        for name, field in json.loads(data[8:begin].numpy().tobytes()).items():
            start, stop = field["data_offsets"]
            self._tensors[name] = data[begin + start : begin + stop].view(DTYPES[field["dtype"]]).view(field["shape"])
        self.state = json.loads(self._tensors.pop("state").numpy().tobytes())
        self._starts = {name.rsplit("@", 1)[0]: int(name.rsplit("@", 1)[1]) for name in self._tensors}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the tensor `key`; this rank's own rows and no others are there."""
        first = self._starts[key]
        rows = self._tensors[f"{key}@{first}"]
        return rows if stop is None else rows[start - first : stop - first]

    def close(self) -> None:
        self._tensors = {}


def buddy_shift(nodes: list[int]) -> int:
    """How many ranks on each rank's buddy is, one distance for all: the smallest that puts most of them on another
    node. nodes: of each rank, at least two."""
    def together(shift: int) -> int:
        return sum(node == nodes[(rank + shift) % len(nodes)] for rank, node in enumerate(nodes))

    shifts = range(1, len(nodes))
    apart = next((shift for shift in shifts if not together(shift)), None)
    return apart or min(shifts, key=together)


def agree(mesh: Mesh, replicas: Replicas, turn: int) -> tuple[int, dict[int, int]] | None:
    """The newest step of which all ranks' states are held, and who holds each: rank 0 asks all, and tells all."""
    world, store, answer = mesh.layout.world_size, mesh.store, f"memory/{turn}/agreed"
    store.set(f"memory/{turn}/{mesh.info.rank}", json.dumps(replicas.held()))
    if mesh.info.rank == 0:
        holders: dict[int, dict[int, int]] = {}
        for rank in range(world):
            for owner, step in json.loads(store.get(f"memory/{turn}/{rank}")):
                if owner == rank or owner not in holders.setdefault(step, {}):
                    holders.setdefault(step, {})[owner] = rank
        newest = max((step for step, by_owner in holders.items() if len(by_owner) == world), default=None)
        store.set(answer, json.dumps(None if newest is None else [newest, sorted(holders[newest].items())]))
    found = json.loads(store.get(answer))
    return None if found is None else (found[0], dict(map(tuple, found[1])))


def fetch(mesh: Mesh, replicas: Replicas, step: int, holders: dict[int, int], group: dist.ProcessGroup) -> Replica:
    """This rank's state of `step`, from its own memory or from the rank that holds it. All ranks call it."""
    rank = mesh.info.rank
    for owner, holder in sorted(holders.items()):
        if holder == owner:
            continue
        if rank == holder:
            replica = replicas.get(owner, step)
            for part in (_header(replica), replica.data):
                dist.send(part, owner, group=group)
        elif rank == owner:
            replicas.put(_receive(owner, holder, step, group))
    return replicas.get(rank, step)


def pack(pieces: Iterable[Piece], state: dict, *, room: Callable[[int], Tensor]) -> Tensor:
    """A safetensors file in memory: a copy of the pieces, `key@start` each, and the state as JSON. `room(n)` gives n
    bytes to write it to."""
    text = json.dumps(state)
    text += " " * (-len(text) % STATE_BYTES)
    text = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    named = [(f"{piece.key}@{piece.start}", piece.tensor.detach()) for piece in pieces if piece.num_rows]
    named = sorted(named, key=lambda pair: -pair[1].element_size()) + [("state", text)]  # so that each is aligned
    header = header_of(named)
    data = room(len(header) + sum(tensor.nbytes for _, tensor in named))
    data[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    offset = len(header)
    for _, tensor in named:
        data[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        offset += tensor.nbytes
    return data


def checksum(data: Tensor) -> int:
    """XOR of all words of 8 bytes: one pass at the speed of memory, which finds every word that differs alone. It is
    against accidents; what is written to storage has a SHA-256."""
    whole = len(data) // 8 * 8
    words = torch.hash_tensor(data[:whole].view(torch.int64)).view(torch.int64).item()
    return words ^ int.from_bytes(data[whole:].numpy().tobytes(), "little")


def _checked(owner: int, step: int, data: Tensor) -> Replica:
    return Replica(owner, step, data, checksum(data))


def _receive(owner: int, source: int, step: int, group: dist.ProcessGroup) -> Replica:
    header = torch.empty(2, dtype=torch.int64)
    dist.recv(header, source, group=group)
    replica = _replica(owner, step, header, torch.empty(int(header[0]), dtype=torch.uint8))
    dist.recv(replica.data, source, group=group)
    return replica


def _replica(owner: int, step: int, header: Tensor, data: Tensor) -> Replica:
    """That which a header announces by its size and its checksum; `data` is still to be filled."""
    return Replica(owner, step, data, int(header[1]))


def _header(replica: Replica) -> Tensor:
    return torch.tensor([len(replica.data), replica.checksum])
