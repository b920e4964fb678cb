"""Values as overrides spell them."""

import re
from enum import Enum

WITH_A_MEANING = ("null", "true", "false", "nan", "inf")


def plain(arguments: list[str]) -> list[str]:
    """Without the `+` of Hydra's grammar (`+experiment=tiny`), as every key is there already; of a key that is given
    several times the last one, as Hydra has it. Hydra's own keys and flags stay as they are."""
    kept: dict[str, str] = {}
    for number, text in enumerate(arguments):
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-"):
            kept[f"{number} {text}"] = text
            continue
        if not key.lstrip("+").startswith("hydra"):
            key = key.lstrip("+")
        kept.pop(key, None)
        kept[key] = f"{key}={value}"
    return list(kept.values())


def quoted(value: str) -> str:
    """A text as the value of an override, in quotes where its grammar would read something else."""
    if re.fullmatch(r"[\w./:@%+~-]+", value, re.ASCII):
        return value
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value) + "'"


def word(value: object) -> str:
    """A value as an override has it; in quotes too where a text would be read as a number, true or null."""
    if isinstance(value, Enum):
        return value.name
    if not isinstance(value, str):
        return str(value)
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*", value, re.ASCII) and value.lower() not in WITH_A_MEANING
    return quoted(value) if plain or not quoted(value) == value else f"'{value}'"
