"""`sparing plan prices`: published API prices beside what serving DeepSeek-V3 costs by its published throughput.
`sparing plan budgets`: published training budgets, and where the gap to DeepSeek-V3's comes from."""

from model import count
from orchestrator.compose import compose_config
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.published import gap, published, serving_cost
from orchestrator.plan_format import console as console_of
from orchestrator.plan_format import usd_range

V3_TOKENS, LLAMA_TOKENS = 14.8e12, 15.6e12

NOTE = """\
Dollars per million tokens. Prices are offers, costs are device-hours at the price named and nothing else: no idle
fleet, staff, research or margin. A cost holds for its own traffic (lengths, cache hits); its input counts tokens from
the cache too."""


def print_prices() -> None:
    from rich.table import Table

    console, data = console_of(width=130), published()
    table = Table("price or cost", "cached", "input", "output", "source", "date", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in data["api_prices"]:
        table.add_row(f"{row['name']} API", *(_usd(row.get(key)) for key in ("cached", "input", "output")),
                      row["source"], row["date"])
    table.add_section()
    for row in serving_rows(data["serving"]):
        table.add_row(row["name"], "", _usd(row["input"]), _usd(row["output"]), row["source"], row["date"])
    console.print(table)
    console.print(f"\n{NOTE}")
    prices = {row["name"]: row for row in data["api_prices"]}
    for cheap, dear in (("DeepSeek-R1", "OpenAI o1"), ("DeepSeek-V3", "GPT-4o")):
        if cheap in prices and dear in prices:
            lower = (1 - prices[cheap][key] / prices[dear][key] for key in ("input", "output"))
            console.print("{} over {}: {:.1%} lower for input, {:.1%} for output".format(cheap, dear, *lower))


def print_budgets() -> None:
    from rich.table import Table

    console, rows = console_of(), published()["budgets"]
    table = Table("run", "kind", "devices", "device-hours", "FLOPs", "USD", "source", "date", box=None, pad_edge=False)
    for column in table.columns[2:6]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        devices = f"{row['devices']:,} {row['device']}" if "devices" in row else row.get("device", "")
        table.add_row(row["name"], row["kind"], devices, f"{row['gpu_hours']:,}" if "gpu_hours" in row else "-",
                      f"{row['flops']:.3g}" if "flops" in row else "-",
                      usd_range(sorted(row["usd"])) if "usd" in row else "-",
                      row["source"], row["date"])
    console.print(table)
    console.print()
    for line in gap_lines(rows):
        console.print(line)


def gap_lines(budgets: list[dict]) -> list[str]:
    """Device-hours of GPT-4 and Llama 3.1 405B over those of DeepSeek-V3's pre-training, taken apart."""
    devices, own = catalogue(), next(row for row in budgets if "pre_training_gpu_hours" in row)
    model, llama = (compose_config([f"model={name}"]).model for name in ("deepseek_v3", "llama_3_1_405b"))
    own_flops = count.training_flops(model, 4096) * V3_TOKENS
    llama_flops = count.training_flops(llama, 8192) * LLAMA_TOKENS
    lines = []
    for name, kind, flops in (("GPT-4", "estimate", None), ("Llama 3.1 405B", "disclosure", llama_flops)):
        row = next(row for row in budgets if row["name"] == name and row["kind"] == kind)
        found = gap(row["gpu_hours"] / own["pre_training_gpu_hours"], (flops or row["flops"]) / own_flops,
                    devices[own["device"].lower()].bf16_tflops / devices[row["device"].lower()].bf16_tflops)
        lines.append("{} ({}) over {}'s pre-training ({:.3g} FLOPs): {:.1f} x the device-hours = {:.1f} x the FLOPs, "
                     "{:.2f} x by the chip's bf16 peak, {:.2f} x by utilisation (what remains)".format(
                         name, kind, own["name"], own_flops, *found.values()))
    return lines


def serving_rows(days: list[dict]) -> list[dict]:
    """Of each published serving record: prefill and decode nodes on their own, and the whole fleet by output alone."""
    rows = []
    for day in days:
        each = {"source": day["source"], "date": day["date"]}
        at = f"{day['device']} at ${day['usd_per_h']:g}/h"
        node = serving_cost(usd_per_h=day["usd_per_h"], devices=day["devices_per_node"],
                            input_tokens_per_s=day["node_input_tokens_per_s"],
                            output_tokens_per_s=day["node_output_tokens_per_s"])
        rows.append(each | {"name": f"{day['name']}, cost, {at}", "input": node["input"], "output": node["output"]})
        if "nodes" in day:
            fleet = serving_cost(usd_per_h=day["usd_per_h"], devices=day["nodes"] * day["devices_per_node"],
                                 output_tokens_per_s=day["output_tokens"] / 86400)
            rows.append(each | {"name": "the same, whole fleet charged to output", "input": None,
                                "output": fleet["output"]})
    return rows


def _usd(value: float | None) -> str:
    return "-" if value is None else f"${value:,.3f}" if value < 1 else f"${value:,.2f}"
