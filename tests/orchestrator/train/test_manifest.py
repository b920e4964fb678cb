"""A manifest is believed only when every rule of its format holds."""

import copy
import json
import random

import pytest

from orchestrator.train import manifest, storage

WHOLE = {
    "format": "sparing-checkpoint", "version": 1, "step": 4, "attempt": 1, "fence": "attempt-1", "state": {"tokens": 9},
    "files": {"rank-00000.safetensors": {"bytes": 500, "sha256": "0" * 64},
              "rank-00001.safetensors": {"bytes": 500, "sha256": "1" * 64}},
    "experts": {"layers.0": 2},
    "tensors": {
        "model.norm.weight": {"dtype": "F32", "shape": [4], "pieces": [["rank-00000.safetensors", 0, 3],
                                                                       ["rank-00001.safetensors", 3, 4]]},
        "model.step": {"dtype": "I64", "shape": [], "pieces": [["rank-00000.safetensors", 0, 1]]},
        "model.none": {"dtype": "F32", "shape": [0, 4], "pieces": []},
        "model.layers.0.moe.experts.0.w2": {"dtype": "BF16", "shape": [2, 2],
                                            "pieces": [["rank-00000.safetensors", 0, 2]]},
        "model.layers.0.moe.experts.1.w2": {"dtype": "BF16", "shape": [2, 2],
                                            "pieces": [["rank-00001.safetensors", 0, 2]]}}}
FILE = WHOLE["files"]["rank-00000.safetensors"]
NORM = WHOLE["tensors"]["model.norm.weight"]
STATE = b'"tokens": 9'


def text(value):
    return json.dumps(value).encode()


def changed(*path, to):
    """WHOLE with the value at `path` replaced."""
    found = copy.deepcopy(WHOLE)
    place = found
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return found


def lacking(name):
    return {key: value for key, value in WHOLE.items() if key != name}


def norm(field, to):
    return changed("tensors", "model.norm.weight", field, to=to)


def pieces(*spans):
    return norm("pieces", [list(span) for span in spans])


def shard(field, to):
    return changed("files", "rank-00000.safetensors", field, to=to)


def test_a_whole_manifest_is_read_and_written_back_the_same():
    found = manifest.parse(text(WHOLE))
    assert found.experts == {"layers.0": 2} and found.tensors["model.norm.weight"].pieces[1].start == 3
    assert manifest.parse(manifest.dump(found)) == found


@pytest.mark.parametrize("name", [
    "../x.safetensors", "/abs.safetensors", "..\\x.safetensors", "a/b.safetensors", "s3://o/x.safetensors",
    "nul\0.safetensors", "x" * 300 + ".safetensors", "x.safetensors\n", "x.pt", ".safetensors", ""],
    ids=lambda name: repr(name[:20]))
def test_a_file_name_that_could_leave_the_directory_is_refused(name):
    with pytest.raises(ValueError, match="plain"):
        manifest.parse(text(changed("files", name, to=FILE)))


@pytest.mark.parametrize("data, rule", [
    (b"", None), (b"\xff\xfe", None), (b"null", "format"), (b"[]", "format"), (b"{}", "format"),
    (text(WHOLE)[:-1], None), (text(WHOLE) + b"x", None), (b"[" * 100_000, "nested"),
    (text(WHOLE)[:-1] + b', "step": 5}', "twice"),
    (text(WHOLE).replace(STATE, b'"tokens": NaN'), "NaN"),
    (text(WHOLE).replace(STATE, b'"tokens": -Infinity'), "Infinity"),
    (text(WHOLE).replace(STATE, b'"tokens": 1e999'), "finite"),
    (text(WHOLE).replace(STATE, b'"tokens": ' + b"9" * 10_000), None)], ids=map(str, range(13)))
def test_what_is_not_strict_json_is_refused(data, rule):
    with pytest.raises(ValueError, match=rule):
        manifest.parse(data)


