"""Words of the command line that are no Hydra overrides: a verb's own arguments and options, checked."""

import difflib
import math
import os
from pathlib import Path

from orchestrator.config import Config
from orchestrator.errors import BadRequest


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
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        bounds = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
        raise BadRequest(f"{key}={text}: must be {kind} {bounds}; use {key}={default}")
    return value


def memory_limit(named: dict[str, str]) -> dict[str, float | str] | None:
    """`memory.max_gib` and `weights` as `cold_weights.load_within` takes them; None where all is to be in memory."""
    if "memory.max_gib" in named:
        return {"max_gib": number(named, "memory.max_gib", 4, 0, 10**6, whole=False),
                "form": named.get("weights", "fp32")}
    if "weights" in named:
        raise BadRequest(f"weights={named['weights']}: is of experts that stay on disk; add memory.max_gib=N, or leave "
                         "it out")
    return None


def check_writable(named: dict[str, str], *keys: str) -> None:
    """Long work must not end in a folder that is not there."""
    for key in set(keys) & named.keys():
        file = Path(named[key])
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise BadRequest(f"{key}={named[key]}: cannot be written; name a file in a folder that exists and may be "
                             "written")


def choice(named: dict[str, str], key: str, known: tuple[str, ...]) -> str:
    """The option `key` as one of a few words, the first by default."""
    value = named.get(key, known[0])
    if value not in known:
        raise BadRequest(f"{key}={value}: must be one of {', '.join(known)}; use {key}={known[0]}")
    return value
