"""Memory of this process and of its machine: the allocator told to keep what it frees, and how much is left to take."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.count import parameters
from orchestrator.config import ComputeDtype, Config
from orchestrator.errors import NotFit

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Reuse freed blocks of any size below 1 GiB instead of returning them to the kernel.

    By default glibc maps every large tensor afresh, and the kernel zeroes it page by page: a fifth of a training
    step on a CPU. Elsewhere than on glibc this does nothing.
    """
    _set_malloc(map_from=1 << 30, trim_from=(1 << 31) - 1)


def return_freed_memory() -> None:
    """Blocks of 256 KiB or more go back to the kernel when they are freed, so that what a process holds is what it
    uses: else glibc keeps several times as much once blocks of all sizes have come and gone."""
    _set_malloc(map_from=1 << 18, trim_from=1 << 20)


def _set_malloc(*, map_from: int, trim_from: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, map_from)
    mallopt(M_TRIM_THRESHOLD, trim_from)


def total_bytes() -> int | None:
    """Memory that all programs of this machine, or of its container, may take together; None where nothing tells."""
    whole = _meminfo("MemTotal")
    return whole and min([whole, *(limit for limit, _, _ in _groups())])


def check_state(config: Config, *, on_gpus: bool, here: bool) -> None:
    """`NotFit` where weights, gradients and moments alone are more than all devices have: no layout helps. here: all
    ranks share this machine. What nobody knows is no reason to refuse."""
    moments = 2 if config.precision.moments is ComputeDtype.bf16 else 4
    state = parameters(config.model, mtp=True).total * (4 + 4 + 2 * moments)
    if on_gpus:
        there, where = (config.hardware.memory_gib or 0) * 2**30 * config.layout.world_size, (
            f"{config.layout.world_size} x {config.hardware.name} have")
    else:
        there, where = here and total_bytes() or 0, "this machine has"
    if there and state > there:
        raise NotFit(f"model={config.model.name}: its weights, gradients and moments alone take {state / 2**30:,.0f} "
                     f"GiB, and {where} {there / 2**30:,.0f}; use a smaller model, or see what holds it: sparing plan "
                     f"model={config.model.name} hardware=h100 gpus=fit tokens=1e9")


def free_bytes(device: "torch.device | str") -> int | None:
    """Memory that a new program may take; None where the system does not tell."""
    if str(device).startswith("cuda"):
        import torch  # which a plan, that asks for the machine's memory alone, does without

        return torch.cuda.mem_get_info()[0]
    free = _meminfo("MemAvailable")
    return free and min([free, *(max(0, limit - used + cached) for limit, used, cached in _groups())])


def _meminfo(key: str) -> int | None:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return None


def _groups(root: str = "/sys/fs/cgroup") -> Iterator[tuple[int, int, int]]:
    """Limit of a container or of a batch job (cgroup v2), what of it is used, and what of that are files in the page
    cache, which make room."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup") as file:
            groups = [root, *(group for group in file.read().rpartition("0::/")[2].strip().split("/") if group)]
        for folder in (os.path.join(*groups[: depth + 1]) for depth in range(len(groups))):
            with contextlib.suppress(OSError, ValueError):  # no such file at the root, "max" where there is no limit
                limit, used, stat = (Path(folder, f"memory.{name}").read_text() for name in ("max", "current", "stat"))
                held = dict(line.split() for line in stat.splitlines())
                yield int(limit), int(used), int(held["active_file"]) + int(held["inactive_file"])
