"""Which software trains: what is known of a stack, as data (conf/stacks.yaml), and the one scalar fitted to it.

The same layout differs by 6% (median) and up to 77% between releases of one framework, so a prediction names its stack.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import yaml

from orchestrator.config import conf_dir, from_dict
from orchestrator.errors import BadRequest


@dataclass(frozen=True)
class Stack:
    name: str = "default"
    overhead: float = 1.0
    """Fitted: time of memory-bound operators, launches and routing against what bytes and counts say. Products,
    attention cores and links are the device's own and stay as they are. What is above 1 is waiting between
    operators, which CUDA graphs take their share of."""
    attention: str = "flash"
    """`unfused` writes the scores out; `flash2` and `triton` (the first version) do not use the asynchronous
    products of Hopper and later; `flash` is FlashAttention-3, cuDNN's or their like."""
    exchange_hidden: float = 0.0
    """Share of the experts' all-to-all that runs behind other work outside a schedule that overlaps by itself."""
    sequence_parallel: bool = True
    """Norms and residuals are split over tensor-parallel ranks."""
    tensor_hidden: float = 0.0
    """Share of tensor-parallel communication that runs behind products (user buffers, asynchronous TP)."""
    reduce_hidden: float = 0.0
    """Share of gradient reduction and weight gathering that runs behind the pipeline."""
    recomputed: float = 0.0
    """Share of its products that a block does again in selective recompute, beside all memory-bound operators
    (torchtitan's saves every second product and attention)."""
    recomputes_core: bool = False
    """Selective recompute is of the attention core (Megatron's), where keys and values are not latent."""
    recomputes_twice: bool = False
    """Selective recompute is `model.recompute`'s: all that leads to the attention core, too, and in both parts of a
    backward that is split."""
    gradient_bytes: float = 4.0
    """Of a gradient on the wire."""
    graphs: float = 0.0
    """Share of a block's launches that CUDA graphs take from the host, and of what `overhead` has above 1."""
    launched_on: tuple[str, ...] = ()
    """Devices on which its recipes have no CUDA graphs."""
    expert_launches: float = 0.0
    """Products that a forward launches for each expert on the rank, where they are launched one by one; a quantised
    one takes four launches, with its input's cast and two layouts of scales."""
    low_dispatch: bool = True
    """Tokens go to experts in the layers' dtype, else in bf16."""
    routed_bytes: float = 0.0
    """Bytes that a forward moves for each routed token's hidden element beyond the usual (biases of experts)."""
    copies: bool = False
    """Tokens are sent once for each of their experts (NCCL's all-to-all), not once for each rank or node."""
    fitted_on: tuple[str, ...] = ()
    """Devices of the published rows that `overhead` was fitted to; none: it is the nearest relative's, or assumed."""

    def graphed(self, device: str) -> float:
        return 0.0 if device in self.launched_on else self.graphs


@lru_cache
def stacks() -> dict[str, Stack]:
    values = yaml.safe_load((conf_dir() / "stacks.yaml").read_text())
    return {name: from_dict(Stack, {"name": name, **(entry or {})}, f"stack {name}.") for name, entry in values.items()}


def stack_named(name: str) -> Stack:
    known = stacks()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise BadRequest(f"stack={name}: no such software stack{f'; did you mean {near[0]}?' if near else ''}; known "
                         f"are {', '.join(known)}")
    return known[name]
