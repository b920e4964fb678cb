"""What a command line says, against the schema and before Hydra sees it, so that a mistake is answered with key, value,
rule and remedy."""

import dataclasses
import difflib
import re
import types
import typing
from enum import Enum
from functools import reduce
from pathlib import Path

from orchestrator.config import Config, conf_dir
from orchestrator.errors import BadRequest
from orchestrator.words import word

PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")
SECRET = re.compile(r"key|token(?!izer|s)|secret|password|credential", re.IGNORECASE)


def check_overrides(overrides: list[str]) -> None:
    """`BadRequest` for an override that no schema, group or type admits."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        shown = text.split("=", 1)[0] if _is_secret(text.split("=", 1)[0]) else text
        if not text.startswith("~") and not re.match(r"[^=]+=", text):
            raise BadRequest(f"{shown}: is no override; write KEY=VALUE, as in train.steps=100")
        try:
            override = parser.parse_override(text)
        except HydraException:
            key, _, value = text.partition("=")
            example = "data.path=\"a,b\"" if shown == key or {"'", '"'} & set(value) else f"{key}=\"{value}\""
            raise BadRequest(f"{shown}: cannot be read; put quotes around a value with special characters: "
                             f"'{example}'") from None
        if "_target_" in text:
            raise BadRequest(f"{shown}: unknown key; a config names no code, only values")
        if PASSWORD.search(text):
            raise BadRequest(f"{shown.split('=', 1)[0]}: holds a password, and a config is saved with the run; leave "
                             "it out of the URL and put it into the environment")
        if override.key_or_group.startswith("hydra"):
            continue
        if override.is_delete():
            raise BadRequest(f"{shown}: nothing can be removed from the config; override it with another value")
        if override.key_or_group.split("@")[0] in groups():
            _check_group(override)
        else:
            _check_key(override, shown)


def _check_group(override) -> None:
    """Each option of a sweep, too: Hydra takes an experiment that is none for a run of defaults."""
    group, value, is_sweep = override.key_or_group.split("@")[0], override.value(), override.is_choice_sweep()
    if override.is_sweep_override() and not is_sweep:
        return
    options = _options(group)
    own = f", or the path of a YAML file{' or a Hugging Face config.json' * (group == 'model')} of yours"
    own = ", and in a sweep no files" if is_sweep else own
    for name in override.sweep_string_iterator() if is_sweep else value if isinstance(value, list) else [value]:
        if str(name) not in options:
            raise BadRequest(f"{group}={'null' if name is None else name}: no such option{_near(str(name), options)}; "
                             f"options are {', '.join(options)}{own}")


def _check_key(override, shown: str) -> None:
    key, hint = override.key_or_group, Config
    if _is_secret(key):
        raise BadRequest(f"{key}: secrets are never part of a config, which is saved with the run; put them into the "
                         "environment (WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...)")
    walked: list[str] = []
    for part in key.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in hints:
            prefix = "".join(f"{name}." for name in walked)
            near = (_same_leaf(part) or _in_section(part, list(hints), prefix, key) or _near(part, list(hints), prefix)
                    or _near(key, [*all_keys(), *groups()]))
            raise BadRequest(f"{key}: unknown key{near or '; `sparing train --cfg job` prints all keys'}")
        walked.append(part)
        hint = hints[part]
    if dataclasses.is_dataclass(hint):
        options = "options {} and ".format(", ".join(_options(key))) if key in groups() else ""
        raise BadRequest(f"{shown}: {key} is a group with {options}keys "
                         f"{', '.join(f.name for f in dataclasses.fields(hint))}; set one of these")
    if override.is_sweep_override():
        return
    if override.value() == "":
        raise BadRequest(f"{key}='': is empty; give a value, or leave {key} out")
    if wanted := _mismatch(override.value(), hint):
        raise BadRequest(f"{shown}: must be {wanted}; use {key}={_example(key, hint, override.value())}")


def _is_secret(key: str) -> bool:
    """The schema has no secrets, so what it knows is none, `data.text_key` for one."""
    return SECRET.search(key) is not None and key.lstrip("~") not in all_keys()


def _mismatch(value: object, hint: object) -> str | None:
    """What the value should have been, if it is not."""
    if isinstance(hint, types.UnionType):
        null = types.NoneType in hint.__args__
        if value is None and null:
            return None
        wrong = ["text" if item is str and not isinstance(value, str) else _mismatch(value, item)
                 for item in hint.__args__ if item is not types.NoneType]
        return None if None in wrong else " or ".join(wrong) + ", or null" * null
    if isinstance(value, str) and "${" in value:
        return None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return None if str(value) in hint.__members__ else f"one of {', '.join(hint.__members__)}"
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    if hint is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if hint is float:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if typing.get_origin(hint) is dict:
        return None if isinstance(value, dict) else "names and numbers, as in {rack1:1}"
    if typing.get_origin(hint) is list:
        return None if isinstance(value, list) else "a list, as in [a,b]"
    if value is None:
        return "text"
    return "text (put quotes around it)" if isinstance(value, list | dict) else None


def _example(key: str, hint: object, value: object) -> str:
    """What `value` was meant to be, the key's default, or else a value of its kind."""
    if near := difflib.get_close_matches(str(value), getattr(hint, "__members__", ()), n=1):
        return near[0]
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3
        return str(int(value))
    *sections, leaf = key.split(".")
    default = getattr(reduce(getattr, sections, Config()), leaf)
    if default not in (None, "") and not isinstance(default, dict | list):
        return word(default)
    if isinstance(hint, types.UnionType):
        hint = next(item for item in hint.__args__ if item is not types.NoneType)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint.__members__))
    return {bool: "true", int: "100", float: "0.5", list[str]: f"[{value}]"}.get(hint, "'...'")


