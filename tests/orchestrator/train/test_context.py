"""Context extension as in the V3 report, section 4.3: a new run from weights alone, with longer sequences."""

import pytest

from model.config import RopeScaling
from orchestrator.errors import BadRequest
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.export import export_checkpoint, import_hf
from tests.harness import write_corpus
from tests.orchestrator.train.runs import checkpoint_of, losses, make_config, train

YARN = {"model__rope_factor": 4.0, "model__original_seq_len": 32, "train__seq_len": 96}
LLAMA3 = YARN | {"model__rope_scaling": RopeScaling.llama3, "model__beta_fast": 4.0}


@pytest.mark.parametrize("extension", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_weights_go_on_with_a_longer_context(tmp_path, extension):
    write_corpus(tmp_path, 12)
    train(RankInfo(), make_config(tmp_path, tmp_path / "short"))
    export_checkpoint(str(tmp_path / "short"), str(tmp_path / "hf"))
    import_hf(str(tmp_path / "hf"), str(tmp_path / "weights"))
    before = losses(tmp_path / "short")
    train(RankInfo(), make_config(tmp_path, tmp_path / "long", resume=str(tmp_path / "weights"), **extension))
    assert losses(tmp_path / "long")[1][0] < before[1][0] - 0.1, "it starts from what was learnt"
    whole = checkpoint_of(tmp_path / "short", 6)
    with pytest.raises(BadRequest, match="model.rope_factor=1.0 there, 4.0 here"):
        train(RankInfo(), make_config(tmp_path, tmp_path / "other", resume=whole, **extension))
