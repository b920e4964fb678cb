"""Tensors of the CPU that pose as a GPU's: a CPU's values, CUDA's rules of devices.

An operator between devices fails, backward runs in autograd's own thread for a device, autocast follows CUDA's lists,
FSDP2 takes its streams, process groups are asked for by `nccl`. What is computed, and sent, is the CPU's, so that a run
can be held against the one-process run. Kernels, speed and memory are not shown by any of this.

`pose` must come before torch is imported, in a process of its own, and runs torch 2.13's CPU build alone.
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import threading
from pathlib import Path

MIXED = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")
"""Operators that CUDA lets have tensors of the CPU beside its own."""


def build(folder: Path) -> str:
    """The library that `pose` loads, from posing.cpp; needs g++."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source, library = Path(__file__).with_suffix(".cpp"), folder / "posing.so"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", source, "-o", library,
                    f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], check=True, capture_output=True)
    return str(library)


def pose(library: str) -> None:
    """From here on `cuda:0` is a device of this process, in every thread."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    for path in (torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _patch(_make_mode())


def _make_mode():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
    from torch.utils._pytree import tree_leaves, tree_map

    class Posing(torch.Tensor):
        @staticmethod
        def __new__(cls, own: torch.Tensor):
            made = torch.Tensor._make_wrapper_subclass(
                cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype,
                device=torch.device("cuda", 0))
            made.own = own
            return made

        @classmethod
        def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
            return run(operator, args, kwargs or {})

        def tolist(self) -> list:
            return self.own.tolist()

        def numpy(self, *_, **__):
            raise TypeError("a GPU's tensor has no numpy array")

        __array__ = numpy

        def data_ptr(self) -> int:
            return self.own.data_ptr()

        def record_stream(self, stream) -> None:
            pass

    def run(operator, args: tuple, kwargs: dict):
        name, asked = operator.overloadpacket.__name__, kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        posing = [tensor for tensor in tensors if isinstance(tensor, Posing)]
        if posing and name not in MIXED and any(t.dim() and not isinstance(t, Posing) for t in tensors):
            raise RuntimeError(f"{operator}: some tensors are on cuda:0, some on the CPU")
        poses = torch.device(asked).type == "cuda" if asked is not None else bool(posing)
        if name == "copy_":
            poses = isinstance(args[0], Posing)
        if asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        given = {id(tensor.own): tensor for tensor in posing}
        own = tree_map(lambda leaf: leaf.own if isinstance(leaf, Posing) else leaf, (args, kwargs))
        result = tree_map(lambda leaf: given[id(leaf)] if id(leaf) in given else Posing(leaf) if
                          poses and isinstance(leaf, torch.Tensor) else leaf, operator(*own[0], **own[1]))
        aliases = poses and posing and operator.namespace == "aten"
        return return_and_correct_aliasing(operator, args, kwargs, result) if aliases else result

    class Mode(TorchDispatchMode):
        """What makes a tensor has none among its arguments."""

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter, Posing) for tensor in tensors):
                return NotImplemented  # a DTensor comes to its own parts first
            asked = kwargs.get("device")
            if asked is not None and torch.device(asked).type == "cuda" or any(isinstance(t, Posing) for t in tensors):
                return run(operator, args, kwargs)
            return operator(*args, **kwargs)

    return Mode


class _Stream(contextlib.nullcontext):
    def __getattr__(self, name: str):
        return lambda *_, **__: self


def _patch(mode) -> None:
    """What torch would ask a driver, and the few places that reach below its dispatcher."""
    import torch
    import torch.distributed as dist
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp

    entered, cuda = threading.local(), torch.cuda

    def enter(*_) -> None:
        if not hasattr(entered, "mode"):
            entered.mode = mode()
            entered.mode.__enter__()

    run, make, connect = threading.Thread.run, torch.tensor, dist.init_process_group
    allocate, free = fsdp.alloc_storage, fsdp.free_storage

    def run_posing(thread) -> None:
        enter()
        run(thread)

    def make_on(data, *, device=None, **kwargs):
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    threading.Thread.run, torch.tensor = run_posing, make_on
    dist.init_process_group = lambda backend, **kwargs: connect("cpu:gloo,cuda:gloo", **kwargs)
    fsdp.alloc_storage = lambda tensor: allocate(getattr(tensor, "own", tensor))
    fsdp.free_storage = lambda tensor: free(getattr(tensor, "own", tensor))
    for name in ("_lazy_init", "synchronize", "empty_cache", "set_rng_state"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("Stream", "Event", "current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *_, **__: _Stream())
    cuda.set_device, cuda.get_rng_state = enter, lambda *_, **__: torch.get_rng_state()
    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 8
    cuda.get_device_capability = lambda *_: (8, 0)
    enter()
