"""Checkpoints: whatever wrote them, under whatever layout, what is committed is whole and what is damaged is refused.

Ranks are savers in one process that share a HashStore; each has its own thread, as in a real run.
"""

import errno
import json
import os
import random
import re
import subprocess
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from orchestrator.errors import NotFit
from orchestrator.train import checkpoint, manifest, storage
from orchestrator.train.checkpoint import Loader, Piece, Saver

EXPERTS = {"layers.1": 8, "layers.2": 8, "mtp.0.block": 8}
STATE = {"step": 3, "tokens": 12345678901, "loss": 2.0625, "wandb": {"id": "abc"}, "model": {"dim": 8, "n_layers": 3}}


@pytest.fixture
def tensors():
    """Global tensors of a small MoE: uneven rows, a scalar, several types, experts one entry each."""
    generator = torch.Generator().manual_seed(0)
    found = {"model.tok_embeddings.weight": torch.randn(13, 8, generator=generator),
             "model.norm.weight": torch.randn(8, generator=generator).bfloat16(),
             "optim.step": torch.tensor(7.0),
             "model.counts": torch.arange(5)}
    for tree in ("model", "optim.exp_avg"):
        for block, count in EXPERTS.items():
            for expert in range(count):
                name = f"{tree}.{block}.moe.experts.{expert}"
                found[f"{name}.w13"] = torch.randn(6, 4, generator=generator)
                found[f"{name}.w2"] = torch.randn(4, 3, generator=generator)
    return found


def pieces_of(tensors, rank, world):
    """What a rank owns: rows of dense tensors, whole experts, and rank 0 the scalars."""
    pieces = []
    for key, tensor in tensors.items():
        if match := manifest.EXPERT_KEY.fullmatch(key):
            if int(match["expert"]) % world == rank:
                pieces.append(Piece(key, tuple(tensor.shape), 0, tensor))
        elif tensor.dim() == 0:
            pieces += [Piece(key, (), 0, tensor)] if rank == 0 else []
        else:
            start, stop = (len(tensor) * r // world for r in (rank, rank + 1))
            pieces.append(Piece(key, tuple(tensor.shape), start, tensor[start:stop]))
    return pieces


class Team:
    """The savers of an attempt."""

    def __init__(self, directory, world=4, *, keep=0, fence="attempt-1", timeout_s=20, experts=EXPERTS, store=None):
        store = (store or dist.HashStore()) if world > 1 else None
        self.savers = [Saver(directory, rank=rank, world_size=world, store=store, keep=keep, fence=fence,
                             timeout_s=timeout_s, experts=experts) for rank in range(world)]

    def start(self, step, pieces, state=STATE):
        """pieces: function of (rank, world)."""
        for rank, saver in enumerate(self.savers):
            saver.save(step, pieces(rank, len(self.savers)), state)

    def save(self, step, pieces, state=STATE):
        self.start(step, pieces, state)
        return [saver.wait() for saver in self.savers][0]


@pytest.fixture
def save(root, tensors):
    """Save all of `tensors` at a step from some ranks; the result of rank 0."""
    return lambda step, world=4, **kwargs: Team(root, world, **kwargs).save(
        step, lambda rank, world: pieces_of(tensors, rank, world))


@pytest.fixture
def saved(tmp_path, tensors):
    """The path of a whole checkpoint of 4 ranks on disk."""
    result = Team(str(tmp_path)).save(3, lambda rank, world: pieces_of(tensors, rank, world))
    assert result.ok, result.error
    return result.path


def assert_holds(path, tensors):
    loader = Loader(path)
    assert set(loader.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert loader.global_shape(key) == tuple(tensor.shape)
        read = loader.read(key)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), key
    loader.close()


def test_four_ranks_write_what_two_and_one_read(root, save, tensors):
    result = save(3)
    assert result.ok, result.error
    assert checkpoint.find_latest(root) == result.path and result.bytes > 0
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


def flip_bit(path, chance):
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.seek(0)
        file.write(data)


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


class TornWrite:
    """storage.write_chunks that fails after so many bytes, on the shards of one rank."""

    def __init__(self, *, rank, after_bytes, error):
        self.name, self.after_bytes, self.error = f"rank-{rank:05d}", after_bytes, error
        self.write = storage.write_chunks

    def __call__(self, path, chunks, **kwargs):
        self.write(path, self._torn(chunks) if self.name in path else chunks, **kwargs)

    def _torn(self, chunks):
        left = self.after_bytes
        for chunk in chunks:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                raise self.error


@pytest.mark.parametrize("rank", (0, 3))
def test_a_torn_write_leaves_the_previous_checkpoint_and_no_manifest(root, save, tensors, rank, monkeypatch):
    team = Team(root)
    first = team.save(1, lambda rank, world: pieces_of(tensors, rank, world))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_chunks", TornWrite(rank=rank, after_bytes=900, error=OSError("scripted tear")))
        second = team.save(2, lambda rank, world: pieces_of(tensors, rank, world))
    assert not second.ok and f"rank {rank}: " in second.error and "scripted tear" in second.error
    assert checkpoint.list_checkpoints(root) == [first.path] and checkpoint.find_latest(root) == first.path
    assert [name for name in storage.list_dir(root) if name.startswith("step-")] == [first.path.rsplit("/", 1)[1]]
    third = team.save(3, lambda rank, world: pieces_of(tensors, rank, world))
    assert third.ok and checkpoint.find_latest(root) == third.path
    assert_holds(first.path, tensors)


def test_a_write_that_lies_is_found_before_it_is_committed(tmp_path, tensors, monkeypatch):
    write = storage.write_chunks

    def lying(path, chunks, **kwargs):
        write(path, chunks, **kwargs)
        flip_bit(path, random.Random(1))

    monkeypatch.setattr(storage, "write_chunks", lying)
    result = Team(str(tmp_path), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world))
    assert not result.ok and "corrupt" in result.error
    assert checkpoint.find_latest(str(tmp_path)) is None


