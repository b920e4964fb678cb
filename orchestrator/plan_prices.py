"""`sparing plan prices`: published API prices beside what serving DeepSeek-V3 costs by its published throughput."""

from orchestrator.plan.published import published, serving_cost

NOTE = """\
Dollars per million tokens. Prices are offers, costs are device-hours at the price named and nothing else: no idle
fleet, staff, research or margin. A cost holds for its own traffic (lengths, cache hits); its input counts tokens from
the cache too."""


def print_prices() -> None:
    from rich.console import Console
    from rich.table import Table

    console, data = Console(highlight=False, soft_wrap=True), published()
    console.width = max(130, console.width) if console.is_terminal else 130
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
