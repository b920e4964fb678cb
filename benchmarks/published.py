"""Published runs as workloads: what each row of benchmarks/data/throughput.csv says, and what its source leaves unsaid.

Columns: set, id, source, model, layers, hidden, ffn, heads, kv_heads, vocab, seq_len, experts, topk, gpu, num_gpus, tp,
pp, vpp, ep, cp, dp, micro_batch, global_batch, precision, recompute, metric, value, notes. Empty is unknown, not zero.
Shapes that a source names but does not print are those of the released model, or of the framework's own recipe.
"""

import csv
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from model import count
from model.config import Attention, ModelConfig
from orchestrator.compose import compose_config
from orchestrator.config import HardwareConfig, Recompute, conf_dir
from orchestrator.plan.cost import model_flops
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.stack import Stack, stack_named, stacks
from orchestrator.plan.workload import Workload

DATA = Path(__file__).parent / "data"
HARDWARE = {"H100-SXM": "h100", "A100-SXM": "a100", "A100-80GB-SXM": "a100", "A100-40GB-SXM": "a100_40",
            "B200-SXM": "b200", "B200": "b200", "H800-SXM": "h800", "H200": "h200", "GB200": "gb200", "GB300": "gb300",
            "B300": "b300", "MI325X": "mi325x", "MI355X": "mi355x", "H100-96GB-HBM2e-500W": "h100",
            "GH200-96GB": "h100"}
SHIPPED = {"DeepSeekV3": "deepseek_v3", "DeepSeek-V3": "deepseek_v3", "Qwen3_30B_a3B": "qwen3_30b_a3b",
           "Qwen3_235B_a22B": "qwen3_235b_a22b", "Kimi_K2": "kimi_k2", "deepseekv2": "deepseek_v2",
           "deepseekv3": "deepseek_v3", "llama3_70b": "llama_3_1_70b", "llama3_405b": "llama_3_1_405b",
           "LLAMA2-7B": "llama_2_7b", "LLAMA2-70B": "llama_2_70b", "Llama2-7B": "llama_2_7b",
           "Llama2-70B": "llama_2_70b", "Mixtral-8x22B": "mixtral_8x22b"}
DIMS = {"GPT3-5B": (24, 4096, 16384, 32, 32, 51200), "GPT3-20B": (44, 6144, 24576, 48, 48, 51200),
        "Nemotron-8B": (32, 4096, 16384, 32, 32, 256000), "Nemotron-22B": (40, 6144, 24576, 48, 48, 256000),
        "Nemotron-340B": (96, 18432, 73728, 96, 8, 256000), "Nemotron4-340B": (96, 18432, 73728, 96, 8, 256000),
        "Nemotron4-15B": (32, 6144, 24576, 48, 8, 256000), "LLAMA2-13B": (40, 5120, 13824, 40, 40, 32000),
        "Llama2-13B": (40, 5120, 13824, 40, 40, 32000), "Llama2-34B": (48, 8192, 22016, 64, 8, 32000),
        "GPT-Neo-2.7B": (32, 2560, 10240, 20, 20, 50257), "OPT-350M": (24, 1024, 4096, 16, 16, 50272)}
"""Layers, hidden, ffn, heads, key-value heads, vocabulary."""
HYBRID = ("Nemotron_3_", "Nemotron-H-")
STACKS = {"mosaic": "composer", "vtrainm": "megatron_deepspeed", "sailor": "megatron_deepspeed",
          "mlm21t1": "megatron_2021", "mlm21t2": "megatron_2021", "korth22": "megatron_2022",
          "dgxc2411": "nemo_24", "nemo2407": "nemo_24", "dgxc2504": "nemo_25", "dgxc2505": "nemo_25",
          "nemocp": "nemo_25", "simumax": "megatron_core_014", "titan": "torchtitan", "fmsfsdp": "fms_fsdp",
          "primus": "primus", "dsv3": "deepseek"}
STACK_WORDS = {"automodel": "default", "llm-foundry|composer": "composer", "torchtitan": "torchtitan",
               "fms-fsdp": "fms_fsdp", "maxtext": "maxtext", "primus": "primus",
               r"nemo\D*24\.|24\.\d\d nemo": "nemo_24", "nemo": "nemo_25",
               "megatron-deepspeed|bigscience": "megatron_deepspeed", "megatron": "megatron_core_014"}
