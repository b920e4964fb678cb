"""One rank's device and the interface that it meets the others by, without any other rank."""

import pytest

from orchestrator.config import HardwareConfig
from orchestrator.errors import NotFit
from orchestrator.parallel import mesh
from orchestrator.parallel.rank_info import RankInfo


def test_a_rank_that_was_given_a_gpu_does_not_train_on_the_cpu_in_silence(monkeypatch):
    monkeypatch.setattr(mesh.torch.cuda, "is_available", lambda: False)
    assert mesh.pick_device(RankInfo(), HardwareConfig()).type == "cpu"
    for info, hardware in [(RankInfo(), HardwareConfig("h100", "cuda")), (RankInfo(has_gpu=True), HardwareConfig())]:
        with pytest.raises(NotFit, match=rf"was to train on {hardware.name} .* sees no GPU here; .*nvidia-smi.*or use"):
            mesh.pick_device(info, hardware)
