"""The commit of a checkpoint: what is committed is whole, and exactly one attempt commits it."""

import errno
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
from orchestrator.train import checkpoint, lineage, manifest, storage
from orchestrator.train.checkpoint import Saver
from orchestrator.train.shards import Loader, Piece
from tests.orchestrator.train.team import EXPERTS, STATE, Team, assert_holds, flip_bit, pieces_of


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
    assert lineage.list_checkpoints(root) == [first.path] and lineage.find_latest(root) == first.path
    assert [name for name in storage.list_dir(root) if name.startswith("step-")] == [first.path.rsplit("/", 1)[1]]
    third = team.save(3, lambda rank, world: pieces_of(tensors, rank, world))
    assert third.ok and lineage.find_latest(root) == third.path
    assert_holds(first.path, tensors)


def test_a_write_that_lies_is_found_before_it_is_committed(tmp_path, tensors, monkeypatch):
    write = storage.write_chunks

    def lying(path, chunks, **kwargs):
        write(path, chunks, **kwargs)
        flip_bit(path, random.Random(1))

    monkeypatch.setattr(storage, "write_chunks", lying)
    result = Team(str(tmp_path), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world))
    assert not result.ok and "corrupt" in result.error
    assert lineage.find_latest(str(tmp_path)) is None


def test_a_manifest_that_reads_back_as_another_is_no_success(tmp_path, tensors, monkeypatch):
    create = storage.create_exclusive

    def lying(path, data, **kwargs):
        create(path, data[:-1] + b" " if path.endswith(manifest.MANIFEST) else data, **kwargs)

    monkeypatch.setattr(storage, "create_exclusive", lying)
    result = Team(str(tmp_path), 1).save(1, lambda rank, world: pieces_of(tensors, rank, world))
    assert not result.ok and "reads back as something else" in result.error


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
        assert_holds(lineage.find_latest(directory), tensors)
        return
    with pytest.raises(manifest.NotCommitted, match="never finished"):
        Loader(f"{directory}/{torn[0]}")
    assert lineage.find_latest(directory) is None
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
    assert_holds(lineage.find_latest(str(small_disk)), tensors)


def test_a_rank_that_says_nothing_fails_the_save_by_the_deadline(tmp_path, tensors):
    team = Team(str(tmp_path), 3, timeout_s=2)
    for rank in (2, 0):
        team.savers[rank].save(1, pieces_of(tensors, rank, 3), STATE)
    result = team.savers[0].wait(120)
    assert not result.ok and re.search(r"no word from . of 3 ranks \(1(, 2)?\)", result.error)  # 2 may be late
    assert lineage.list_checkpoints(str(tmp_path)) == []


def test_of_two_attempts_only_the_later_commits(root, tensors):
    old, new = Team(root, 2, fence="attempt-1"), Team(root, 2, fence="attempt-1")
    assert new.save(1, lambda rank, world: pieces_of(tensors, rank, world)).ok
    late = old.save(2, lambda rank, world: pieces_of(tensors, rank, world))
    assert not late.ok and "attempt 2 has taken over" in late.error
    assert [path.rsplit("/", 1)[1] for path in lineage.list_checkpoints(root)] == ["step-00000001.0002-1"]
    assert [name for name in storage.list_dir(root) if name.startswith("attempt")] == ["attempt-0002.json"]


def test_attempts_that_start_together_have_different_claims(root):
    savers, num = [], 1 if root.startswith("memory") else 4
    barrier = threading.Barrier(num)

    def start():
        barrier.wait(60)
        savers.append(Saver(root, rank=0, world_size=1, store=None, keep=1, fence="attempt-1", timeout_s=120))

    threads = [threading.Thread(target=start) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
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
    assert storage.read_bytes(storage.join(lineage.list_checkpoints(root)[0], "manifest.json")) == b"the other's"


def test_the_newest_k_are_kept(root, tensors):
    team = Team(root, 2, keep=2)
    for step in (1, 2, 10, 11):
        assert team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).ok
    kept = lineage.list_checkpoints(root)
    assert [path.rsplit("/", 1)[1].split(".")[0] for path in kept] == ["step-00000010", "step-00000011"]
    assert len([name for name in storage.list_dir(root) if name.startswith("step-")]) == 2


def test_what_was_just_saved_is_kept_even_behind_later_steps(tmp_path, tensors):
    team = Team(str(tmp_path), 2, keep=1)
    for step in (10, 5):
        path = team.save(step, lambda rank, world: pieces_of(tensors, rank, world)).path
    assert path in lineage.list_checkpoints(str(tmp_path))


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
    assert lineage.list_checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize("experts, reason", [
    (EXPERTS, "4 of 8 experts present"), (None, "both in rank-00000.safetensors and in rank-00001.safetensors")])
def test_one_rank_s_experts_saved_by_all_is_not_committed(tmp_path, tensors, experts, reason):
    mine = {key: tensor for key, tensor in tensors.items() if not re.search(r"experts\.[4-7]\.", key)}
    result = Team(str(tmp_path), 2, experts=experts).save(1, lambda rank, world: pieces_of(mine, 0, 1))
    assert not result.ok and reason in result.error


def test_a_tcp_store_carries_the_index(tmp_path, tensors):
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False, timeout=timedelta(seconds=120))
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


def test_a_place_that_cannot_be_written_is_refused_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=60)
    with pytest.raises(NotFit, match="Read-only"):
        Team(str(small_disk), 1)


def test_storage_without_exclusive_creation_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "create_exclusive", storage.write_bytes)
    with pytest.raises(NotFit, match="lets two writers create the same file"):
        Team(str(tmp_path), 1)


def test_a_manifest_that_nobody_would_read_is_not_committed(tmp_path, tensors, monkeypatch):
    team = Team(str(tmp_path), 1, keep=1)
    first = team.save(1, lambda rank, world: pieces_of(tensors, rank, world))
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST_BYTES", 1000)
    second = team.save(2, lambda rank, world: pieces_of(tensors, rank, world))
    assert not second.ok and "must have at most 1,000; use" in second.error
    assert lineage.list_checkpoints(str(tmp_path)) == [first.path]


def test_later_steps_that_were_resumed_behind_do_not_push_out_what_is_whole(tmp_path, tensors):
    """A run went on from step 2, since 8 and 9 were damaged: of the steps since, the newest two are kept."""
    early = Team(str(tmp_path), 1)
    for step in (2, 8, 9):
        early.save(step, lambda rank, world: pieces_of(tensors, rank, world))
    team = Team(str(tmp_path), 1, keep=2, fence="attempt-2")
    for step in (3, 4, 5):
        team.save(step, lambda rank, world: pieces_of(tensors, rank, world))
    assert [lineage.step_of(path) for path in lineage.list_checkpoints(str(tmp_path))] == [4, 5, 8, 9]