GRAPHED = {"full": 1.0, "attn": 0.3, "moe_router": 0.2, "moe_preprocess": 0.1}
"""Share of an MoE block's launches that a recipe's CUDA graphs cover."""
OVERLAPPED = 0.5
"""Share of the experts' exchange that runs beside another microbatch where a recipe overlaps it."""
ROWWISE = 0.8
"""Rate of FP8 products with row-wise scales against tensor-wise ones, casts included: torchao's README has Llama 3 8B
on 8 H100 25% faster than bf16 with tensor-wise scales, 10% with row-wise ones; products are 0.6 of bf16's time."""
GPT_OSS, GPT_OSS_WINDOW = "GPT OSS 120B", 128
"""Every other of its layers has a sliding window; its experts have biases."""
BIAS_BYTES = 28
"""Megatron adds the second product's bias times the router's fp32 weights, concatenates in fp32, and casts
(moe/experts.py, _apply_bias): written 4; read 6, written 4; read 4, written 4; read 4, written 2."""
GATED = re.compile(r"llama|grok|mixtral|qwen|deepseek", re.IGNORECASE)


class CannotPredict(Exception):
    pass


def read(name: str | Path = "throughput.csv") -> list[dict]:
    with open(DATA / name) as file:
        return list(csv.DictReader(file))


def number(row: dict, key: str, default: int | None = None) -> int:
    if row[key] == "":
        if default is None:
            raise CannotPredict(f"{key} is unknown")
        return default
    return int(float(row[key]))


@lru_cache
def shipped(name: str) -> ModelConfig:
    return compose_config([f"model={name}"]).model


@lru_cache
def shipped_names() -> dict[str, str]:
    return {_plain(file.stem): file.stem for file in (conf_dir() / "model").glob("*.yaml")}


