"""Which entry of conf/hardware describes a device. Figures live there, with source and date; none is written here."""

from dataclasses import fields, replace
from pathlib import Path

import yaml

from orchestrator.config import HardwareConfig, conf_dir, from_dict


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
        matching = [entry for entry in known.values() if entry.match and entry.match.lower() in device_name.lower()]
        found = max(matching, key=lambda entry: len(entry.match),
                    default=HardwareConfig(name=device_name, device="cuda"))
    default = HardwareConfig()
    changed = {f.name: getattr(asked, f.name) for f in fields(asked)
               if f.name != "name" and getattr(asked, f.name) != getattr(default, f.name)}
    return replace(found, **changed)
