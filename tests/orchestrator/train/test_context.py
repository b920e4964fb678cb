"""Context extension as in the V3 report, section 4.3: a new run from weights alone, with longer sequences."""

from pathlib import Path

import pytest

from model.config import RopeScaling
from orchestrator.errors import BadRequest
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.export import export_checkpoint, import_hf
from tests.orchestrator.train.runs import checkpoint_of, losses, make_config, train

YARN = {"model__rope_factor": 4.0, "model__original_seq_len": 32, "train__seq_len": 96}
LLAMA3 = YARN | {"model__rope_scaling": RopeScaling.llama3, "model__beta_fast": 4.0}


@pytest.fixture(scope="module")
def short(text, tmp_path_factory) -> Path:
    """A run, and in `weights` what it learnt."""
    folder = tmp_path_factory.mktemp("short")
    train(RankInfo(), make_config(text, folder))
    export_checkpoint(str(folder), str(folder / "hf"))
    import_hf(str(folder / "hf"), str(folder / "weights"))
    return folder


@pytest.mark.parametrize("extension", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_weights_go_on_with_a_longer_context(text, short, tmp_path, extension):
    train(RankInfo(), make_config(text, tmp_path / "long", resume=str(short / "weights"), **extension))
    assert losses(tmp_path / "long")[1][0] < losses(short)[1][0] - 0.1, "it starts from what was learnt"
    with pytest.raises(BadRequest, match="model.rope_factor=1.0 there, 4.0 here"):
        train(RankInfo(), make_config(text, tmp_path / "other", resume=checkpoint_of(short, 6), **extension))