def _plain(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


@lru_cache
def devices() -> dict[str, HardwareConfig]:
    return catalogue()


def hardware(row: dict) -> HardwareConfig:
    """The catalogue's entry, with what the row's source says of its own machine."""
    name = HARDWARE.get(row["gpu"]) or max((name for name in devices() if _plain(row["gpu"]).startswith(_plain(name))),
                                           key=len, default=None)
    if name is None:
        raise CannotPredict(f"no data sheet for {row['gpu']}")
    found = devices()[name]
    if "rowwise" in row["precision"]:
        found = replace(found, fp8_best_tflops=found.fp8_best_tflops * ROWWISE)
    if row["gpu"].startswith("H100-96GB"):
        slower = (500 / 700) ** (1 / 3)  # a 500 W cap: power goes with the cube of the clock
        return replace(found, memory_gb_per_s=2400, gemm_share=found.gemm_share * slower,
                       attention_share=found.attention_share * slower)
    if row["gpu"].startswith("GH200"):
        return replace(found, memory_gb_per_s=4000, scale_up_devices=4, scale_out_gb_per_s=25)
    if row["gpu"] == "MI355X":
        return replace(found, scale_up_gb_per_s=538)
    if network := re.search(r"network ([\d.]+) GB/s a GPU", row["notes"]):
        found = replace(found, scale_out_gb_per_s=float(network[1]))
    if node := re.search(r"(\d+) GPUs a node", row["notes"]):
        found = replace(found, scale_up_devices=int(node[1]))
    if row["id"].startswith("vtrainm"):
        return replace(found, scale_out_gb_per_s=12.5)
    return found


def shape(row: dict) -> ModelConfig:
    name, _, remark = row["model"].partition(" (")
    if name.startswith(HYBRID):
        raise CannotPredict("a hybrid of attention and state-space layers")
    if name in SHIPPED or _plain(name) in shipped_names():
        return _cut(shipped(SHIPPED.get(name) or shipped_names()[_plain(name)]), remark)
    if name == GPT_OSS:
        return _model(36, 2880, 2880, 64, 8, 201088, head_dim=64, experts=128, top_k=4)
    if name in DIMS:
        layers, dim, ffn, heads, kv_heads, vocab = DIMS[name]
        return _model(number(row, "layers", layers), dim, _gated(row, ffn), heads, kv_heads, vocab)
    default_vocab = {"vtrainm": 50304, "mcorerel": 131072}.get(prefix(row), 131072 if row["experts"] else 256000)
    heads = number(row, "heads")
    return _model(number(row, "layers"), number(row, "hidden"), _gated(row, number(row, "ffn")), heads,
                  number(row, "kv_heads", heads), number(row, "vocab", default_vocab),
                  experts=number(row, "experts", 0), top_k=number(row, "topk", 0),
                  tied=row["model"][:3] in ("GPT", "MPT"))


def _cut(model: ModelConfig, remark: str) -> ModelConfig:
    """`w/o MTP`, or the first layers of a model; SimuMax's four-layer V2 and V3 have one dense layer (their memory)."""
    if "w/o MTP" in remark:
        return replace(model, n_mtp_layers=0)
    if remark.endswith("layers)"):
        layers = int(remark.split()[0])
        dense = 1 if model.n_routed_experts else layers
        return replace(model, n_layers=layers, n_dense_layers=dense, n_mtp_layers=0)
    return model


def _gated(row: dict, ffn: int) -> int:
    """A feed-forward of two matrices has as many parameters as a gated one of two thirds of its inner size."""
    return ffn if GATED.search(row["model"]) else ffn * 2 // 3


def _model(layers: int, dim: int, ffn: int, heads: int, kv_heads: int, vocab: int, *, head_dim: int = 0,
           experts: int = 0, top_k: int = 0, tied: bool = False) -> ModelConfig:
    return ModelConfig(vocab_size=vocab, dim=dim, n_layers=layers, n_dense_layers=0 if experts else layers,
                       n_heads=heads, inter_dim=ffn, attention=Attention.gqa, n_kv_heads=kv_heads,
                       head_dim=head_dim or dim // heads, n_routed_experts=experts, n_shared_experts=0,
                       n_activated_experts=top_k, moe_inter_dim=ffn if experts else 0, expert_bias=False,
                       tie_embeddings=tied)


def prefix(row: dict) -> str:
    return row["id"].rsplit("-", 1)[0]


def stack_name(row: dict) -> str:
    if prefix(row) == "mbridge":
        release = re.search(r"container (\d+\.\d+)", row["notes"]).group(1)
        return "megatron_bridge_" + release.replace(".", "")
    if prefix(row) == "gb200dsv3":
        step = int(row["id"].rsplit("-", 1)[1])
        return "megatron_gb200_" + ("alltoall" if step < 4 else "deepep" if step < 6 else "graphs" if step < 11
                                    else "hybridep")
    if "ZeRO-3 without" in row["notes"]:
        return "deepspeed_zero3"
    if "async TP" in row["notes"]:
        return "torchtitan_async_tp"
    if "MaxText" in row["model"]:
        return "maxtext"
    return STACKS.get(prefix(row)) or stack_by_words(f"{row['source']} {row['notes']}")


def stack_by_words(said: str) -> str:
    """Of a source that no row here is from: the stack it names, of Megatron-Bridge's the nearest release."""
    release = re.search(r"Megatron-Bridge.*?\b(2\d)\.(\d\d)", said)
    if release:
        months = 12 * int(release[1]) + int(release[2])
        known = [name for name in stacks() if name.startswith("megatron_bridge_")]
        return min(known, key=lambda name: abs(12 * int(name[-4:-2]) + int(name[-2:]) - months))
    return next((name for word, name in STACK_WORDS.items() if re.search(word, said, re.IGNORECASE)), "default")


@lru_cache
def recipes() -> dict[str, dict]:
    """What Megatron-Bridge's own recipe says of a row, by the row's id: that of its release's tag (scripts/performance)
    or, where only another release has this very layout, of the nearest; `layout` is `nearest` where none has."""
    return {row["id"]: row for row in read("recipes.csv")}


def stack(row: dict) -> Stack:
    """The row's stack, with what its recipe says of CUDA graphs and of the experts' exchange."""
    found = stack_named(stack_name(row))
    if "DeepEP" in row["notes"]:
        found = replace(found, copies=False)
    recipe = recipes().get(row["id"])
    if not recipe:
        return found
    graphs = sum(GRAPHED[scope] for scope in recipe["graphs"].split())
    return replace(found, graphs=graphs, copies=recipe["dispatcher"] == "alltoall",
                   exchange_hidden=OVERLAPPED if recipe["overlap"] else 0.0,
                   routed_bytes=BIAS_BYTES if row["model"] == GPT_OSS else 0.0)


def zero_stage(row: dict) -> int:
    notes = row["notes"]
    if "FULL_SHARD" in notes or "FSDP group" in notes or "FSDP yes" in notes or "ZeRO-3" in notes:
        return 3
    if "SHARD_GRAD_OP" in notes:
        return 2
    return {"vtrainm": 0, "mlm21t1": 0, "sailor": 0, "titan": 3, "fmsfsdp": 3}.get(
        prefix(row), 3 if "MaxText" in row["model"] or "torchtitan" in row["source"] else 1)


def full_layout(row: dict) -> bool:
    return all(row[key] for key in ("num_gpus", "tp", "pp", "dp", "micro_batch", "global_batch"))


def workload(row: dict) -> Workload:
    """Raises CannotPredict with what is missing."""
    model, device = shape(row), hardware(row)
    tp, cp, precision = number(row, "tp", 1), number(row, "cp", 1), row["precision"]
    if not precision:
        raise CannotPredict("precision is unknown")
    dtype = "fp4" if "fp4" in precision else "fp8" if "fp8" in precision or "float8" in precision else "bf16"
    pp, dp = number(row, "pp", 1), number(row, "dp")
    vpp = number(row, "vpp", 12 if "v25.05 README says 12" in row["notes"] else 1)
    size = number(row, "micro_batch", 1 if prefix(row) == "nemocp" else None)
    batch = number(row, "global_batch", dp * size * 8 * pp if prefix(row) == "primus" else None)
    microbatches = batch // (dp * size)
    if microbatches < 1:
        raise CannotPredict("batch is smaller than dp x microbatch")
    software, schedule = stack(row), "1f1b"
    while pp * vpp > model.n_layers + 2 and vpp > 1:  # embedding and head may have stages of their own
        vpp //= 2
    if pp > 1 and software.name == "deepseek":
        schedule = "dualpipe"
    elif pp > 1 and vpp > 1:
        schedule = "interleaved_1f1b"
    recompute = next((r for r in Recompute if row["recompute"].startswith(r.name)), Recompute.none)
    if "mla_up_proj" in recipes().get(row["id"], {}).get("recompute", ""):
        recompute = Recompute.selective
    etp = int(re.search(r"ETP (\d+)", row["notes"]).group(1)) if "ETP" in row["notes"] else (
        tp if "Grok" in row["model"] else 1)
    seq_len = number(row, "seq_len", {"titan": 8192, "fmsfsdp": 4096, "simumax": 4096, "sailor": 2048}.get(prefix(row)))
    attended = 0.5 + 0.5 * min(1.0, 2 * GPT_OSS_WINDOW / seq_len) if row["model"] == GPT_OSS else 1.0
    return Workload(model, device, seq_len, batch, pp, dp, number(row, "ep", 1), schedule, microbatches,
                    stages_per_rank=vpp, recompute=recompute, tp=tp, cp=cp, dtype=dtype, etp=etp,
                    zero=zero_stage(row), attended=attended,
                    even_stages=schedule != "dualpipe", stack=software)


def published_s(row: dict, work: Workload) -> float:
    """The row's figure as seconds a step."""
    value, tokens = float(row["value"]), work.batch_size * work.seq_len
    metric = row["metric"]
    if metric == "iter_time_s":
        return value
    if metric == "tokens_per_s_per_gpu":
        return tokens / (value * work.devices)
    if metric == "model_tflops_per_gpu":
        return model_flops(work.model, tokens, work.seq_len) / (value * 1e12 * work.devices)
    if metric == "hw_tflops_per_gpu":
        again = 4 / 3 if work.recompute is Recompute.full else 1
        flops = tokens * count.training_flops(work.model, work.seq_len, causal=False) * again
        return flops / (value * 1e12 * work.devices)
    raise CannotPredict(f"metric {metric}")
