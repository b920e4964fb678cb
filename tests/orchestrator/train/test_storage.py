"""Storage keeps its promises on a disk, in memory, and on S3 over HTTP (a moto server on this machine)."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from orchestrator.errors import BadRequest, NotFit
from orchestrator.train import storage


def test_what_is_written_is_read(root, tmp_path):
    path = storage.join(root, "a", "b.bin")
    storage.write_bytes(path, b"0123456789")
    assert storage.exists(path) and storage.size(path) == 10
    assert storage.read_bytes(path) == b"0123456789" == b"".join(storage.read_chunks(path))
    assert storage.read_range(path, 3, 4) == b"3456"
    storage.write_chunks(path, iter([b"ab", memoryview(b"cd")]), num_bytes=4)
    assert storage.read_bytes(path) == b"abcd"
    with storage.open_read(path) as file:
        file.seek(1)
        assert file.read(2) == b"bc"
    source = tmp_path / "source"
    source.write_bytes(b"upload")
    storage.upload(str(source), storage.join(root, "a", "c.bin"))
    storage.download(storage.join(root, "a", "c.bin"), str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"upload"


def test_directories_list_and_vanish(root):
    for name in ("d/x", "d/y", "d/e/z"):
        storage.write_bytes(storage.join(root, name), b"1")
    folder = storage.join(root, "d")
    assert storage.list_dir(folder) == ["e", "x", "y"]
    assert [path.rsplit("/", 1)[1] for path in storage.glob(storage.join(folder, "*"))] == ["x", "y"]
    assert [storage.read_bytes(path) for path in storage.glob(storage.join(folder, "**", "z"))] == [b"1"]
    storage.remove(storage.join(folder, "x"))
    storage.remove(storage.join(folder, "x"))
    assert storage.list_dir(folder) == ["e", "y"]
    storage.remove_tree(folder)
    storage.remove_tree(folder)
    assert storage.list_dir(folder) == [] and not storage.exists(storage.join(folder, "y"))


def test_home_is_meant_by_a_tilde_that_no_shell_expands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/runs/x", b"1")
    assert storage.read_bytes(f"{tmp_path}/runs/x") == b"1" and list(storage.glob("~/runs/*")) == [f"{tmp_path}/runs/x"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFit, match="file: cannot be made .*; choose another directory"):
        storage.write_bytes(f"{tmp_path}/file/x", b"1")


def test_a_listing_is_never_stale(root):
    assert storage.list_dir(storage.join(root, "new")) == []
    writer = threading.Thread(target=storage.write_bytes, args=(storage.join(root, "new", "x"), b""))
    writer.start()
    writer.join(60)
    assert storage.list_dir(storage.join(root, "new")) == ["x"]


def test_absent_files_say_so(root):
    path = storage.join(root, "absent")
    assert not storage.exists(path)
    for call in (storage.read_bytes, storage.size, lambda p: list(storage.read_chunks(p))):
        with pytest.raises(FileNotFoundError):
            call(path)


def test_a_short_range_is_an_error_not_fewer_bytes(root):
    path = storage.join(root, "short")
    storage.write_bytes(path, b"0123456789")
    with pytest.raises(storage.ShortRead, match="asked for 8 bytes at 5, got 5"):
        storage.read_range(path, 5, 8)


def test_a_write_that_raises_leaves_the_old_file_and_nothing_else(root):
    path = storage.join(root, "w", "file")
    storage.write_bytes(path, b"old")

    def torn():
        yield b"new but torn"
        raise RuntimeError("scripted")

    with pytest.raises(RuntimeError, match="scripted"):
        storage.write_chunks(path, torn(), num_bytes=99)
    assert storage.read_bytes(path) == b"old" and storage.list_dir(storage.join(root, "w")) == ["file"]


@pytest.mark.parametrize("kind", ("local", "s3"))
def test_of_many_exclusive_creators_exactly_one_wins(kind, request, tmp_path):
    root = str(tmp_path) if kind == "local" else storage.join(request.getfixturevalue("s3"), tmp_path.name)
    path, won, barrier = storage.join(root, "x", "claim"), [], threading.Barrier(4)

    def create(number):
        barrier.wait(60)
        try:
            storage.create_exclusive(path, b"writer %d" % number)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(won) == 1 and storage.read_bytes(path) == b"writer %d" % won[0]
    assert storage.list_dir(storage.join(root, "x")) == ["claim"]


def test_a_second_exclusive_create_is_refused(root):
    path = storage.join(root, "once")
    storage.create_exclusive(path, b"first")
    with pytest.raises(FileExistsError):
        storage.create_exclusive(path, b"second")
    assert storage.read_bytes(path) == b"first"


class FlakyStore:
    """A filesystem whose puts fail as scripted, after (`lands`) or before the bytes have arrived."""

    def __init__(self, errors, *, lands=False):
        self.errors, self.lands, self.files = list(errors), lands, {}

    def pipe_file(self, key, data, mode="overwrite"):
        if mode == "create" and key in self.files:
            raise FileExistsError(key)
        if self.errors:
            if self.lands:
                self.files[key] = data
            raise self.errors.pop(0)
        self.files[key] = data

    def cat_file(self, key):
        return self.files[key]

    def plug_in(self, monkeypatch):
        monkeypatch.setattr(storage, "_filesystem", lambda path: (self, path))
        return self


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "SlowDown"), OSError(errno.EREMOTEIO, "InternalError"),
                                   ConnectionResetError("reset"), TimeoutError("read")], ids=str)
def test_transient_errors_are_retried(error, monkeypatch):
    store = FlakyStore([error, error]).plug_in(monkeypatch)
    storage.write_bytes("s3://bucket/key", b"x", retry_s=20)
    assert store.files == {"s3://bucket/key": b"x"}


def test_an_outage_longer_than_the_retries_is_a_transient_error(monkeypatch):
    FlakyStore([OSError(errno.EBUSY, "SlowDown")] * 1000).plug_in(monkeypatch)
    with pytest.raises(storage.StorageUnavailable, match="s3://bucket/key.*SlowDown") as caught:
        storage.write_bytes("s3://bucket/key", b"x", retry_s=0.3)
    assert caught.value.exit_code == 33


def test_denied_is_not_retried(monkeypatch):
    store = FlakyStore([PermissionError("AccessDenied"), PermissionError("again")]).plug_in(monkeypatch)
    with pytest.raises(storage.StorageDenied, match="AccessDenied"):
        storage.write_bytes("s3://bucket/key", b"x", retry_s=20)
    assert len(store.errors) == 1


def test_the_winner_whose_answer_was_lost_knows_that_it_won(monkeypatch):
    FlakyStore([ConnectionResetError("reset")], lands=True).plug_in(monkeypatch)
    storage.create_exclusive("s3://bucket/key", b"mine", retry_s=20)
    with pytest.raises(FileExistsError):
        storage.create_exclusive("s3://bucket/key", b"theirs", retry_s=20)


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(BadRequest, match="s3://no-such-bucket/x.*create the bucket"):
        storage.write_bytes("s3://no-such-bucket/x", b"1", retry_s=5)


def test_a_missing_package_is_named(monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(BadRequest, match="s3://bucket/key.*pip install s3fs"):
        storage.exists("s3://bucket/key")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(BadRequest, match="nosuch://x/y"):
        storage.exists("nosuch://x/y")


def test_a_full_disk_names_path_and_bytes(small_disk):
    path = f"{small_disk}/big"
    with pytest.raises(storage.StorageFull, match="big: no space left for 8388608 bytes") as caught:
        storage.write_bytes(path, bytes(8 << 20))
    assert caught.value.exit_code == 3 and os.listdir(small_disk) == []


def test_a_read_only_place_is_refused(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60)
    with pytest.raises(storage.StorageDenied, match="Read-only"):
        storage.write_bytes(f"{small_disk}/x", b"1")


def test_free_bytes_counts_where_the_path_will_be(tmp_path):
    assert storage.free_bytes(str(tmp_path / "not" / "yet")) > 0
    assert storage.free_bytes("memory://x") is None
