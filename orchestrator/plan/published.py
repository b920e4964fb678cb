"""What others published: training budgets, API prices, DeepSeek's own serving; and what serving costs per token.

Figures live in conf/published.yaml, each with its source and whether it is a disclosure or an estimate.
"""

from pathlib import Path

import yaml

from orchestrator.config import conf_dir


def published(folder: Path | None = None) -> dict[str, list[dict]]:
    """`budgets`, `api_prices` and `serving`."""
    return yaml.safe_load(((folder or conf_dir()) / "published.yaml").read_text())


def gap(hours: float, flops: float, peak: float) -> dict[str, float]:
    """Why one run took `hours` times another's device-hours: so many times the FLOPs, on chips whose peak is `peak`
    times lower, and the rest, utilisation. It closes by construction."""
    return {"hours": hours, "flops": flops, "peak": peak, "utilisation": hours / flops / peak}


def serving_cost(*, usd_per_h: float, devices: int, input_tokens_per_s: float = 0.0,
                 output_tokens_per_s: float = 0.0) -> dict[str, float | None]:
    """Dollars per million tokens of devices at this price, busy all the time; None where a rate is 0.

    `input` and `output` each charge the devices to that kind of token alone: right where prefill and decode run on
    devices of their own (give each its own call), an upper bound where they share. `any` charges all tokens alike.
    Raises ValueError for a negative rate or price.
    """
    if min(usd_per_h, devices, input_tokens_per_s, output_tokens_per_s) < 0:
        raise ValueError("serving_cost: a price, a number of devices or a rate is negative; all must be at least 0")
    usd_per_s = usd_per_h * devices / 3600

    def per_million(rate: float) -> float | None:
        return usd_per_s / rate * 1e6 if rate else None

    return {"input": per_million(input_tokens_per_s), "output": per_million(output_tokens_per_s),
            "any": per_million(input_tokens_per_s + output_tokens_per_s)}
