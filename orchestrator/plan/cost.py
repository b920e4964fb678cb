"""What a run costs: a ledger of device-seconds, the FLOPs they bought, and the dense models beside it.

Arithmetic only; prices and peaks come from `conf/hardware`, FLOPs from `model/count.py`. The unit is the
device-second: n devices for t seconds are n * t, so a run may change its number of devices. An unknown price
stays unknown (None); it never becomes 0.
"""

import math
from dataclasses import dataclass, field

from model import count
from model.config import ModelConfig
from orchestrator.config import HardwareConfig
from orchestrator.errors import BadRequest

BUCKETS = ("goodput", "validation", "startup", "data", "checkpoint", "lost_work", "restart", "idle", "spares")
"""Where a charged device-second goes: `goodput` made a step that was kept, the rest by Google's badput names, and
`spares` are devices held warm without a rank."""

MFU_CONVENTION = ("model FLOPs (6 per active parameter and token, input embedding excluded; causal attention, half the "
                  "score matrix; MTP modules; no recompute) per second of kept steps over the devices' peak")


@dataclass
class Ledger:
    """Charges devices from placement to release, whether they work or not, and says in which bucket each second went.

    Live figures (`charged_s`, `usd`, `device_hours`) follow the clock, so they include time that no bucket has
    yet; `close` puts that time into `idle`. Times are unix seconds.
    """

    devices: int
    usd_per_h: float | None
    """Of one device."""
    since: float
    """When the present number of devices was placed."""
    settled_s: float = 0.0
    """Device-seconds charged before `since`, earlier attempts included."""
    settled_usd: float | None = 0.0
    buckets_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    """Device-seconds by bucket."""
    spares: int = 0
    """Devices held beside the others without a rank: warm spares, and those that a smaller layout has no use for."""

    def charge(self, bucket: str, seconds: float, *, devices: int | None = None) -> None:
        """Book `seconds` of wall time of all devices (spares in a bucket of their own), or of `devices` of them."""
        if devices is None:
            self.buckets_s["spares"] += seconds * self.spares
        self.buckets_s[bucket] += seconds * (self.devices if devices is None else devices)

    def catch_up(self, charged_s: float, bucket: str) -> None:
        """Raise what earlier attempts were charged to `charged_s` device-seconds, the difference booked in `bucket`.

        A resumed ledger remembers its checkpoint; what was charged after it was charged all the same. Call it
        before this attempt charges anything; priced as this attempt's devices.
        """
        missing_s = max(0.0, charged_s - self.settled_s)
        self.buckets_s[bucket] += missing_s
        self._settle(missing_s)

    def resize(self, now: float, devices: int, *, spares: int = 0, usd_per_h: float | None = None) -> None:
        """From `now` on charge another number of devices, at another price if one is given."""
        self._settle(self.charged_s(now) - self.settled_s)
        self.since, self.devices, self.spares = now, devices, spares
        self.usd_per_h = self.usd_per_h if usd_per_h is None else usd_per_h

    def close(self, now: float) -> None:
        """Release the devices. Afterwards the buckets sum to the charged total, to the last bit."""
        charged = self.charged_s(now)
        usd = self.usd(now)
        self.buckets_s["idle"] += charged - math.fsum(self.buckets_s.values())
        self.since, self.devices, self.spares = now, 0, 0
        self.settled_s, self.settled_usd = math.fsum(self.buckets_s.values()), usd

    def charged_s(self, now: float) -> float:
        """Device-seconds from placement to now: by the clock, but not less than what the buckets hold."""
        by_clock = self.settled_s + (self.devices + self.spares) * max(0.0, now - self.since)
        return max(by_clock, math.fsum(self.buckets_s.values()))

    def device_hours(self, now: float) -> float:
        return self.charged_s(now) / 3600

    def usd(self, now: float) -> float | None:
        return _add(self.settled_usd, _price(self.charged_s(now) - self.settled_s, self.usd_per_h))

    def to_dict(self, now: float) -> dict:
        """What a checkpoint or a result carries; JSON."""
        return {"at": now, "charged_s": self.charged_s(now), "usd": self.usd(now), "buckets_s": dict(self.buckets_s)}

    @classmethod
    def from_dict(cls, state: dict, *, devices: int, usd_per_h: float | None, since: float,
                  spares: int = 0) -> "Ledger":
        """Go on from `to_dict`'s output with devices placed at `since`: state["at"] where they never were released."""
        buckets = dict.fromkeys(BUCKETS, 0.0) | state["buckets_s"]
        return cls(devices, usd_per_h, since, state["charged_s"], state["usd"], buckets, spares)

    def _settle(self, device_s: float) -> None:
        self.settled_usd = _add(self.settled_usd, _price(device_s, self.usd_per_h))
        self.settled_s += device_s


