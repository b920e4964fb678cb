"""Bytes by local path or fsspec URL (`memory://`, `s3://`, ...): the only file that imports fsspec.

A write is whole or absent: locally a temporary file, fsync and rename; on an object store one put of complete bytes,
because a stream that is closed by an exception commits what it has. Object stores are retried here for minutes, since
their own clients give up after seconds. Listings are never cached. Endpoint and credentials come from the environment
(`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...; fsspec itself reads options from `FSSPEC_S3_...`).

Callers see FileNotFoundError and FileExistsError, or a SparingError that names the path and the remedy.
`retry_s` is how long, in seconds, a failing object store is asked again; local disks are not asked twice.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from glob import iglob
from typing import Any, BinaryIO, TypeVar

import tenacity

from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, Transient

RETRY_S = 300.0
CHUNK_BYTES = 16 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO)}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_VERSIONS = ("ETag", "etag", "Content-MD5", "md5Hash", "LastModified", "last_modified", "updated", "created", "mtime")
_T = TypeVar("_T")


class StorageFull(NotFit):
    """No space or quota left for a write."""


class StorageDenied(NotFit):
    """Permission denied, or a read-only place."""


class StorageUnavailable(Transient):
    """An object store that did not answer, or answered with a transient error, until the retries were used up."""


class ShortRead(NotTrustworthy):
    """A file ends before the bytes that were asked for."""


def local_path(path: str) -> str | None:
    """The system's path, or None where `path` is no local one. No shell expands the ~ of `run.dir=~/runs`."""
    for scheme in ("file://", "local://"):
        if path.startswith(scheme):
            return path.removeprefix(scheme)
    return None if "://" in path else os.path.expanduser(path)


def join(path: str, *names: str) -> str:
    for name in names:
        path = f"{path}{name}" if path.endswith("/") else f"{path}/{name}"
    return path


def exists(path: str, *, retry_s: float = RETRY_S) -> bool:
    if (local := local_path(path)) is not None:
        return os.path.exists(local)
    return _remote(path, lambda fs, key: fs.exists(key), retry_s)


def size(path: str, *, retry_s: float = RETRY_S) -> int:
    """Bytes of a file."""
    if (local := local_path(path)) is not None:
        with _typed_errors(path):
            return os.path.getsize(local)
    return int(_remote(path, lambda fs, key: fs.info(key), retry_s)["size"])


def free_bytes(path: str) -> int | None:
    """Room left where `path` is or will be; None on an object store."""
    if (local := local_path(path)) is None:
        return None
    local = os.path.abspath(local)
    while not os.path.exists(local):
        local = os.path.dirname(local)
    return shutil.disk_usage(local).free


def list_dir(path: str, *, retry_s: float = RETRY_S) -> list[str]:
    """Sorted names (not paths) directly under `path`; empty if there is no such directory."""
    try:
        if (local := local_path(path)) is not None:
            with _typed_errors(path):
                return sorted(os.listdir(local))
        found = _remote(path, lambda fs, key: [(key, name) for name in fs.ls(key, detail=False)], retry_s)
    except FileNotFoundError:
        return []
    return sorted({name.rstrip("/").rsplit("/", 1)[-1] for key, name in found if name.strip("/") != key.strip("/")})


def glob(pattern: str, *, retry_s: float = RETRY_S) -> dict[str, tuple[int, int | str]]:
    """The files that match, sorted, each with its bytes and what changes whenever its content does: its time, or what a
    store says of its version, in the listing already, without a question for each. `**` descends. URLs keep their
    scheme."""
    if (local := local_path(pattern)) is not None:
        stats = {path: os.stat(path) for path in sorted(iglob(local, recursive=True)) if os.path.isfile(path)}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
    found = _remote(pattern, lambda fs, key: {
        fs.unstrip_protocol(name): info if info.get("size") is not None else fs.info(name)
        for name, info in fs.glob(key, detail=True).items() if info["type"] == "file"}, retry_s)
    return {name: (int(info["size"]), hashlib.sha256(repr([info.get(key) for key in _VERSIONS]).encode()).hexdigest())
            for name, info in sorted(found.items())}


