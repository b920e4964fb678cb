"""Prices and devices as data: nothing without a source and a day, nothing guessed, mistakes answered by name."""

import re
from dataclasses import replace
from datetime import date

import pytest

from orchestrator.compose import compose_config
from orchestrator.config import HardwareConfig, conf_dir
from orchestrator.errors import BadRequest
from orchestrator.plan.hardware import (
    age_days,
    at_market,
    catalogue,
    check_hardware,
    hardware_named,
    in_machines,
    resolve_hardware,
)

KNOWN = catalogue()
NVIDIA_SMI_MIB = {"a100": 81920, "a100_40": 40960, "b200": 183359, "b300": 275040, "gb200": 189471, "gb300": 284208,
                  "h100": 81559, "h20": 97871, "h200": 143771, "h800": 81559, "l40s": 46068, "rtx_3090": 24576,
                  "rtx_4090": 24564, "rtx_5090": 32607, "v100": 32768}
"""Totals that the driver prints. A data sheet's 80 GB are 80 GiB or a little less, never 80e9 bytes."""
AMD_GIB = {"mi300x": 192, "mi325x": 256, "mi355x": 288}
"""Data sheet."""


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
    """Vendor data sheets: dense bf16 TFLOP/s, watts."""
    peaks = {"a100": 312, "h20": 148, "h200": 989, "b200": 2250, "mi300x": 1307,
             "mi355x": round(256 * 2.4e9 * 4096 / 1e12)}
    assert {name: KNOWN[name].bf16_tflops for name in peaks} == peaks
    assert KNOWN["gb200"].scale_up_devices == 72 and KNOWN["l40s"].watts == 350


def test_memory_is_what_a_program_has_of_the_drivers_total():
    """torch's total lies below the driver's by what that keeps for itself: at most 2.5% in any out-of-memory message
    that was found."""
    totals = {name: mib / 1024 for name, mib in NVIDIA_SMI_MIB.items()} | AMD_GIB
    assert set(totals) == {name for name, entry in KNOWN.items() if entry.memory_gib}
    for name, total in totals.items():
        assert 0.975 * total < KNOWN[name].memory_gib <= total, name


@pytest.mark.parametrize("name, device", [
    ("NVIDIA A100-SXM4-40GB", "a100_40"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H20", "h20"),
    ("NVIDIA H200", "h200"), ("NVIDIA GB200", "gb200"), ("NVIDIA B200", "b200"),
    ("NVIDIA GeForce RTX 4090", "rtx_4090"), ("AMD Instinct MI300X", "mi300x"), ("Tesla V100-SXM2-32GB", "v100"),
    *((name, name) for name in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB",
                                  "NVIDIA A100X", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-FHHL-16GB")),
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


def test_a_given_price_holds_for_any_market_and_says_that_it_was_given():
    asked = replace(KNOWN["h100"], usd_per_h=1.5)
    for market in ("on_demand", "spot"):
        found = at_market(asked, market)
        assert (found.usd_per_h, found.market, found.source, found.date) == (1.5, market, "given", "")
        assert at_market(found, market) == found
    own = at_market(replace(asked, source="our contract", date="2026-10-01"), "reserved")
    assert (own.usd_per_h, own.source, own.date) == (1.5, "our contract", "2026-10-01")
    assert at_market(replace(KNOWN["a100"], usd_per_h=0.9), "spot").usd_per_h == 0.9
    same = at_market(KNOWN["h100"], "spot", given=True)
    assert (same.usd_per_h, same.market, same.source, same.date) == (2.99, "spot", "given", "")
    assert at_market(KNOWN["h800"], "on_demand", given=True).source == "given", "also where the entry has the same"
    assert at_market(KNOWN["h100"], "on_demand") == KNOWN["h100"]
    trained = resolve_hardware(HardwareConfig(usd_per_h=1.5), "NVIDIA H200")
    assert (trained.name, trained.source, trained.date) == ("h200", "given", "")
    assert age_days(trained.date, date(2026, 3, 1)) is None


def test_the_market_of_the_config_takes_its_own_price():
    assert at_market(replace(KNOWN["h100"], market="spot"), "spot") == at_market(KNOWN["h100"], "spot")
    with pytest.raises(BadRequest, match="market=reserved: no such price is known for hardware=a100"):
        at_market(replace(KNOWN["a100"], market="reserved"), "reserved")


def test_the_age_of_a_price_is_counted():
    assert age_days(KNOWN["a100"].date, date(2026, 3, 1)) == 365
    assert age_days(KNOWN["v100"].date, date(2026, 3, 1)) is None


def test_an_unknown_device_is_answered_with_the_nearest():
    with pytest.raises(BadRequest, match="hardware=h10: no such device; did you mean h100"):
        hardware_named("h10")


@pytest.mark.parametrize("name", sorted(file.stem for file in (conf_dir() / "cluster").glob("*_*.yaml")))
def test_a_cluster_is_as_large_as_its_name_says(name):
    config = compose_config([f"cluster={name}"])
    device, devices = name.rsplit("_", 1)
    assert config.hardware.name == device and config.cluster.nodes * config.cluster.ranks_per_node == int(devices)


def test_fast_links_reach_no_further_than_a_machine():
    h100, rack = KNOWN["h100"], KNOWN["gb200"]
    assert [in_machines(h100, ranks).scale_up_devices for ranks in (0, 1, 4, 8, 16)] == [8, 1, 4, 8, 8]
    assert in_machines(rack, 4) == rack, "a rack's links go between its machines"
    assert in_machines(replace(h100, scale_up_devices=6), 4).scale_up_devices == 6, "as it was set"


@pytest.mark.parametrize("changed, words", [
    ({"gemm_share": 80.0}, "hardware.gemm_share=80.0: must be at most 1; give a share"),
    ({"bf16_best_tflops": 1e5}, "hardware.bf16_best_tflops=100000.0: must not exceed the device's peak of 989"),
])
def test_a_device_does_no_more_than_its_peak(changed, words):
    with pytest.raises(BadRequest, match=words):
        check_hardware(replace(KNOWN["h100"], **changed))
