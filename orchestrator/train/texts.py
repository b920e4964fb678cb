"""Files of text, JSON lines and Parquet into documents: which files are meant, and what is no text.

Bytes that are not UTF-8 are read all the same, as U+FFFD, and whoever reads is told in which files (`not_utf8`). The
mark that some systems put before UTF-8 is no text.
"""

import codecs
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from orchestrator.config import parts_of
from orchestrator.errors import BadRequest, NotFit
from orchestrator.train import storage

LOOKED_AT = 1 << 13
"""Bytes of a file by which text is told from what is none."""


def find_files(path: str, key: str = "data.path") -> dict[str, tuple[int, int | str]]:
    """Files that `data.path` means, sorted, as `storage.glob` has them: globs, comma separated, `stdlib`, or one folder
    of it: `stdlib:encodings`. `key` is what an error names.
    """
    if path.split(":")[0] == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"], path.removeprefix("stdlib").removeprefix(":"))
        if not root.is_dir():
            raise BadRequest(f"{key}={path}: the library has no folder of that name; use stdlib")
        left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        return {file: stamp for file, stamp in storage.glob(f"{root}/**/*.py").items()
                if not left_out & set(Path(file).relative_to(root).parts)}
    found = {}
    for pattern in parts_of(path):
        matches = storage.glob(pattern)
        if not matches and os.path.isdir(storage.local_path(pattern) or ""):
            raise BadRequest(f"{key}={pattern}: is a folder; name its files, as in "
                             f"'{storage.join(pattern, '**/*.txt')}'")
        if not matches:
            raise BadRequest(f"{key}={pattern}: matches no file; give a path or glob of text, .jsonl or .parquet "
                             "files, or stdlib")
        found.update(matches)
    if not found:
        raise BadRequest(f"{key}={path!r}: names no file; give a glob, or stdlib")
    return dict(sorted(found.items()))


def documents(file: str, text_key: str, key: str = "data.text_key=", *, stray: set[str] | None = None) -> Iterator[str]:
    """The texts in one file: a line's field of .jsonl, a row's of .parquet, else the whole file. `key` is how an error
    names the field. The file is added to `stray` where it is not UTF-8."""
    stray = set() if stray is None else stray
    if file.endswith((".jsonl", ".ndjson")):
        for number, line in enumerate(_lines(file), 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield _field(_decoded(line, file, stray), text_key, f"{file}:{number}", key)
    elif file.endswith(".parquet"):
        yield from _parquet_texts(file, text_key, key)
    else:
        raw = storage.read_bytes(file).removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw[:LOOKED_AT]:
            raise BadRequest(f"{file}: is no text, it holds zero bytes; unpack what is compressed, convert other "
                             "encodings to UTF-8, or leave it out")
        yield _decoded(raw, file, stray)


def not_utf8(asked: str, number: int, first: str) -> str:
    """The warning that `number` files deserve; asked: the key and value that named them."""
    files = "1 file is" if number == 1 else f"{number:,} files are"
    return (f"warning: {asked}: {files} not UTF-8 ({first}{', ...' * (number > 1)}): stray bytes are read as U+FFFD; "
            "convert to UTF-8 (iconv), or leave out")


def _decoded(raw: bytes, file: str, stray: set[str]) -> str:
    """A crawl has stray bytes: refusing them would stop at one file after the other."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        stray.add(file)
        return raw.decode("utf-8", "replace")


def _field(line: str, text_key: str, where: str, key: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{where}: is not JSON ({error.msg}); one object per line is wanted") from None
    if not isinstance(row, dict) or text_key not in row:
        raise BadRequest(f"{where}: has no text under {key}{text_key}; its keys are "
                         f"{list(row) if isinstance(row, dict) else type(row).__name__}")
    text = _text(row[text_key], where, f"{key}{text_key}", list(row))
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _text(value: object, where: str, field: str, names: list[str]) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where}: holds {repr(value)[:40]} under {field}, which is no text; name another of {names}")
    return value


def _lines(file: str) -> Iterator[bytes]:
    """Ended by b"\\n" alone: JSON may hold any other end of a line inside a text."""
    rest = b""
    for chunk in storage.read_chunks(file):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    yield rest


def _parquet_texts(file: str, text_key: str, key: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NotFit(f"{file}: reading Parquet needs pyarrow; pip install pyarrow") from None
    with storage.open_read(file) as handle:
        try:
            table = parquet.ParquetFile(handle)
            if text_key not in table.schema_arrow.names:
                raise BadRequest(f"{file}: has no column {key}{text_key}; its columns are "
                                 f"{table.schema_arrow.names}")
            for batch in table.iter_batches(columns=[text_key]):
                yield from (_text(value, file, f"{key}{text_key}", table.schema_arrow.names)
                            for value in batch.column(0).to_pylist() if value is not None)
        except pyarrow.ArrowException as error:
            raise BadRequest(f"{file}: is not readable Parquet ({error}); remove or repair it") from None