@pytest.mark.parametrize("moment", ("before", "after"))
def test_death_at_the_commit_leaves_nothing_or_the_whole(tmp_path, tensors, moment, monkeypatch):
    create = storage.create_exclusive

    def dying(path, data, **kwargs):
        if not path.endswith(manifest.MANIFEST):
            return create(path, data, **kwargs)
        if moment == "after":
            create(path, data, **kwargs)
        raise OSError(errno.EIO, "killed")

    directory = str(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_exclusive", dying)
        assert not Team(directory, 2).save(1, lambda rank, world: pieces_of(tensors, rank, world)).ok
    torn = [name for name in os.listdir(directory) if name.startswith("step-")]
    assert len(torn) == 1
    if moment == "after":
        assert_holds(checkpoint.find_latest(directory), tensors)
        return
    with pytest.raises(manifest.NotCommitted, match="never finished"):
        Loader(f"{directory}/{torn[0]}")
    assert checkpoint.find_latest(directory) is None
    Team(directory, 2, fence="attempt-2")
    assert not os.path.exists(f"{directory}/{torn[0]}"), "the next attempt collects what a dead one left"


def test_a_full_disk_is_an_error_that_names_path_and_bytes(small_disk, tensors):
    team = Team(str(small_disk), 2)
    assert team.save(1, lambda rank, world: pieces_of(tensors, rank, world)).ok
    big = {"model.big": torch.zeros(2, 2 << 20)}
    team.savers[0].experts = None
    result = team.save(2, lambda rank, world: pieces_of(big, rank, world))
    assert not result.ok and "no space left for 83886" in result.error and "rank-0000" in result.error
    assert len(os.listdir(small_disk)) == 2, "the claim and the first checkpoint"
    assert_holds(checkpoint.find_latest(str(small_disk)), tensors)


def test_a_rank_that_says_nothing_fails_the_save_by_the_deadline(tmp_path, tensors):
    team = Team(str(tmp_path), 3, timeout_s=0.5)
    for rank in (0, 2):
        team.savers[rank].save(1, pieces_of(tensors, rank, 3), STATE)
    result = team.savers[0].wait(20)
    assert not result.ok and "no word from 1 of 3 ranks (1)" in result.error
    assert checkpoint.list_checkpoints(str(tmp_path)) == []


def test_of_two_attempts_only_the_later_commits(root, tensors):
    old, new = Team(root, 2, fence="attempt-1"), Team(root, 2, fence="attempt-1")
    assert new.save(1, lambda rank, world: pieces_of(tensors, rank, world)).ok
    late = old.save(2, lambda rank, world: pieces_of(tensors, rank, world))
    assert not late.ok and "attempt 2 has taken over" in late.error
    assert [path.rsplit("/", 1)[1] for path in checkpoint.list_checkpoints(root)] == ["step-00000001.0002-1"]


def test_attempts_that_start_together_have_different_claims(root):
    savers, num = [], 1 if root.startswith("memory") else 4
    barrier = threading.Barrier(num)

    def start():
        barrier.wait(20)
        savers.append(Saver(root, rank=0, world_size=1, store=None, keep=1, fence="attempt-1", timeout_s=20))

    threads = [threading.Thread(target=start) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({saver._claim.number for saver in savers}) == num


def test_a_duplicate_commit_is_refused(root, tensors, monkeypatch):
    team = Team(root, 1)
    create = storage.create_exclusive

    def beaten(path, data, **kwargs):
        if path.endswith(manifest.MANIFEST):
            create(path, b"the other's", **kwargs)
        create(path, data, **kwargs)

    monkeypatch.setattr(storage, "create_exclusive", beaten)
    result = team.save(1, lambda rank, world: pieces_of(tensors, rank, world))
    assert not result.ok and "manifest.json" in result.error
    assert storage.read_bytes(storage.join(checkpoint.list_checkpoints(root)[0], "manifest.json")) == b"the other's"


def test_the_newest_k_are_kept(root, tensors):
    team = Team(root, 2, keep=2)
    for step in (1, 2, 10, 11):
        assert team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).ok
    kept = checkpoint.list_checkpoints(root)
    assert [path.rsplit("/", 1)[1].split(".")[0] for path in kept] == ["step-00000010", "step-00000011"]
    assert len([name for name in storage.list_dir(root) if name.startswith("step-")]) == 2


def test_what_was_just_saved_is_kept_even_behind_later_steps(tmp_path, tensors):
    team = Team(str(tmp_path), 2, keep=1)
    for step in (10, 5):
        path = team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).path
    assert path in checkpoint.list_checkpoints(str(tmp_path))


