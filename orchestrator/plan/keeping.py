"""What a training program keeps in a device's memory, in bytes per element: this one, and those that others run.

Nothing about time. `PLANNED` is what a layout is priced with; `own` is what `train` does (FSDP2 without resharding,
autocast), and decides whether it can run it; `MEGATRON` is Megatron-Core with Transformer Engine, whose published peaks
`benchmarks/validate_memory.py` holds the model against.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Keeping:
    """Bytes per parameter, per element of an activation, per logit; and what is kept at all."""

    weight: float
    """Of a parameter as the products read it, whole over the data-parallel ranks (sharded with ZeRO stage 3)."""
    cast: float = 0
    """Beside it, of a parameter that a product reads, on every rank."""
    head_cast: float = 0
    """The same of a head's and an MTP projection's."""
    gradient: float = 4
    """Whole until it is reduced; sharded from ZeRO stage 2 on."""
    master: float = 4
    """fp32, sharded from ZeRO stage 1 on."""
    moments: float = 8
    master_is_weight: bool = False
    """Without replicas the working copy is the master, and there is no second one."""
    element: float = 2
    """Of an activation."""
    logit: float = 6
    """At the peak of the loss, by the first head."""
    logit_kept: float = 4
    """From a head's loss to its backward, for the log-probabilities."""
    sequence_parallel: bool = True
    """Tensor-parallel ranks share the residual stream too."""
    flash: bool = True
    """The attention core keeps no score matrix."""
    dropout: bool = False
    """A mask of one byte at both residual branches, and over the score matrix."""
    fp8_more: bool = False
    """With FP8 products, SwiGLU's inputs are kept in FP8 too, and attention's output in twelve bits."""
    eager: bool = False
    """As torch's autograd, FSDP2 and pipelining do unless told otherwise: gradients are made by a stage's first
    backward of a step and reduced as copies; a stage's output is kept until its backward; from a backward's input part
    to its weight part, gradients of every product's and norm's output are kept; MTP modules have their copy of the
    embedding beside the embedding itself too."""
    gathers_tokens: bool = False
    """Expert-parallel ranks gather each other's tokens whole, rather than exchange rows."""
    padded_values: bool = False
    """The attention kernel wants values as wide as keys (a CPU's does)."""
    framework_gib: float = 3.6
    """Device context and libraries 3.5 GB, and about 0.37 of collectives' own buffers (aiconfigurator's tables)."""


PLANNED = Keeping(weight=2, moments=4, fp8_more=True, logit_kept=0)
"""What the V3 report keeps (section 3.3.3): bf16 weights and moments, fp32 gradients and masters, SwiGLU's inputs in
FP8 beside FP8 products; routing weights applied before the experts' second product, and a fused loss."""

SPARING = Keeping(weight=4, cast=2, head_cast=2, master_is_weight=True, eager=True)
"""fp32 gathered over the replicas, and bf16 casts of what products read, made once a step."""


def own(dtype: str, *, cpu: bool = False) -> Keeping:
    """What `train precision=DTYPE` keeps: fp32, bf16 or fp8, which is beside fp32 on a CPU, where nothing but tensors
    is counted and the attention kernel wants values as wide as keys."""
    fp32 = replace(SPARING, cast=0, head_cast=0, element=4)
    kept = {"fp32": fp32, "bf16": SPARING}.get(dtype)
    if dtype == "fp8":  # moments as conf/precision/fp8.yaml has them; tensor cores want a weight in two layouts
        kept = replace(fp32, cast=1, moments=4) if cpu else replace(SPARING, moments=4)
    return replace(kept, padded_values=True, framework_gib=0.0) if cpu else kept


MEGATRON = Keeping(weight=2, framework_gib=0.0)
"""What torch's allocator sees of Megatron-Core: bf16 weights and logits, an fp32 copy of the logits."""
