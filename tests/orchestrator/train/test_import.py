"""A Hugging Face directory as a checkpoint: file by file, all of it or nothing."""

import json
import weakref

import pytest
import torch
from safetensors import SafetensorError

from model import hf
from model.config import ModelConfig
from model.transformer import Transformer
from orchestrator.errors import BadRequest, NotFit
from orchestrator.train import checkpoint, export
from orchestrator.train.export import StateDict, import_hf
from orchestrator.train.lineage import find_latest
from orchestrator.train.shards import Loader

MODEL = ModelConfig(vocab_size=300, dim=64, n_layers=3, n_dense_layers=1, inter_dim=96, n_heads=2, moe_inter_dim=32,
                    n_routed_experts=8, n_mtp_layers=1)


@pytest.fixture
def released(tmp_path):
    """A directory of random weights, and these under our names."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in hf.tensor_shapes(MODEL).items()}
    hf.export(tmp_path / "hf", MODEL, tensors, max_shard_bytes=200_000)
    return tmp_path / "hf", tensors


@pytest.mark.parametrize("file_bytes", [60_000, 1 << 30])
def test_an_import_holds_no_more_than_a_file_at_a_time_and_every_tensor_arrives(released, tmp_path, monkeypatch,
                                                                                file_bytes):
    folder, tensors = released
    alive, most, original = [0], [0], export._pieces

    def counted(name, among):
        for piece in original(name, among):
            alive[0] += piece.tensor.nbytes
            weakref.finalize(piece.tensor, lambda size: alive.__setitem__(0, alive[0] - size), piece.tensor.nbytes)
            most[0] = max(most[0], alive[0])
            yield piece

    monkeypatch.setattr(export, "_pieces", counted)
    monkeypatch.setattr(export, "FILE_BYTES", file_bytes)
    loader = Loader(import_hf(str(folder), str(tmp_path / "out")))
    largest = max(tensor.nbytes for name, tensor in tensors.items() if export.EXPERTS not in name)
    assert most[0] <= 2 * file_bytes + largest
    assert (len(loader.manifest.files) > 5) == (file_bytes < 1 << 20)
    loader.check(content=True)
    found = StateDict(loader, MODEL)
    assert set(found) == set(tensors) == set(Transformer(MODEL).state_dict())
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_refused_midway_leaves_nothing_and_may_be_tried_again(released, tmp_path, monkeypatch):
    folder, _ = released
    monkeypatch.setattr(export, "FILE_BYTES", 60_000)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    with pytest.raises(BadRequest, match="has shape .*, must have .* by config.json"):
        import_hf(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (folder / "config.json").write_text(json.dumps(config))
    import_hf(str(folder), str(tmp_path / "out"))


def test_nothing_is_written_behind_a_file_that_could_not_be(released, tmp_path, monkeypatch):
    folder, _ = released
    monkeypatch.setattr(export, "FILE_BYTES", 60_000)
    tried, original = [], checkpoint.write_shard

    def full(path, pieces, **options):
        tried.append(path)
        if len(tried) == 2:
            raise OSError(28, "No space left on device")
        return original(path, pieces, **options)

    monkeypatch.setattr(checkpoint, "write_shard", full)
    with pytest.raises(NotFit, match="No space left on device"):
        import_hf(str(folder), str(tmp_path / "out"))
    assert len(tried) == 2 and not (tmp_path / "out").exists()


def test_an_export_that_the_disk_refuses_leaves_nothing_and_says_where(released, tmp_path, monkeypatch):
    folder, _ = released
    import_hf(str(folder), str(tmp_path / "in"))

    def full(tensors, file, metadata):
        file.write_text("torn")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export.export_checkpoint(str(tmp_path / "in"), str(tmp_path / "out"))
    assert caught.value.errno == 28 and caught.value.filename.startswith(f"{tmp_path}/out/model-")
    assert not (tmp_path / "out").exists()


def test_an_export_takes_nothing_away_that_was_there(released, tmp_path):
    folder, _ = released
    import_hf(str(folder), str(tmp_path / "in"))
    with pytest.raises(BadRequest, match="in: must be a new or empty directory"):
        export.export_checkpoint(str(tmp_path / "in"), str(tmp_path / "in"))
    Loader(find_latest(str(tmp_path / "in"))).check(content=True)