def without(text):
    return lambda pieces: [piece for piece in pieces if text not in piece.key]


def plus(key, shape, start, tensor):
    return lambda pieces: [*pieces, Piece(key, shape, start, tensor)]


@pytest.mark.parametrize("change, reason", [
    (without("layers.1.moe.experts.7.w2"), r"layers.1.moe.experts.*w2: 7 of 8 experts present.*\[7\]"),
    (without("optim.exp_avg.layers.2.moe.experts.3"), r"optim.exp_avg.layers.2.*7 of 8.*\[3\]"),
    (without("mtp.0.block.moe"), "mtp.0.block.*0 of 8"),
    (without(".moe.experts."), "3 MoE blocks expected, none present"),
    (plus("model.layers.1.moe.experts.8.w2", (4, 3), 0, torch.zeros(4, 3)), "9 of 8"),
    (plus("model.layers.5.moe.experts.0.w2", (4, 3), 0, torch.zeros(4, 3)), "layers.5 is no MoE block"),
    (plus("model.counts", (5,), 0, torch.arange(5)), "model.counts: handed in twice"),
    (plus("model.counts", (5,), 2, torch.arange(3)), "model.counts: rows 2 to 5 are both in"),
    (plus("model.counts", (5,), 2, torch.zeros(3)), "model.counts: F32.*I64"),
    (plus("model.gap", (5,), 2, torch.zeros(2)), "model.gap: rows 0 to 2 of 5 are in no shard"),
    (plus("model.end", (5,), 0, torch.zeros(2)), "model.end: rows 2 to 5 of 5 are in no shard"),
    (plus("model.out", (4,), 2, torch.zeros(3)), "are not part of a tensor"),
    (plus("model.tail", (4, 2), 0, torch.zeros(4, 3)), "are not part of a tensor"),
    (plus("model/../x", (1,), 0, torch.zeros(1)), "not a plain dotted name"),
    (plus("model.complex", (1,), 0, torch.zeros(1, dtype=torch.complex64)), "complex64 that is not saved"),
])
def test_what_is_not_whole_is_not_committed(tmp_path, tensors, change, reason):
    result = Team(str(tmp_path), 1).save(1, lambda rank, world: change(pieces_of(tensors, rank, world)))
    assert not result.ok and re.search(reason, result.error), result.error
    assert checkpoint.list_checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize("experts, reason", [
    (EXPERTS, "4 of 8 experts present"), (None, "both in rank-00000.safetensors and in rank-00001.safetensors")])