@pytest.mark.parametrize("raw, rule", [
    (changed("format", to="other"), "format"), (changed("version", to="1"), "version"),
    (changed("version", to=True), "version"), (changed("version", to=3), "upgrade"),
    (changed("version", to=2), "exactly"),
    (changed("version", to=2) | {"sha256": "0" * 64}, "not at its end"),
    (changed("extra", to=1), "exactly"), (lacking("state"), "exactly"), (lacking("experts"), "exactly"),
    (changed("step", to=-1), "step"), (changed("step", to=4.0), "step"), (changed("step", to=1 << 70), "step"),
    (changed("state", to=[]), "state"), (changed("fence", to=None), "fence"), (changed("files", to=[]), "files"),
    (changed("tensors", to=None), "tensors"), (changed("experts", to=[["layers.0", 2]]), "experts"),
    (changed("experts", "layers.0", to=3), "declared"), (changed("experts", "layers.1", to=2), "declared"),
    (shard("sha256", "0" * 63), "sha256"), (shard("sha256", "G" * 64), "sha256"), (shard("bytes", "500"), "integer"),
    (shard("bytes", 20), "need 28 bytes"), (shard("url", "s3://x"), "exactly"),
    (changed("tensors", "a/b", to=NORM), "plain"), (changed("tensors", "", to=NORM), "plain"),
    (changed("tensors", "x" * 501, to=NORM), "plain"),
    (norm("dtype", "F33"), "dtype"), (norm("dtype", ["F32"]), "dtype"),
    (norm("shape", "4"), "shape"), (norm("shape", [4.0]), "integer"), (norm("shape", [4] + [1] * 8), "shape"),
    (norm("shape", [4, 1 << 61]), "bytes"), (norm("shape", [5]), "rows 4 to 5 of 5 are in no shard"),
    (pieces(), "rows 0 to 4 of 4 are in no shard"),
    (pieces(["rank-00000.safetensors", 0, 2], ["rank-00001.safetensors", 3, 4]), "rows 2 to 3 of 4 are in no shard"),
    (pieces(["rank-00000.safetensors", 0, 3], ["rank-00001.safetensors", 2, 4]), "rows 2 to 3 are both in"),
    (pieces(["rank-00000.safetensors", 0, 4], ["rank-00001.safetensors", 0, 4]), "rows 0 to 4 are both in"),
    (pieces(["rank-00000.safetensors", 0, 5]), "up to row 5 of 4"),
    (pieces(["rank-00000.safetensors", -1, 4]), "integer"), (pieces(["rank-00000.safetensors", 0, "4"]), "integer"),
    (pieces(["rank-00000.safetensors", 0, 0], ["rank-00000.safetensors", 0, 4]), "integer"),
    (pieces(["rank-00009.safetensors", 0, 4]), "file of this checkpoint"), (pieces([0, 0, 4]), "file of this"),
    (pieces(["rank-00000.safetensors", 0]), "file of this"),
    (changed("tensors", "model.layers.0.moe.experts.01.w2", to=NORM), "plain number"),
    (changed("tensors", "model.layers.0.moe.experts.9.w2", to=NORM), "present"),
    (changed("tensors", "optim.layers.0.moe.experts.0.w2", to=NORM), "1 of 2 experts present")],
    ids=map(str, range(48)))
def test_a_broken_rule_is_named(raw, rule):
    with pytest.raises(ValueError, match=rule):
        manifest.parse(text(raw))


def test_a_newer_version_is_told_apart_from_damage(tmp_path):
    (tmp_path / "manifest.json").write_bytes(text(changed("version", to=3)))
    with pytest.raises(manifest.FutureFormat, match="manifest.json: format version 3.*upgrade"):
        manifest.read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_bytes(text(changed("step", to=-1)))
    with pytest.raises(manifest.CorruptManifest, match="manifest.json: step: .*use an older checkpoint"):
        manifest.read_manifest(str(tmp_path))


def test_a_huge_manifest_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(storage, "read_bytes", None)
    with pytest.raises(manifest.CorruptManifest, match="1099511627776 bytes"):
        manifest.read_manifest(str(tmp_path))


def test_no_mutation_of_the_text_is_more_than_a_refusal():
    whole = manifest.dump(manifest.parse(text(WHOLE)))
    chance = random.Random(0)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            manifest.parse(bytes(data))
        except ValueError:
            pass
