"""The planner's memory held against what others measured: the peaks of Megatron-LM's own functional tests.

    python benchmarks/validate_memory.py [--rows]

Each row of `data/memory.csv` is a test: its layout, and what torch's allocator held after a step (`mem_allocated_gib`)
and at most (`mem_max_allocated_gib`) on the last rank, which is the one that writes. `data/megatron_flags.csv` adds
what that table leaves out, read from the same test's model_config.yaml at the commit that recorded its peak. One offset
per GPU type and container (the library workspaces of each) is taken from every other test case, set=fit; the rest are
set=check. A row the model cannot express is listed with why.
"""

import argparse
import csv
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from model.config import Attention, ModelConfig
from orchestrator.config import Recompute
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.keeping import MEGATRON, Keeping
from orchestrator.plan.memory import rank_memory_gib
from orchestrator.plan.workload import Workload

DATA = Path(__file__).parent / "data"
STATE = ("weights", "gradients", "masters", "moments")
NOT_MODELLED = {
    "hybrid": "Mamba blocks", "rl": "reinforcement learning with an inference engine", "muon": "the Muon optimizer",
    "fsdp": "Megatron-FSDP's own buffers", "fp4": "NVFP4", "offload": "activations offloaded",
    "cudagraph": "CUDA graphs' own pools", "op_fuser": "Transformer Engine's fused operators",
    "fp8_params": "parameters kept in FP8", "account_embedding": "a split of layers that counts the embedding as one",
    "uneven": "a hand-made split of layers", "rerun": "reruns that keep a second copy", "squared_relu": "squared ReLU",
    "fused_loss": "a fused loss whose copies of the logits differ between releases",
    "defer_wgrad": "gradients of the head's weight deferred", "instances": "optimizer state of groups of replicas",
    "a2a_overlap": "two microbatches' expert layers interleaved"}


class CannotModel(Exception):
    pass


def number(row: dict, key: str, default: int | None = None) -> int:
    if not row.get(key):
        if default is None:
            raise CannotModel(f"{key} is unknown")
        return default
    return int(float(row[key]))