def test_one_rank_s_experts_saved_by_all_is_not_committed(tmp_path, tensors, experts, reason):
    mine = {key: tensor for key, tensor in tensors.items() if not re.search(r"experts\.[4-7]\.", key)}
    result = Team(str(tmp_path), 2, experts=experts).save(1, lambda rank, world: pieces_of(mine, 0, 1))
    assert not result.ok and reason in result.error


def test_a_tcp_store_carries_the_index(tmp_path, tensors):
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False, timeout=timedelta(seconds=20))
    team = Team(str(tmp_path), 4, store=store)
    for step in (1, 2):
        result = team.save(step, lambda rank, world: pieces_of(tensors, rank, world))
        assert result.ok, result.error
    assert_holds(result.path, tensors)


def test_without_an_expected_census_the_trees_must_agree(tmp_path, tensors):
    team = Team(str(tmp_path), 1, experts=None)
    result = team.save(1, lambda rank, world: without("optim.exp_avg.layers.2")(pieces_of(tensors, rank, world)))
    assert not result.ok and "optim.exp_avg.layers.2.moe.experts.*.w13: 0 of 8" in result.error


@pytest.mark.parametrize("state, reason", [({"loss": float("nan")}, "JSON"), ({"x": {1, 2}}, "set is not JSON")])
def test_a_state_that_is_not_json_fails_the_save_not_the_training(tmp_path, tensors, state, reason):
    result = Team(str(tmp_path), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world), state)
    assert not result.ok and reason in result.error


def test_the_newest_whole_checkpoint_is_resumed_and_the_damaged_are_named(root, tensors):
    team, skipped = Team(root, 2), []
    paths = [team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).path for step in (1, 2, 3, 4)]
    shard = storage.join(paths[2], "rank-00001.safetensors")
    storage.write_bytes(shard, storage.read_bytes(shard)[:-4] + b"\1\2\3\4")
    storage.write_bytes(storage.join(paths[3], "manifest.json"), b"{}")
    found = checkpoint.newest_loadable(root, lambda path, reason: skipped.append((path, reason)))
    assert found == paths[1] and [path for path, _ in skipped] == [paths[3], paths[2]]
    assert "rank-00001.safetensors" in skipped[1][1] and "manifest.json" in skipped[0][1]
    assert checkpoint.find_latest(root) == paths[2], "its manifest is sound; only a hash tells"


def test_a_newer_format_is_not_skipped_in_silence(tmp_path, saved):
    file = f"{saved}/manifest.json"
    with open(file) as old:
        raw = json.load(old)
    with open(file, "w") as new:
        json.dump(raw | {"version": 99}, new)
    with pytest.raises(manifest.FutureFormat, match="format version 99"):
        checkpoint.newest_loadable(str(tmp_path), lambda path, reason: None)


def test_nothing_to_resume_is_none_and_a_wrong_path_is_named(root, tmp_path):
    assert checkpoint.find_latest(root) is None
    assert checkpoint.newest_loadable(root, lambda path, reason: None) is None
    with pytest.raises(manifest.CheckpointNotFound, match="no checkpoint here"):
        Loader(storage.join(root, "nowhere"))


def test_a_person_may_name_checkpoint_directory_or_run(tmp_path, tensors):
    run = tmp_path / "run"
    path = Team(str(run / "checkpoints"), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world)).path
    for name in (path, str(run / "checkpoints"), str(run)):
        assert checkpoint.newest_under(name) == path
    assert checkpoint.newest_under(str(tmp_path)) is None


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(saved):
    manifest.check_model(Loader(saved).manifest, {"dim": 8})
    with pytest.raises(manifest.OtherModel, match=r"n_layers=4 \(saved with 3\)") as caught:
        manifest.check_model(Loader(saved).manifest, {"dim": 8, "n_layers": 4})
    assert caught.value.differing == {"n_layers": (3, 4)} and caught.value.exit_code == 2


def test_a_place_that_cannot_be_written_is_refused_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=10)
    with pytest.raises(NotFit, match="Read-only"):
        Team(str(small_disk), 1)


def test_storage_without_exclusive_creation_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "create_exclusive", storage.write_bytes)
    with pytest.raises(NotFit, match="lets two writers create the same file"):
        Team(str(tmp_path), 1)


def test_nothing_is_pickled():
    words = r"pickle|torch\.load\(|weights_only=False|allow_pickle=True"
    for name in ("storage", "manifest", "shards", "claim", "checkpoint"):
        with open(f"orchestrator/train/{name}.py") as file:
            assert not re.search(words, file.read().replace("Nothing is pickled", "")), name
