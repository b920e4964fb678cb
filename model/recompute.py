"""What a block computes again in backward rather than keep (V3 report, section 3.2.3): norms, what leads from latents
to queries, keys and values, SwiGLU outputs; and logits. Of the products only MLA's up-projections and the heads run
twice, the core does not.

torch's checkpoint stops as soon as it has what backward needs: the product at the end of a region has kept its input
by then, and does not run again.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

CORES = (torch.ops.aten._scaled_dot_product_flash_attention.default,
         torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
         torch.ops.aten._scaled_dot_product_efficient_attention.default,
         torch.ops.aten._scaled_dot_product_cudnn_attention.default)
"""Attention kernels: their outputs are kept where everything around them is computed again."""


def again(function: Callable, *inputs, but_cores: bool = False):
    """function(*inputs), of which backward has the inputs alone; but_cores: and the outputs of attention cores."""
    kept = {"context_fn": _keeping_cores} if but_cores else {}
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **kept)


def made_again(make: Callable[[Tensor], Tensor], x: Tensor, use: Callable[[Tensor], object]):
    """use(make(x)), of which backward has x and makes the rest again, wherever it would have kept make(x) itself."""
    made, x = make(x), x.detach()
    found = weakref.ref(made)  # hooks outlive the forward

    def pack(tensor: Tensor) -> object:
        ours = found()
        if ours is not None and (tensor is ours or tensor._base is ours) and tensor.numel() == ours.numel():
            return tensor.shape
        return tensor.detach()  # an operator's own output would hold the operator that holds it

    def unpack(kept: object) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(x).view(kept)

    with saved_tensors_hooks(pack, unpack):
        return use(made)


def keep_casts(device: torch.device) -> None:
    """Casts of weights outlive recompute: in the thread that runs backward (of a GPU one of autograd's own) it enters a
    region of autocast, and leaving a thread's outermost one empties the cache that all share. Here that thread enters
    one for good."""
    result = torch.ones((), device=device, requires_grad=True) * 1
    result.register_hook(lambda _: torch.autocast(device.type, enabled=False).__enter__() and None)
    result.backward()


def _keeping_cores() -> tuple["_Cores", "_Cores"]:
    outputs = []
    return _Cores(outputs, first=True), _Cores(outputs, first=False)


class _Cores(TorchDispatchMode):
    """The cores' outputs, kept by the first forward and handed out by later ones: two where a backward is split, for
    which torch's own selective checkpoint is not made."""

    def __init__(self, outputs: list, *, first: bool):
        super().__init__()
        self.outputs, self.first = outputs, first

    def __enter__(self):
        self.met = 0
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator not in CORES:
            return operator(*args, **(kwargs or {}))
        if self.first:
            self.outputs.append(tree_map_only(Tensor, Tensor.detach, operator(*args, **(kwargs or {}))))
        self.met += 1
        return tree_map_only(Tensor, Tensor.detach, self.outputs[self.met - 1])