def groups() -> list[str]:
    return sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir())


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in Path(conf_dir(), group).glob("*.yaml"))


def all_keys(kind: type = Config, prefix: str = "") -> dict[str, object]:
    """Every key with its type."""
    keys = {}
    for name, hint in typing.get_type_hints(kind).items():
        keys |= all_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return keys


def _near(name: str, among: list[str], prefix: str = "") -> str:
    """The only one that begins so, else one that is nearly it, else those that share a word, else a similar one."""
    name, begun = name.lower(), [each for each in among if each.startswith(name.lower())]
    leaf = name.rsplit(".", 1)[-1]
    words = {word for word in leaf.split("_") if len(word) > 2}
    sharing = [each for each in among if words & set(each.rsplit(".", 1)[-1].split("_"))]
    sharing.sort(key=lambda each: difflib.SequenceMatcher(None, leaf, each.rsplit(".", 1)[-1]).ratio(), reverse=True)
    found = (begun if len(begun) == 1 else difflib.get_close_matches(name, among, n=1, cutoff=0.8)
             or sharing or difflib.get_close_matches(name, among, n=1))
    return f"; did you mean {' or '.join(prefix + each for each in found[:2])}?" if found else ""


def _in_section(name: str, among: list[str], prefix: str, key: str) -> str:
    """The whole key, where it is a section before the last name that is mistyped, or both are."""
    rest, known = key.removeprefix(f"{prefix}{name}"), all_keys()
    for section in difflib.get_close_matches(name.lower(), among) if rest else ():
        inside = [each for each in known if each.startswith(f"{prefix}{section}.")]
        if found := difflib.get_close_matches(f"{prefix}{section}{rest}", inside, n=1, cutoff=0.8):
            return f"; did you mean {found[0]}?"
    return ""


def _same_leaf(name: str) -> str:
    found = [key for key in all_keys() if key.rsplit(".", 1)[-1] == name]
    return f"; did you mean {' or '.join(found[:2])}?" if found else ""
