"""What torch's tensors take: most at once, read off a profile of the CPU, and what a function leaves behind."""

import bisect
import math
from collections.abc import Callable

from torch import Tensor
from torch._C._profiler import _EventType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def left_behind(function: Callable[[], object]) -> tuple[object, int]:
    """What it returns, and the bytes of storages that it made and that are alive: of a forward, what its backward
    needs."""
    with _Made() as made:
        result = function()
    return result, sum(size for storage, size in made.storages if not storage.expired())


class _Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = operator(*args, **(kwargs or {}))
        new = {s.data_ptr(): s for s in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor))}
        self.storages += [(StorageWeakRef(s), s.nbytes()) for pointer, s in new.items() if pointer not in given]
        return out


def most_allocated(recorded: profile, *, before: int = 0, within: str | None = None) -> int:
    """Bytes, `before` the recording began and by its events; within: the name of the range that counts.

    A profile misses what other threads give back, and gloo's may be the last to hold a tensor that was sent. Such a
    tensor was there no longer when another was allocated at its place; it was in transit, and is not counted.
    """
    events = sorted(_flat(recorded.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    first, last = next(((e.start_time_ns, e.end_time_ns) for e in events if e.name == within), (0, math.inf))
    live, places, changes = {}, [], []
    for event in events:
        if event.tag != _EventType.Allocation:
            continue
        at, place, size = event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        if size < 0 and place in live:
            changes += [live.pop(place), (at, size)]
            places.remove(place)
        elif size > 0:  # what was allocated before the recording began is part of `before`
            for gone in _overlapping(places, live, place, size):
                live.pop(gone)
                places.remove(gone)
            live[place] = at, size
            bisect.insort(places, place)
    now = most = before
    for at, size in sorted([*changes, *live.values()]):
        now += size
        most = max(most, now) if first <= at <= last else most
    return most


def _flat(events: list) -> list:
    return [event for top in events for event in (top, *_flat(top.children))]


def _overlapping(places: list[int], live: dict[int, tuple[int, int]], place: int, size: int) -> list[int]:
    first = bisect.bisect_right(places, place)
    first -= first > 0 and places[first - 1] + live[places[first - 1]][1] > place
    return places[first:bisect.bisect_left(places, place + size)]