def would_pass(ledger: Ledger, now: float, next_seconds: float, max_usd: float | None) -> bool:
    """Whether `next_seconds` more wall time (one step and the final checkpoint) would cost more than the budget."""
    if max_usd is None:
        return False
    if ledger.usd(now) is None or ledger.usd_per_h is None:
        raise BadRequest(f"budget.max_usd={max_usd}: cannot be kept, since the price of a device is unknown; set "
                         "hardware.usd_per_h, or leave budget.max_usd unset")
    return ledger.usd(now) + _price((ledger.devices + ledger.spares) * next_seconds, ledger.usd_per_h) > max_usd


def model_flops(model: ModelConfig, tokens: float, seq_len: int) -> float:
    """Training FLOPs of `tokens` by `MFU_CONVENTION`."""
    return tokens * count.training_flops(model, seq_len, mtp=True)


def mfu(flops_per_s: float, *, devices: int, peak_flops_per_s: float | None) -> float | None:
    """Model FLOP/s of all devices over their peak; name the peak's dtype, or that it is a measured GEMM, beside it."""
    return flops_per_s / (devices * peak_flops_per_s) if peak_flops_per_s else None


def mfu_conventions(model: ModelConfig, tokens_per_s: float, seq_len: int, hardware: HardwareConfig) -> dict:
    """One device's rate as the MFUs in print: the same run of V3 is 43.7%, 38.9% and 19.5%. None without a peak."""
    peaks = {"bf16 peak": hardware.bf16_tflops, "fp8 peak": hardware.fp8_tflops}
    flops = {"whole attention": count.training_flops(model, seq_len, causal=False),
             "causal attention": count.training_flops(model, seq_len)}
    return {f"{peak}, {which}": per_token * tokens_per_s / (tflops * 1e12) if tflops else None
            for peak, tflops in peaks.items() for which, per_token in flops.items()}


def usd_per_million_tokens(usd: float | None, tokens: int) -> float | None:
    return usd / tokens * 1e6 if usd is not None and tokens else None


def dense_equivalents(model: ModelConfig, tokens: float, *, seq_len: int, mfu: float | None,
                      peak_flops_per_s: float | None, usd_per_h: float | None, devices: int) -> dict[str, dict]:
    """The same tokens through a dense model of equal total and of equal active parameters, at this run's own MFU.

    Productive time only: no start-up, no failures. Dense models usually reach a higher MFU than a MoE, so these
    are upper bounds until the dense model is simulated or measured. Hours are of `devices` such devices.

    The twins have this model's width, depth, attention and MTP depth and differ in feed-forward matrices alone,
    where a parameter costs 6 FLOPs a token. So they need not be built: equal active parameters are equal FLOPs.
    """
    parts = count.parameters(model)
    with_mtp = count.parameters(model, mtp=True)
    sleeping = with_mtp.total - count.active(with_mtp, model).total
    own = count.training_flops(model, seq_len, mtp=True)
    twins = {"equal_total": (parts.total, own + 6 * sleeping),
             "equal_active": (count.active(parts, model).total, own)}
    found = {}
    for name, (parameters, flops_per_token) in twins.items():
        flops = tokens * flops_per_token
        device_s = flops / (mfu * peak_flops_per_s) if mfu and peak_flops_per_s else None
        found[name] = {"parameters": parameters, "flops": flops,
                       "device_hours": None if device_s is None else device_s / 3600,
                       "hours": None if device_s is None else device_s / 3600 / devices,
                       "usd": None if device_s is None else _price(device_s, usd_per_h)}
    return found


def _price(device_s: float, usd_per_h: float | None) -> float | None:
    return None if usd_per_h is None else device_s / 3600 * usd_per_h


def _add(usd: float | None, more: float | None) -> float | None:
    return None if usd is None or more is None else usd + more