def shape(row: dict) -> ModelConfig:
    """A GELU network of width f has the parameters and keeps the elements of a SwiGLU one of 2/3 f."""
    dim, heads, layers = number(row, "hidden"), number(row, "heads"), number(row, "layers")
    head_dim = number(row, "kv_channels", dim // heads)
    gated, multiple = row["gated"] == "1", number(row, "vocab_multiple", 128) * number(row, "tp")
    width = number(row, "ffn", 4 * dim * 2 // 3 // 64 * 64 if gated else 4 * dim)
    expert = number(row, "moe_ffn", width) if row["experts"] else 0
    shared = number(row, "shared_ffn", 0)
    dense = _dense_layers(row, layers)
    mla = row["mla"] == "True"
    return ModelConfig(
        vocab_size=-(-number(row, "tokenizer") // multiple) * multiple, dim=dim, n_layers=layers, n_dense_layers=dense,
        n_heads=heads, inter_dim=width if gated else width * 2 // 3, head_dim=head_dim,
        attention=Attention.mla if mla else Attention.gqa, n_kv_heads=number(row, "query_groups", heads),
        q_lora_rank=number(row, "q_lora", 0), kv_lora_rank=number(row, "kv_lora", 0), qk_nope_head_dim=128 * mla,
        qk_rope_head_dim=number(row, "qk_rope", 64) * mla, v_head_dim=128 * mla,
        n_routed_experts=number(row, "experts", 0), n_activated_experts=number(row, "topk", 0),
        n_shared_experts=1 if shared else 0, moe_inter_dim=expert if gated else expert * 2 // 3,
        tie_embeddings=row["untied"] != "1", n_mtp_layers=number(row, "mtp", 0))


def _dense_layers(row: dict, layers: int) -> int:
    if not row["experts"]:
        return layers
    found = re.match(r"\(\[0\]\*(\d+)\+\[1\]", row["moe_freq"])
    return int(found[1]) if found else 0


def workload(row: dict) -> Workload:
    for word in row["special"].split():
        if word in NOT_MODELLED:
            raise CannotModel(NOT_MODELLED[word])
    if row["fsdp"] == "True":
        raise CannotModel(NOT_MODELLED["fsdp"])
    tp, pp, cp = (number(row, key, 1) for key in ("tp", "pp", "cp"))
    etp = number(row, "etp", tp)
    model = shape(row)
    distributed = row["dist_optimizer"] == "True"
    if "release" in row["case"] and not row["num_gpus"]:
        raise CannotModel("the number of GPUs is unknown")
    devices = number(row, "num_gpus", 8)
    dp, ep = devices // (tp * pp * cp), number(row, "ep", 1)
    if dp < 1:
        raise CannotModel("the layout has more ranks than GPUs")
    micro = number(row, "global_batch") // (dp * number(row, "micro_batch"))
    schedule, stages = "1f1b", 1
    if row["num_layers_per_vstage"] or row["stages"]:
        stages = number(row, "stages", 0) or model.n_layers // pp // number(row, "num_layers_per_vstage")
        schedule = "interleaved_1f1b"
    if pp > 1 and (micro < pp or (schedule != "1f1b" and micro % pp)):
        raise CannotModel("schedule that torch does not offer")
    if pp * stages > model.n_layers:
        raise CannotModel("fewer layers than stages")
    recompute = Recompute[row["recompute_granularity"] or "none"]
    return Workload(model, catalogue()["h100"], number(row, "seq_len"), number(row, "global_batch"), pp, dp,
                    ep, schedule, micro, stages_per_rank=stages, recompute=recompute, tp=tp, cp=cp,
                    etp=etp if model.n_routed_experts else 1, zero=int(distributed), even_stages=True,
                    dtype="fp8" if row["fp8"] else "bf16", keeping=_keeping(row))


def _keeping(row: dict) -> Keeping:
    """Until 2025 the containers called lts had a Transformer Engine without a deterministic fused attention."""
    old = "lts" in row["platform"] and row["date"] < "2025-11" and row["deterministic"] == "1"
    local = row["transformer_impl"] == "local"
    unfused = row["attention"] == "unfused" or local or (row["attention"] == "" and old)
    return Keeping(**(vars(MEGATRON) | {
        "flash": not unfused, "dropout": row["dropout"] == "1", "gathers_tokens": row["dispatcher"] == "allgather",
        "sequence_parallel": row["sequence_parallel"] == "True"}))


def platform(row: dict) -> str:
    gpu = next((name for name in ("a100", "h100", "gb200") if name in row["platform"]), "a100")
    return f"{gpu} {'lts' if 'lts' in row['platform'] else 'dev'}"


def predict(row: dict) -> tuple[float, float]:
    """GiB on the last pipeline rank: of state, and at the peak."""
    parts = rank_memory_gib(workload(row))[-1]
    return sum(parts[name] for name in STATE), parts["total"]


def read() -> list[dict]:
    with open(DATA / "megatron_flags.csv") as file:
        flags = {row["id"]: row for row in csv.DictReader(file)}
    with open(DATA / "memory.csv") as file:
        rows = [row | flags[row["id"]] for row in csv.DictReader(file) if row["id"] in flags]
    cases = sorted({row["case"] for row in rows})
    for row in rows:
        row["set"] = "check" if cases.index(row["case"]) % 2 else "fit"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="print every row")
    args = parser.parse_args()
    rows, known, reasons = read(), [], Counter()
    for row in rows:
        try:
            known.append((row, *predict(row)))
        except (CannotModel, ValueError) as error:
            reasons[str(error)] += 1
    rest = defaultdict(list)
    for row, state, _ in known:
        if row["set"] == "fit":
            rest[platform(row)].append(float(row["mem_allocated_gib"]) - state)
    offsets = {name: statistics.median(values) for name, values in rest.items()}
    groups = defaultdict(list)
    for row, state, peak in known:
        offset = offsets.get(platform(row), 0.0)
        held, most = float(row["mem_allocated_gib"]), float(row["mem_max_allocated_gib"])
        errors = (state + offset) / held - 1, (peak + offset) / most - 1
        for group in ("all", "MoE" if row["experts"] else "dense", f"pp {row['pp']}", platform(row), f"tp {row['tp']}",
                      row["recompute_granularity"] or "no recompute", "largest 30" if most > 5 else "below 5 GiB"):
            groups[row["set"], group].append(errors)
        if args.rows:
            print(f"{row['set']:5s} {row['id']} {row['case'][:70]:70s} {row['platform'][:14]:14s} state "
                  f"{state + offset:7.3f} of {held:7.3f} ({errors[0]:+6.1%})  peak {peak + offset:7.3f} of {most:7.3f} "
                  f"({errors[1]:+6.1%})")
    print("offsets   " + ", ".join(f"{name} {value * 1024:.0f} MiB" for name, value in sorted(offsets.items())))
    print(f"{len(known)} of {len(rows)} rows modelled; mean absolute (and signed) error of the state and of the peak")
    for (which, group), errors in sorted(groups.items()):
        state, peak = zip(*errors, strict=True)
        print(f"{which:5s} {group:18s} {len(errors):4d} rows  state {_shown(state)}  peak {_shown(peak)}")
    print("not modelled:")
    for reason, times in reasons.most_common():
        print(f"{times:5d} rows: {reason}")


def _shown(errors: tuple[float, ...]) -> str:
    return f"{statistics.mean(map(abs, errors)):6.1%} ({statistics.mean(errors):+6.1%})"


if __name__ == "__main__":
    main()
