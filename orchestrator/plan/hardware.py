"""Which entry of conf/hardware describes a device. Figures live there, with source and date; none is written here."""

import math
import re
from dataclasses import fields, replace
from datetime import date
from difflib import get_close_matches
from pathlib import Path

import yaml

from orchestrator.config import HardwareConfig, PriceConfig, conf_dir, from_dict
from orchestrator.errors import BadRequest, require

MARKETS = ("on_demand", "reserved", "spot")
GIVEN = "given"
"""Source of a price that the user set."""
MACHINE = 8
"""Most devices of one that is no rack."""
TRAY = 4
"""Devices of one machine of a rack."""
CARDS = ("PCIE", "NVL", "FHHL", "LAPTOP")
"""Words of a device's name that tell another form of it from that of an entry."""


def catalogue(folder: Path | None = None) -> dict[str, HardwareConfig]:
    """Every device of conf/hardware, by name."""
    devices = {}
    for file in sorted((folder or conf_dir() / "hardware").glob("*.yaml")):
        values = yaml.safe_load(file.read_text())
        values.pop("defaults", None)
        devices[file.stem] = from_dict(HardwareConfig, values, "hardware.")
    return devices


def resolve_hardware(asked: HardwareConfig, device_name: str | None) -> HardwareConfig:
    """`auto` becomes the entry that fits; what the user set beside it stays. device_name: of the GPU; None is a CPU.

    An unknown GPU keeps no price and no peak: the peak is then measured, and the bill says that it is unknown.
    """
    if asked.name != "auto":
        return asked
    known = catalogue()
    if device_name is None:
        found = known["cpu"]
    else:
        matching = [entry for entry in known.values() if _is_named(entry, device_name)]
        found = max(matching, key=lambda entry: len(entry.match),
                    default=HardwareConfig(name=device_name, device="cuda"))
    default = HardwareConfig()
    changed = {f.name: getattr(asked, f.name) for f in fields(asked)
               if f.name != "name" and getattr(asked, f.name) != getattr(default, f.name)}
    whence = {"source": GIVEN, "date": ""} if "usd_per_h" in changed else {}
    return replace(found, **whence | changed)


def _is_named(entry: HardwareConfig, device_name: str) -> bool:
    """Whether a device's name has the entry's as a word. Cards for PCIe are other devices than modules."""
    found = entry.match and re.search(rf"(?<![a-z0-9]){re.escape(entry.match)}(?![a-z0-9])", device_name, re.IGNORECASE)
    return bool(found) and not any(form in device_name.upper() and form not in entry.match.upper() for form in CARDS)


def hardware_named(name: str) -> HardwareConfig:
    """The entry of conf/hardware, or `BadRequest` with the nearest known name."""
    known = catalogue()
    if name not in known or name == "auto":
        near = get_close_matches(name, known, n=1)
        raise BadRequest(f"hardware={name}: no such device{f'; did you mean {near[0]}?' if near else ''}; known are "
                         f"{', '.join(key for key in known if key != 'auto')}")
    return known[name]


def at_market(hardware: HardwareConfig, market: str, *, given: bool = False) -> HardwareConfig:
    """The same device with the price of `market` as its `usd_per_h`; `BadRequest` where that price is not known.

    A price that is not the entry's own was given: it holds for any market, and has neither its source nor its day.
    given: so was this one, even if it is the entry's own.
    """
    if market not in MARKETS:
        raise BadRequest(f"market={market}: must be one of {', '.join(MARKETS)}; use market=on_demand")
    entry = catalogue().get(hardware.name, HardwareConfig())
    price, own, other = hardware, entry, market != entry.market
    given = given and hardware.usd_per_h is not None
    if other and not given and hardware.usd_per_h in (None, entry.usd_per_h):
        price, own = (getattr(each, market, PriceConfig()) for each in (hardware, entry))
        if price.usd_per_h is None:
            raise BadRequest(f"market={market}: no such price is known for hardware={hardware.name}; set "
                             f"hardware.usd_per_h, or use market={entry.market}")
    source, day = price.source, price.date
    if given or price.usd_per_h != own.usd_per_h:
        source, day = (GIVEN if source == own.source else source), ("" if day == own.date else day)
    return replace(hardware, usd_per_h=price.usd_per_h, market=market, source=source, date=day)


def check_hardware(hardware: HardwareConfig) -> None:
    """What is known of a device is a positive number; it may cost nothing."""
    require(hardware.device in ("cpu", "cuda"), "hardware.device", hardware.device, "must be cpu or cuda",
            "use cuda for a GPU")
    prices = {"usd_per_h": hardware.usd_per_h, "reserved.usd_per_h": hardware.reserved.usd_per_h,
              "spot.usd_per_h": hardware.spot.usd_per_h}
    for name, value in (vars(hardware) | prices).items():
        if type(value) in (int, float):
            free = name in prices
            require((value >= 0 if free else value > 0) and value < math.inf, f"hardware.{name}", value,
                    "must be finite and not negative" if free else "must be positive and finite",
                    "give dollars per hour" if free else "take it from the data sheet, or leave it out")
            require(not name.endswith("_share") or value <= 1, f"hardware.{name}", value, "must be at most 1",
                    "give a share of what the device can do")
            peak = vars(hardware).get(name.replace("_best_", "_")) or value
            require(value <= peak, f"hardware.{name}", value, f"must not exceed the device's peak of {peak:g}",
                    "give what its products reach")


def in_machines(hardware: HardwareConfig, ranks: int) -> HardwareConfig:
    """The device in machines of so many (0: the usual ones), whose fast links reach no further: where the entry has
    those of a machine, not of a rack, and they were not set."""
    reach = hardware.scale_up_devices
    if hardware.device != "cuda" or reach is None or not 0 < ranks < reach <= MACHINE:
        return hardware
    usual = catalogue().get(hardware.name, HardwareConfig()).scale_up_devices
    return replace(hardware, scale_up_devices=ranks) if reach == usual else hardware


def age_days(day: str, today: date) -> int | None:
    """Days since a price was read; None without a day, or with a user's own words for one."""
    try:
        return (today - date.fromisoformat(day)).days
    except ValueError:
        return None
