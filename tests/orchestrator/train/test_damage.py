"""Damaged and malicious checkpoints: each is refused with the file named, runs nothing, takes no memory on its word.

Damage comes after the commit, so hashes find it. An attacker writes the hashes too: there the formats must hold.
"""

import hashlib
import json
import os
import pickle
import random
import re
import struct
from pathlib import Path

import pytest
import torch

from orchestrator.errors import BadRequest
from orchestrator.train import manifest
from orchestrator.train.checkpoint import Saver
from orchestrator.train.manifest import CorruptManifest, CorruptShard, Damaged, MissingShard, TruncatedShard
from orchestrator.train.shards import Loader, Piece
from tests.orchestrator.train.team import newest_loadable

FLIPS = int(os.environ.get("BIT_FLIPS", 300))
SHARD = "rank-00000.safetensors"


@pytest.fixture
def saved(tmp_path):
    """The path of a small whole checkpoint."""
    saver = Saver(str(tmp_path), rank=0, world_size=1, store=None, keep=0, fence="attempt", timeout_s=60)
    pieces = [Piece("model.a", (16, 8), 0, torch.randn(16, 8)), Piece("model.b", (), 0, torch.tensor(1.0))]
    saver.save(3, pieces, {"step": 3, "lr": 0.25}, background=False)
    return saver.wait().path


def read_all(path):
    loader = Loader(path)
    loader.check()
    for key in loader.keys():
        loader.read(key)


def test_a_single_flipped_bit_anywhere_is_refused_with_the_file_named(saved):
    chance = random.Random(0)
    names = sorted(os.listdir(saved))
    for _ in range(FLIPS):
        name = chance.choice(names)
        with open(f"{saved}/{name}", "rb") as file:
            whole = file.read()
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        with open(f"{saved}/{name}", "wb") as file:
            file.write(flipped)
        with pytest.raises(Damaged, match=name):
            read_all(saved)
        with open(f"{saved}/{name}", "wb") as file:
            file.write(whole)
    read_all(saved)


def test_every_bit_of_a_manifest_counts(saved):
    with open(f"{saved}/manifest.json", "rb") as file:
        whole = file.read()
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError):
                manifest.parse(bytes(flipped))