@contextlib.contextmanager
def open_read(path: str) -> Iterator[BinaryIO]:
    """A seekable binary file for readers that insist on one (Parquet). Only opening is retried."""
    if (local := local_path(path)) is not None:
        with _typed_errors(path), open(local, "rb") as file:
            yield file
        return
    with _remote(path, lambda fs, key: fs.open(key, "rb"), RETRY_S) as file:
        yield file


def read_bytes(path: str, *, retry_s: float = RETRY_S) -> bytes:
    if (local := local_path(path)) is not None:
        with _typed_errors(path), open(local, "rb") as file:
            return file.read()
    return _remote(path, lambda fs, key: fs.cat_file(key), retry_s)


def read_range(path: str, start: int, length: int, *, retry_s: float = RETRY_S) -> bytes:
    """Exactly `length` bytes from `start`, else ShortRead: object stores answer a cut range with fewer bytes."""
    if (local := local_path(path)) is not None:
        with _typed_errors(path), open(local, "rb") as file:
            file.seek(start)
            data = file.read(length)
    else:
        data = _remote(path, lambda fs, key: fs.cat_file(key, start=start, end=start + length), retry_s)
    if len(data) != length:
        raise ShortRead(f"{path}: asked for {length} bytes at {start}, got {len(data)}: the file is truncated")
    return data


