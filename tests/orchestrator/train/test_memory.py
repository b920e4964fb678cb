"""A model that no layout of these devices can hold is refused before any rank starts."""

import pytest

from orchestrator.compose import compose_config
from orchestrator.errors import NotFit
from orchestrator.plan.hardware import catalogue, resolve_hardware
from orchestrator.train import memory


@pytest.mark.parametrize("words, on_gpus, told", [
    (["model=deepseek_v3"], False, r"moments alone take 10,172 GiB, and this machine has 24; use a smaller model"),
    (["model=deepseek_v3", "precision=fp8"], False, r"moments alone take 7,6\d\d GiB"),
    (["model=deepseek_v3", "hardware=h100", "layout.dp=64"], True, "10,172 GiB, and 64 x h100 have 5,062"),
    (["model=deepseek_v3", "hardware=h100", "layout.dp=256"], True, None),
    (["model=mini"], False, None)])
def test_a_state_larger_than_all_memory_is_refused(monkeypatch, words, on_gpus, told):
    monkeypatch.setattr(memory, "total_bytes", lambda: 24 * 2**30)
    config = compose_config(words)
    config.hardware = resolve_hardware(config.hardware, None) if config.hardware.name == "auto" else config.hardware
    if told is None:
        memory.check_state(config, on_gpus=on_gpus, here=True)
        return
    with pytest.raises(NotFit, match=f"model=deepseek_v3: .*{told}"):
        memory.check_state(config, on_gpus=on_gpus, here=True)


def test_what_nobody_knows_refuses_nothing(monkeypatch):
    config = compose_config(["model=deepseek_v3"])
    memory.check_state(config, on_gpus=False, here=False)
    config.hardware = resolve_hardware(catalogue()["cpu"], "a GPU of no data sheet")
    memory.check_state(config, on_gpus=True, here=True)
    monkeypatch.setattr(memory, "total_bytes", lambda: None)
    memory.check_state(config, on_gpus=False, here=True)