DAMAGE = {
    "shard empty": (SHARD, lambda whole: b"", TruncatedShard),
    "shard cut by a byte": (SHARD, lambda whole: whole[:-1], TruncatedShard),
    "shard cut in its header": (SHARD, lambda whole: whole[:20], TruncatedShard),
    "shard longer": (SHARD, lambda whole: whole + b"\0", CorruptShard),
    "shard of zeros": (SHARD, lambda whole: bytes(len(whole)), CorruptShard),
    "shard's blocks exchanged": (SHARD, lambda whole: whole[:-64] + whole[-32:] + whole[-64:-32], CorruptShard),
    "shard gone": (SHARD, None, MissingShard),
    "manifest empty": ("manifest.json", lambda whole: b"", CorruptManifest),
    "manifest cut": ("manifest.json", lambda whole: whole[: len(whole) // 2], CorruptManifest),
    "manifest of zeros": ("manifest.json", lambda whole: bytes(len(whole)), CorruptManifest),
    "manifest longer": ("manifest.json", lambda whole: whole + b"{}", CorruptManifest),
    "manifest is a shard": ("manifest.json", lambda whole: struct.pack("<Q", 8) + b"{}      ", CorruptManifest),
    "manifest edited": ("manifest.json", lambda whole: whole.replace(b'"lr":0.25', b'"lr":0.26'), CorruptManifest),
    "manifest edited, hash left out": ("manifest.json", lambda whole: whole[: -manifest.DIGEST_BYTES] + b"}",
                                       CorruptManifest),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_kind_of_damage_is_refused_with_the_file_named(saved, name):
    file, change, error = DAMAGE[name]
    with open(f"{saved}/{file}", "rb") as whole:
        data = whole.read()
    os.unlink(f"{saved}/{file}")
    if change is not None:
        with open(f"{saved}/{file}", "wb") as damaged:
            damaged.write(change(data))
    with pytest.raises(error, match=file):
        read_all(saved)


def test_a_checkpoint_without_its_manifest_was_never_one(saved, tmp_path):
    os.unlink(f"{saved}/manifest.json")
    with pytest.raises(manifest.NotCommitted, match="never finished"):
        read_all(saved)
    assert newest_loadable(str(tmp_path), lambda path, reason: None) is None


def forge(path, *, shard=None, name=SHARD, num_bytes=None, shape=(16, 8)):
    """Write what an attacker would: whatever bytes, with a manifest whose hashes fit them."""
    with open(f"{path}/manifest.json", "rb") as file:
        raw = json.loads(file.read())
    if shard is not None:
        with open(f"{path}/{SHARD}", "wb") as file:
            file.write(shard)
    with open(f"{path}/{SHARD}", "rb") as file:
        data = file.read()
    raw["files"] = {name: {"bytes": len(data) if num_bytes is None else num_bytes,
                           "sha256": hashlib.sha256(data).hexdigest()}}
    raw["tensors"] = {"model.a": {"dtype": "F32", "shape": shape, "pieces": [[name, 0, shape[0]]]}}
    del raw["sha256"]
    text = json.dumps(raw, separators=(",", ":")).encode()[:-1]
    with open(f"{path}/manifest.json", "wb") as file:
        file.write(text + f',"sha256":"{hashlib.sha256(text).hexdigest()}"}}'.encode())


def safetensors(header, body=bytes(512)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_what_is_forged_well_is_read(saved):
    whole = {"model.a": {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]}}
    forge(saved, shard=safetensors(whole))
    assert torch.equal(Loader(saved).read("model.a"), torch.zeros(16, 8))


class Payload:
    """Unpickled, it makes a directory beside the checkpoint."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("kind", ("pickle", "torch.save"))
def test_a_pickled_shard_is_refused_and_not_run(saved, tmp_path, kind):
    canary = str(tmp_path / "canary")
    if kind == "pickle":
        shard = pickle.dumps(Payload(canary)) + bytes(1024)
    else:
        torch.save({"model.a": torch.zeros(16, 8), "x": Payload(canary)}, tmp_path / "payload")
        shard = (tmp_path / "payload").read_bytes()
    forge(saved, shard=shard)
    with pytest.raises(CorruptShard, match=SHARD):
        Loader(saved).read("model.a")
    assert not os.path.exists(canary)


def entry(**changes):
    return {"model.a": {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]} | changes}


@pytest.mark.parametrize("shard", [
    struct.pack("<Q", 1 << 62) + bytes(600), struct.pack("<Q", (1 << 64) - 1) + bytes(600),
    struct.pack("<Q", 120 << 20) + b"{" + bytes(600), bytes(7) * 100, safetensors(b"[" * 1000),
    safetensors(entry(data_offsets=[0, 1 << 60])), safetensors(entry(data_offsets=[8, 4])),
    safetensors(entry(shape=[1 << 40, 8])), safetensors(entry(shape=[16, 7], data_offsets=[0, 448])),
    safetensors(entry(dtype="F33")), safetensors(entry(dtype="I32")),
    safetensors(entry() | {"model.z": entry()["model.a"]}), safetensors({}), safetensors(b"\xff" * 40)],
    ids=("header of 4 EiB", "header of 16 EiB", "header beyond the file", "no header", "nested header",
         "offsets beyond the file", "offsets backwards", "false shape", "another shape", "unknown type", "another type",
         "overlapping tensors", "no tensors", "not JSON"))
def test_a_shard_that_breaks_its_format_is_refused_whatever_its_hash_says(saved, shard):
    forge(saved, shard=shard)
    with pytest.raises(CorruptShard, match=SHARD):
        Loader(saved).read("model.a")


@pytest.mark.parametrize("name", ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors",
                                  "s3://bucket/x.safetensors", "..\\x.safetensors", "..", ".safetensors"))
def test_no_path_leads_out_of_the_checkpoint(saved, name):
    forge(saved, name=name)
    with pytest.raises(CorruptManifest, match="manifest.json: files: .* is not a plain"):
        Loader(saved)


@pytest.mark.parametrize("num_bytes, error", [(511, CorruptManifest), (1 << 50, TruncatedShard), (600, TruncatedShard),
                                              (590, CorruptShard)])
def test_wrong_sizes_in_a_manifest_are_refused(saved, num_bytes, error):
    whole = safetensors(entry())
    forge(saved, shard=whole, num_bytes=num_bytes)
    with pytest.raises(error):
        Loader(saved).read("model.a")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of a process's memory")
def test_no_memory_is_taken_on_the_word_of_a_manifest(saved):
    """A tensor of 2 TiB in a shard that says to be as large, and is not."""
    forge(saved, shape=(1 << 30, 512), num_bytes=1 << 41)
    Path("/proc/self/clear_refs").write_text("5")  # the peak until now is forgotten
    before = peak_kib()
    with pytest.raises(TruncatedShard, match=SHARD):
        Loader(saved).read("model.a")
    assert peak_kib() - before < 64 << 10


def peak_kib() -> int:
    """The most memory of this process at once."""
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def test_a_link_to_elsewhere_is_refused(saved, tmp_path):
    os.rename(f"{saved}/{SHARD}", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", f"{saved}/{SHARD}")
    with pytest.raises(CorruptShard, match="symbolic link"):
        read_all(saved)


def test_the_same_file_names_are_refused_when_writing(tmp_path):
    saver = Saver(str(tmp_path), rank=0, world_size=1, store=None, keep=0, fence="attempt", timeout_s=60)
    saver.save(1, [Piece("../model.a", (1,), 0, torch.zeros(1))], {}, background=False)
    assert "not a plain dotted name" in saver.wait().error


def test_a_refusal_is_one_line(saved):
    forge(saved, name="../x.safetensors")
    with pytest.raises((Damaged, BadRequest)) as caught:
        Loader(saved)
    assert "\n" not in str(caught.value) and "use an older checkpoint" in str(caught.value)
