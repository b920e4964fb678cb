"""Prices and devices as data: nothing without a source and a day, nothing guessed, mistakes answered by name."""

import re
from datetime import date

import pytest

from orchestrator.compose import compose_config
from orchestrator.config import HardwareConfig, conf_dir
from orchestrator.errors import BadRequest
from orchestrator.plan.hardware import at_market, catalogue, hardware_named, price_age_days, resolve_hardware

KNOWN = catalogue()


def test_the_usual_devices_are_known():
    wanted = {"v100", "a100", "a100_40", "h20", "h100", "h200", "h800", "l40s", "b200", "b300", "gb200", "gb300",
              "mi300x", "mi325x", "mi355x", "rtx_3090", "rtx_4090", "rtx_5090", "cpu"}
    assert wanted <= set(KNOWN)


def test_every_price_of_every_market_has_a_source_and_a_day():
    for entry in KNOWN.values():
        for price in (entry, entry.reserved, entry.spot):
            if price.usd_per_h is not None:
                assert price.source and re.fullmatch(r"20\d\d-\d\d-\d\d", price.date), entry.name


def test_published_peaks_are_kept():
    """Vendor data sheets: dense bf16 TFLOP/s, bytes of memory, watts."""
    peaks = {"a100": 312, "h20": 148, "h200": 989, "b200": 2250, "mi300x": 1307}
    assert {name: KNOWN[name].bf16_tflops for name in peaks} == peaks
    assert KNOWN["mi300x"].memory_gib * 2**30 == pytest.approx(192e9, rel=1e-3)
    assert KNOWN["gb200"].scale_up_devices == 72 and KNOWN["l40s"].watts == 350


@pytest.mark.parametrize("name, device", [
    ("NVIDIA A100-SXM4-40GB", "a100_40"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H20", "h20"),
    ("NVIDIA H200", "h200"), ("NVIDIA GB200", "gb200"), ("NVIDIA B200", "b200"),
    ("NVIDIA GeForce RTX 4090", "rtx_4090"), ("AMD Instinct MI300X", "mi300x"), ("Tesla V100-SXM2-32GB", "v100"),
])
def test_a_device_is_found_by_the_name_it_reports(name, device):
    assert resolve_hardware(HardwareConfig(), name).name == device


def test_a_market_has_its_own_price_or_asks_for_one():
    spot = at_market(KNOWN["h100"], "spot")
    assert spot.usd_per_h == 1.25 and spot.market == "spot" and "Nebius" in spot.source
    assert at_market(KNOWN["h100"], "on_demand") == KNOWN["h100"]
    with pytest.raises(BadRequest, match="market=spot: no such price is known for hardware=a100; set hardware.usd_per"):
        at_market(KNOWN["a100"], "spot")
    with pytest.raises(BadRequest, match="market=cheap: must be one of"):
        at_market(KNOWN["h100"], "cheap")


def test_the_age_of_a_price_is_counted():
    assert price_age_days(KNOWN["a100"], date(2026, 3, 1)) == 365
    assert price_age_days(KNOWN["v100"], date(2026, 3, 1)) is None


def test_an_unknown_device_is_answered_with_the_nearest():
    with pytest.raises(BadRequest, match="hardware=h10: no such device; did you mean h100"):
        hardware_named("h10")


@pytest.mark.parametrize("name", sorted(file.stem for file in (conf_dir() / "cluster").glob("*_*.yaml")))
def test_a_cluster_is_as_large_as_its_name_says(name):
    config = compose_config([f"cluster={name}"])
    device, devices = name.rsplit("_", 1)
    assert config.hardware.name == device and config.cluster.nodes * config.cluster.ranks_per_node == int(devices)