def read_chunks(path: str, *, retry_s: float = RETRY_S) -> Iterator[bytes]:
    """The whole file in pieces of at most CHUNK_BYTES, for hashing what does not fit in memory."""
    if (local := local_path(path)) is not None:
        with _typed_errors(path), open(local, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    total = size(path, retry_s=retry_s)
    for start in range(0, total, CHUNK_BYTES):
        yield read_range(path, start, min(CHUNK_BYTES, total - start), retry_s=retry_s)


def write_bytes(path: str, data: bytes, *, retry_s: float = RETRY_S) -> None:
    """Create or replace a file; a reader sees the old bytes or the new ones."""
    if (local := local_path(path)) is not None:
        _write_local(local, [data], os.replace, num_bytes=len(data))
    else:
        _put(path, lambda fs, key: fs.pipe_file(key, data), retry_s)


def write_chunks(path: str, chunks: Iterable, *, num_bytes: int, retry_s: float = RETRY_S) -> None:
    """As write_bytes, from buffers in turn (`num_bytes` in all), never holding more than one. Object stores get a
    spooled local copy, so that an exception in `chunks` leaves nothing behind."""
    if (local := local_path(path)) is not None:
        return _write_local(local, chunks, os.replace, num_bytes=num_bytes)
    with tempfile.TemporaryDirectory(prefix="sparing-upload-") as folder:
        spooled = os.path.join(folder, "spooled")
        _write_local(spooled, chunks, os.replace, num_bytes=num_bytes)
        upload(spooled, path, retry_s=retry_s)


def upload(local_file: str, path: str, *, retry_s: float = RETRY_S) -> None:
    """Copy a local file to `path`, whole or not at all."""
    if (local := local_path(path)) is not None:
        _write_local(local, read_chunks(local_file), os.replace, num_bytes=os.path.getsize(local_file))
    else:
        _put(path, lambda fs, key: fs.put_file(local_file, key), retry_s)


def download(path: str, local_file: str, *, retry_s: float = RETRY_S) -> None:
    """Copy `path` to a local file, whole or not at all."""
    expected = size(path, retry_s=retry_s)
    if local_path(path) is not None:
        return _write_local(local_file, read_chunks(path), os.replace, num_bytes=expected)
    partial = f"{local_file}.part"
    _remote(path, lambda fs, key: fs.get_file(key, partial), retry_s)
    if (got := os.path.getsize(partial)) != expected:
        raise ShortRead(f"{path}: {got} of {expected} bytes arrived")
    os.replace(partial, local_file)


def create_exclusive(path: str, data: bytes, *, retry_s: float = RETRY_S) -> None:
    """Create a whole file, or raise FileExistsError: of several callers exactly one succeeds.

    `data` must be unique to its writer. A put that succeeds while its answer is lost is sent again by the client and
    then refused; only by its own bytes does the writer know that it had won.
    """
    if (local := local_path(path)) is not None:
        return _write_local(local, [data], os.link, num_bytes=len(data))
    try:
        _put(path, lambda fs, key: fs.pipe_file(key, data, mode="create"), retry_s)
    except FileExistsError:
        if read_bytes(path, retry_s=retry_s) != data:
            raise FileExistsError(errno.EEXIST, "already there", path) from None


def remove(path: str, *, retry_s: float = RETRY_S) -> None:
    """Delete a file if it is there."""
    _delete(path, os.unlink, lambda fs, key: fs.rm_file(key), retry_s)


def remove_tree(path: str, *, retry_s: float = RETRY_S) -> None:
    """Delete a directory and what is in it, if it is there."""
    _delete(path, shutil.rmtree, lambda fs, key: fs.rm(key, recursive=True), retry_s)


def _delete(path: str, here: Callable[[str], None], there: Callable[[Any, str], None], retry_s: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        if (local := local_path(path)) is not None:
            with _typed_errors(path):
                here(local)
        else:
            _remote(path, there, retry_s)


def _write_local(path: str, chunks: Iterable, publish: Callable[[str, str], None], *, num_bytes: int) -> None:
    """Write and fsync a temporary file beside `path`, then `publish` it (os.replace, or os.link to be exclusive)."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    with _typed_errors(path, num_bytes):
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # a file in the way, or a system's own folder
            raise NotFit(f"{folder}: cannot be made ({_words(error)}); choose another directory") from error
        try:
            with open(temporary, "xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
            _sync_folder(folder)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    """Make a rename durable. Some network file systems cannot and need not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _remote(path: str, call: Callable[[Any, str], _T], retry_s: float) -> _T:
    """`call(filesystem, key)`, repeated with jitter while it fails in passing, its errors made ours."""
    retrying = tenacity.Retrying(
        stop=tenacity.stop_before_delay(retry_s), wait=tenacity.wait_random_exponential(multiplier=0.25, max=20),
        retry=tenacity.retry_if_exception(_is_transient), reraise=True)
    with _typed_errors(path):
        filesystem, key = _filesystem(path)
        try:
            return retrying(call, filesystem, key)
        except Exception as error:
            if _is_transient(error):
                raise StorageUnavailable(f"{path}: storage did not answer within {retry_s:.0f} s of retries "
                                         f"({_words(error)}); try again when it does") from error
            if isinstance(error, _client_errors("BotoCoreError")):
                raise NotFit(f"{path}: {_words(error)}; check endpoint and credentials in the environment") from error
            raise


def _put(path: str, call: Callable[[Any, str], object], retry_s: float) -> None:
    """As _remote, for writes, which find nothing missing but the bucket itself."""
    try:
        _remote(path, call, retry_s)
    except FileNotFoundError as error:
        raise BadRequest(f"{path}: {_words(error)}; create the bucket first, or correct the path") from error


def _filesystem(path: str) -> tuple[Any, str]:
    import fsspec

    scheme = path.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else str(error)
        raise BadRequest(f"{path}: reading {scheme}:// needs a package that is not installed; {remedy}") from error
    except ValueError as error:
        raise BadRequest(f"{path}: {error}; use a local path, memory://, s3:// or another fsspec scheme") from error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, _client_errors("HTTPClientError", "ConnectionError", "FlexibleChecksumError")):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def _client_errors(*names: str) -> tuple[type, ...]:
    """S3 clients' exception classes, which are not OSErrors, if a client is loaded at all."""
    botocore, aiohttp = sys.modules.get("botocore.exceptions"), sys.modules.get("aiohttp")
    return (*(getattr(botocore, name) for name in names if botocore), *([aiohttp.ClientError] if aiohttp else []))


def refusal(error: OSError, path: str, num_bytes: int | None = None) -> NotFit:
    """What the system's error about `path` says to a user."""
    if error.errno in FULL:
        need, free = "" if num_bytes is None else f" for {num_bytes} bytes", free_bytes(path)
        return StorageFull(f"{path}: no space left{need} ({free} bytes free); make room, or choose another directory")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StorageDenied(f"{path}: {_words(error)}; choose another place, or fix its permissions or credentials")
    return NotFit(f"{path}: {_words(error)}")


@contextlib.contextmanager
def _typed_errors(path: str, num_bytes: int | None = None) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise refusal(error, path, num_bytes) from error


def _words(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
