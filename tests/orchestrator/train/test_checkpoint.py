"""Checkpoints read back, whatever wrote them, under whatever layout; the damaged are refused, and one before found."""

import json
import os
import random
import re

import pytest
import torch

from orchestrator.train import lineage, manifest, storage
from orchestrator.train.shards import Loader
from tests.orchestrator.train.team import STATE, Team, assert_holds, flip_bit, newest_loadable, pieces_of


def test_four_ranks_write_what_two_and_one_read(root, save, tensors):
    result = save(3)
    assert result.ok, result.error
    assert lineage.find_latest(root) == result.path and result.bytes > 0
    assert_holds(result.path, tensors)
    for rank in range(2):
        loader = Loader(result.path)
        for piece in pieces_of(tensors, rank, 2):
            stop = piece.start + (len(piece.tensor) if piece.global_shape else 1)
            assert torch.equal(loader.read(piece.key, piece.start, stop), piece.tensor)
        loader.close()
    assert Loader(result.path).state == STATE


@pytest.mark.parametrize("world", (1, 3))
def test_any_number_of_ranks_writes_the_same_checkpoint(tmp_path, world, tensors):
    result = Team(str(tmp_path), world).save(1, lambda rank, world: pieces_of(tensors, rank, world))
    assert result.ok, result.error
    assert_holds(result.path, tensors)


def test_shards_are_plain_safetensors(saved, tensors):
    from safetensors.torch import load_file

    shards = [load_file(f"{saved}/rank-{rank:05d}.safetensors") for rank in range(4)]
    assert torch.equal(shards[1]["model.layers.1.moe.experts.5.w2"], tensors["model.layers.1.moe.experts.5.w2"])
    assert torch.equal(shards[3]["model.counts@3"], tensors["model.counts"][3:])


def test_a_change_right_after_save_is_not_saved(tmp_path, tensors):
    expected = {key: tensor.clone() for key, tensor in tensors.items()}
    team, state = Team(str(tmp_path)), {"step": 3}
    team.start(3, lambda rank, world: pieces_of(tensors, rank, world), state)
    for tensor in tensors.values():
        tensor.zero_()
    state["step"] = 4
    result = [saver.wait() for saver in team.savers][0]
    assert_holds(result.path, expected)
    assert Loader(result.path).state == {"step": 3}


def test_results_drain_in_order_and_saves_queue(tmp_path, tensors):
    team = Team(str(tmp_path))
    for step in (1, 2, 3):
        team.start(step, lambda rank, world: pieces_of(tensors, rank, world))
    assert team.savers[0].wait().step == 3
    assert [(result.step, result.ok) for result in team.savers[0].results()] == [(1, True), (2, True), (3, True)]
    assert team.savers[0].results() == []


def test_rows_are_read_across_pieces(saved, tensors):
    loader = Loader(saved)
    weight = tensors["model.tok_embeddings.weight"]
    for start in range(14):
        for stop in range(start, 14):
            assert torch.equal(loader.read("model.tok_embeddings.weight", start, stop), weight[start:stop])
    with pytest.raises(manifest.MissingTensor, match=r"13 rows, not \[0, 14\)"):
        loader.read("model.tok_embeddings.weight", 0, 14)
    with pytest.raises(manifest.MissingTensor, match="holds no model.layers.9.w"):
        loader.read("model.layers.9.w")


def test_truncated_longer_missing_and_linked_shards_are_told_apart(saved, tmp_path):
    shard = f"{saved}/rank-00002.safetensors"
    with open(shard, "rb") as file:
        whole = file.read()

    def refused():
        with pytest.raises(manifest.Damaged, match="rank-00002.safetensors") as caught:
            Loader(saved).check()
        assert caught.value.exit_code == 17
        return type(caught.value)

    with open(shard, "wb") as file:
        file.write(whole[:-1])
    assert refused() is manifest.TruncatedShard
    with open(shard, "wb") as file:
        file.write(whole + b"\0")
    assert refused() is manifest.CorruptShard
    os.unlink(shard)
    assert refused() is manifest.MissingShard
    (tmp_path / "elsewhere").write_bytes(whole)
    os.symlink(tmp_path / "elsewhere", shard)
    assert refused() is manifest.CorruptShard


def test_only_the_shards_that_are_needed_are_opened(saved, tensors):
    os.unlink(f"{saved}/rank-00002.safetensors")
    key = "model.layers.1.moe.experts.1.w13"
    assert torch.equal(Loader(saved).read(key), tensors[key])


def test_what_is_read_is_not_the_file(saved, tensors):
    key = "model.layers.1.moe.experts.1.w13"
    read = Loader(saved).read(key)
    flip_bit(f"{saved}/rank-00001.safetensors", random.Random(0))
    read.mul_(2)
    assert torch.equal(read, tensors[key] * 2)


def test_the_newest_whole_checkpoint_is_resumed_and_the_damaged_are_named(root, tensors):
    team, skipped = Team(root, 2), []
    paths = [team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).path for step in (1, 2, 3, 4)]
    shard = storage.join(paths[2], "rank-00001.safetensors")
    storage.write_bytes(shard, storage.read_bytes(shard)[:-4] + b"\1\2\3\4")
    storage.write_bytes(storage.join(paths[3], "manifest.json"), b"{}")
    found = newest_loadable(root, lambda path, reason: skipped.append((path, reason)))
    assert found == paths[1] and [path for path, _ in skipped] == [paths[3], paths[2]]
    assert "rank-00001.safetensors" in skipped[1][1] and "manifest.json" in skipped[0][1]
    assert lineage.find_latest(root) == paths[2], "its manifest is sound; only a hash tells"


def test_a_newer_format_is_not_skipped_in_silence(tmp_path, saved):
    file = f"{saved}/manifest.json"
    with open(file) as old:
        raw = json.load(old)
    with open(file, "w") as new:
        json.dump(raw | {"version": 99}, new)
    with pytest.raises(manifest.FutureFormat, match="format version 99"):
        newest_loadable(str(tmp_path), lambda path, reason: None)


def test_nothing_to_resume_is_none_and_a_wrong_path_is_named(root, tmp_path):
    assert lineage.find_latest(root) is None
    assert newest_loadable(root, lambda path, reason: None) is None
    with pytest.raises(manifest.CheckpointNotFound, match="no checkpoint here"):
        Loader(storage.join(root, "nowhere"))


def test_a_person_may_name_checkpoint_directory_or_run(tmp_path, tensors):
    run = tmp_path / "run"
    path = Team(str(run / "checkpoints"), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world)).path
    for name in (path, str(run / "checkpoints"), str(run)):
        assert lineage.newest_under(name) == path
    assert lineage.newest_under(str(tmp_path)) is None


def test_nothing_is_pickled():
    words = r"pickle|torch\.load\(|weights_only=False|allow_pickle=True"
    for name in ("storage", "manifest", "lineage", "shards", "claim", "checkpoint"):
        with open(f"orchestrator/train/{name}.py") as file:
            assert not re.search(words, file.read().replace("Nothing is pickled", "")), name
