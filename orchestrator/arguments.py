"""Words of the command line that are no Hydra overrides: a verb's own arguments and options, checked."""

import contextlib
import difflib
import errno
import math
import os
import re
import tempfile
from pathlib import Path

from orchestrator.config import Config
from orchestrator.errors import BadRequest, SparingError
from orchestrator.train import storage

NO_ROOM = 1 << 20
"""Bytes; a disk with fewer was full when something was refused."""


def positional(verb: str, arguments: list[str], number: int, help: str) -> list[str]:
    if len(arguments) != number:
        wanted = f"{number} argument" + "s" * (number != 1)
        raise BadRequest(f"{verb}: takes {wanted}, not {len(arguments)}; {help.splitlines()[0]}")
    return arguments


def options(verb: str, arguments: list[str], known: tuple[str, ...], help: str) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments of this verb, and the rest."""
    named = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.replace(".", "_").isidentifier():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else help.splitlines()[0]
                raise BadRequest(f"{argument}: {verb} has no option {key}; {hint}")
            named[key] = value
    return named, [argument for argument in arguments if argument.partition("=")[0] not in named]


def taken(arguments: list[str], known: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments of these keys, and the rest, which are overrides of the config; what is nearly one of the
    keys, and no key of the config, is a mistake."""
    named, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in known:
            named[key] = value
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if near and key.isidentifier() and key not in Config.__dataclass_fields__:
            raise BadRequest(f"{argument}: no such key; did you mean {near[0]}={value or '...'}?")
        rest.append(argument)
    return named, rest


def number(named: dict[str, str], key: str, default: float, low: float, high: float = math.inf, *,
           whole: bool = True) -> float:
    """The option `key` as a number in [low, high]."""
    text = named.get(key, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or whole and value % 1:
        kind = "a whole number" if whole else "a number"
        bounds = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
        raise BadRequest(f"{key}={text}: must be {kind} {bounds}; use {key}={default}")
    return value


def memory_limit(named: dict[str, str]) -> dict[str, float | str] | None:
    """`memory.max_gib` and `weights` as `cold_weights.load_within` takes them; None where all is to be in memory."""
    form = choice(named, "weights", ("fp32", "bf16", "fp8", "int4"))
    if "memory.max_gib" in named:
        return {"max_gib": number(named, "memory.max_gib", 4, 0, 10**6, whole=False), "form": form}
    if "weights" in named:
        raise BadRequest(f"weights={named['weights']}: is of experts that stay on disk; add memory.max_gib=N, or leave "
                         "it out")
    return None


def tokenizer_named(named: dict[str, str]) -> str:
    """The option `tokenizer`, which can be read; empty where the checkpoint's own is meant."""
    if name := named.get("tokenizer", ""):
        from orchestrator.train.tokenizer import load_tokenizer

        load_tokenizer(name, "tokenizer")
    return name


def check_writable(named: dict[str, str], *keys: str) -> None:
    """Long work must not end in a folder that is not there. An object store has none."""
    for key in set(keys) & named.keys():
        if (path := storage.local_path(named[key])) is None:
            continue
        file = Path(path)
        if file.is_dir() or not (os.access(file, os.W_OK) if file.exists() else _takes_files(file.parent)):
            raise BadRequest(f"{key}={named[key]}: cannot be written; name a file in a folder that exists and may be "
                             "written")


def check_folder(named: dict[str, str], key: str) -> None:
    """As `check_writable`, of a folder that is made here unless it is there."""
    if key in named and (folder := storage.local_path(named[key])) is not None:
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not folder or not _takes_files(folder):
            raise BadRequest(f"{key}={named[key]}: is no folder that may be written; name another")


def _takes_files(folder: str | Path) -> bool:
    """By trying: the folders of a system's own have their own rules."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_file(named: dict[str, str], key: str, text: str) -> None:
    """What `key=FILE` asked for, whole or not at all, behind whatever was printed; says so."""
    path = named[key]
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device takes what comes
            Path(path).write_text(text, encoding="utf-8")
        else:
            storage.write_bytes(os.path.realpath(path) if os.path.islink(path) else path, text.encode())
    except SparingError as error:
        raise type(error)(f"{key}={error}") from error
    print(f"wrote     {path}")


def blamed(error: OSError, words: list[str]) -> tuple[str, str] | None:
    """Key (`out=`; none of a bare path) and path of the word whose file the system refused. A full disk may not say
    where it was met: then of the last word on such a disk, or what is written here."""
    found = [re.fullmatch(r"(\+*[\w.@]+=|)(.+)", word, re.DOTALL).groups() for word in reversed(words) if word]
    paths = [(key, local) for key, value in found if (local := storage.local_path(value)) is not None]
    if error.filename is not None:
        refused = f"{os.path.abspath(os.fsdecode(error.filename))}/"
        inside = [pair for pair in paths if refused.startswith(f"{os.path.abspath(pair[1])}/")]
        return max(inside, key=lambda pair: len(os.path.abspath(pair[1])), default=None)
    there = [pair for pair in paths if os.sep in pair[1] or os.path.exists(pair[1])]
    return next((pair for pair in (*there, ("", os.curdir)) if error.errno in storage.FULL
                 and (error.errno == errno.EDQUOT or storage.free_bytes(pair[1]) < NO_ROOM)), None)


def choice(named: dict[str, str], key: str, known: tuple[str, ...]) -> str:
    """The option `key` as one of a few words, the first by default."""
    value = named.get(key, known[0])
    if value not in known:
        raise BadRequest(f"{key}={value}: must be one of {', '.join(known)}; use {key}={known[0]}")
    return value
