"""How much less a mixture of experts costs than a dense model of the same loss: measured curves into one ratio.

A curve is what one run measured: (cost so far, validation loss), the cost in FLOPs, device-seconds or dollars. Learning
rates must be constant after warm-up, so that each point stands for a whole run of its length.
"""

import math
import statistics
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]


def cost_to_reach(curve: Curve, loss: float) -> float | None:
    """The cost at which a curve first comes down to `loss`; None if it never does.

    Between two measured points loss is taken as linear in the logarithm of the cost, as scaling laws nearly have it.
    """
    for (cost, above), (further, below) in zip([(None, math.inf), *curve], curve, strict=False):
        if below <= loss:
            if cost is None or above <= loss or above == below:
                return further
            share = (above - loss) / (above - below)
            return math.exp(math.log(cost) + share * (math.log(further) - math.log(cost)))
    return None


def multiplier(moe: Curve, dense: Curve) -> tuple[float, float] | None:
    """(cost of the dense model over cost of the mixture at equal loss, that loss): above 1 the mixture is cheaper.

    The loss is the lowest that both reached: where the worse of the two ended. None where a curve is empty.
    """
    if not moe or not dense:
        return None
    loss = max(min(value for _, value in moe), min(value for _, value in dense))
    return cost_to_reach(dense, loss) / cost_to_reach(moe, loss), loss


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the seeds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "seeds": len(values)}
