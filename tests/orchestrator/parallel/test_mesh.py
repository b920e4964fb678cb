"""One rank's device and the interface that it meets the others by, without any other rank."""

import pytest

from orchestrator.errors import NotFit
from orchestrator.parallel import mesh
from orchestrator.parallel.rank_info import RankInfo


def test_a_rank_that_was_given_a_gpu_does_not_train_on_the_cpu_in_silence(monkeypatch):
    monkeypatch.setattr(mesh.torch.cuda, "is_available", lambda: False)
    assert mesh.pick_device(RankInfo()).type == "cpu"
    with pytest.raises(NotFit, match=r"was to train on h100 .* sees no GPU here; .*nvidia-smi.* or use hardware=cpu"):
        mesh.pick_device(RankInfo(), expected="h100")
