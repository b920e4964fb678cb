"""How much a dense model of the same loss would take, by the published scaling laws that speak of experts.

Each law is evaluated as printed, with the range it was fitted on; outside it the figure is marked. They disagree by
more than a factor of two at DeepSeek-V3's size: show the range, never one of them.
"""

import math

JOINT = {"a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
         "zeta": -0.0259, "start": 2.0732, "max": 290.4521, "c": 1.3637}
"""Table 3 of arXiv 2502.05172 (joint MoE scaling laws): N counts active parameters, one expert of E is active."""
LEVERAGE = {"a": 1.23, "d": -7.61e-2, "gamma": 1.67e-2, "beta": -1.17e-1, "start": 1.63e-2, "max": 5.28e16}
"""Table 2 of arXiv 2507.17702 (efficiency leverage): A is the active share of the experts, G their granularity."""


def joint_law(experts: float) -> dict[str, float]:
    """L = m N^mu + n D^nu + c for this number of experts; table 4 of arXiv 2502.05172."""
    law = JOINT
    hat = _saturating(experts, law["start"], law["max"])
    return {"m": law["a"] * hat ** law["delta"], "mu": law["alpha"] + law["gamma"] * math.log(hat),
            "n": law["b"] * hat ** law["omega"], "nu": law["beta"] + law["zeta"] * math.log(hat), "c": law["c"]}


def joint_optimum(experts: float, flops: float) -> tuple[float, float, float]:
    """(active parameters, tokens, loss) of the compute-optimal model, with 6 N D = flops."""
    law = joint_law(experts)
    product = flops / 6
    # d/dN of m N^mu + n (product / N)^nu is zero where m mu N^mu = n nu D^nu
    ratio = law["n"] * law["nu"] * product ** law["nu"] / (law["m"] * law["mu"])
    parameters = ratio ** (1 / (law["mu"] + law["nu"]))
    tokens = product / parameters
    return parameters, tokens, law["m"] * parameters ** law["mu"] + law["n"] * tokens ** law["nu"] + law["c"]


def joint_multiplier(experts: float, flops: float) -> float:
    """FLOPs of the dense model over those of the mixture at equal loss, both compute-optimal."""
    target = joint_optimum(experts, flops)[2]
    low, high = math.log(flops) - 5, math.log(flops) + 10
    for _ in range(80):  # the loss falls with compute
        middle = (low + high) / 2
        low, high = (middle, high) if joint_optimum(1, math.exp(middle))[2] > target else (low, middle)
    return math.exp(low) / flops


def leverage_multiplier(active_share: float, granularity: float, flops: float) -> float:
    """Efficiency leverage of arXiv 2507.17702. The base of its logarithms is not stated: log10 of the FLOPs and ln of
    the granularity come nearest to its own example (6.9 for more than 7 at A=3.1%, G=12, 1e22)."""
    law, log_g = LEVERAGE, math.log(granularity)
    hat = 1 / (1 / (active_share + 1 / (1 / law["start"] - 1 / law["max"])) + 1 / law["max"])
    return hat ** (law["a"] + law["d"] * math.log10(flops) + law["gamma"] * log_g**2 + law["beta"] * log_g)


def equal_loss(*, flops: float, routed: int, activated: int, dim: int, expert_dim: int) -> dict:
    """The range of the laws for one mixture trained with so many FLOPs; JSON.

    Both laws take routing by its active share: 8 of 256 stands for 1 of 32. Granularity is the second law's alone.
    """
    experts, granularity, printed = routed / activated, 2 * dim / expert_dim, 1e20 <= flops <= 1e22
    leverage = leverage_multiplier(activated / routed, granularity, flops)
    laws = [
        {"law": "joint (arXiv 2502.05172)", "multiplier": joint_multiplier(experts, flops),
         "inside_fit": printed and experts <= 32, "fit": "its own table: 1 to 32 experts, 1e20 to 1e22 FLOP"},
        {"law": "efficiency leverage (arXiv 2507.17702)", "multiplier": leverage,
         "inside_fit": printed and activated / routed >= 0.031 and 2 <= granularity <= 16,
         "fit": "its own check: 3.1% active, granularity 12, 1e22 FLOP; 1e20 and granularity 2 to 16 are our bounds"},
    ]
    values = [law["multiplier"] for law in laws]
    return {"low": min(values), "high": max(values), "inside_fits": all(law["inside_fit"] for law in laws),
            "laws": laws}


def measured_multiplier(compared: dict) -> dict | None:
    """{low, median, high} in FLOPs against the equal-active twin from the result of `sparing compare`; None where it
    has none, as when the losses never met."""
    found = compared
    for key in ("multiplier", "equal_active", "flops"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return None
    return found if all(isinstance(found.get(key), int | float) for key in ("low", "median", "high")) else None


def _saturating(experts: float, start: float, top: float) -> float:
    """E-hat of Clark et al. 2022: few experts count for more than one, many for less than their number."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / top)) + 1 / top)
