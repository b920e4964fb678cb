"""A file of the user's own where an option of a group is asked for, as overrides: `experiment=FILE.yaml`,
`model=FILE.yaml` and so on, in the form of the shipped ones; `model=FILE.json`, a Hugging Face config.json, or its
folder. What a file says is checked as if it stood on the command line."""

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

from model.config import ModelConfig
from orchestrator.config import Config, conf_dir, to_dict
from orchestrator.errors import BadRequest
from orchestrator.words import plain, word

WHOLE = ("experiment", "cluster")
"""Groups whose files set keys of several sections."""


def expanded(overrides: list[str]) -> list[str]:
    """`plain`, and in the place of files their words: before those that are given, an experiment's last of them."""
    overrides, files = plain(overrides), {}
    for text in overrides:
        group, _, option = text.partition("=")
        if is_own(group, option):
            files[text] = words_of(group, option)
    in_turn = sorted(files, key=lambda text: text.startswith("experiment="))
    values = [each for text in in_turn for each in files[text] if "." in each.split("=", 1)[0]]
    choices = [each for text in reversed(in_turn) for each in files[text] if "." not in each.split("=", 1)[0]]
    return plain([*choices, *values, *(text for text in overrides if text not in files)])


def is_own(group: str, option: str) -> bool:
    """Whether it is a file, not the name of an option, nor several."""
    if group == "model" and not (conf_dir() / "model" / f"{option}.yaml").is_file():
        return option.endswith((".yaml", ".yml", ".json")) or Path(option).expanduser().exists()
    return option.endswith((".yaml", ".yml")) and (conf_dir() / group).is_dir()


def words_of(group: str, file: str) -> list[str]:
    """The overrides that a file is short for."""
    if group == "model" and not file.endswith((".yaml", ".yml")):
        return [f"model.{key}={word(value)}" for key, value in vars(_from_hf(file)).items()]
    values, kind = _read(group, file), typing.get_type_hints(Config).get(group)
    choices = list(_choices(group, file, values.pop("defaults", None) or []))
    if group in WHOLE:
        return choices + list(_words(Config, values, ""))
    named = {"name": Path(file).stem} if "name" in typing.get_type_hints(kind) else {}
    start = [] if choices else _words(kind, to_dict(kind()) | named, f"{group}.")
    return plain([*choices, *start, *_words(kind, named | values, f"{group}.")])


def _read(group: str, file: str) -> dict:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(Path(file).expanduser()), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())
        raise BadRequest(f"{group}={file}: cannot be read as YAML ({why}); write it as those of conf/{group}") from None
    if not isinstance(values, dict) or not values:
        raise BadRequest(f"{group}={file}: holds no keys; write it as those of conf/{group}, KEY: VALUE")
    return values


def _choices(group: str, file: str, defaults: list) -> Iterator[str]:
    """Options that the file builds on: `- override /model: mini` of a whole one, `- h100` of another."""
    for each in defaults if isinstance(defaults, list) else [defaults]:
        if each == "_self_" or each == f"base_{group}":
            continue
        form = "`- override /model: mini`" if group in WHOLE else f"the name of an option of {group}"
        if isinstance(each, str) and group not in WHOLE:
            found = {group: each}
        elif isinstance(each, dict) and group in WHOLE and all(key.startswith("override /") for key in each):
            found = {key.removeprefix("override /"): option for key, option in each.items()}
        else:
            raise BadRequest(f"{group}={file}: defaults has {each}; write {form}")
        for key, option in found.items():
            if is_own(key, str(option)):
                raise BadRequest(f"{group}={file}: defaults has {option}, and a file builds on shipped options alone; "
                                 f"write {form}, and give files on the command line")
            yield f"{key}={option}"


def _words(kind: type, values: dict, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if isinstance(value, dict) and is_dataclass(hints.get(key)):
            yield from _words(hints[key], value, f"{path}{key}.")
        elif isinstance(value, dict):
            yield f"{path}{key}={{{','.join(f'{name}:{word(each)}' for name, each in value.items())}}}"
        else:
            yield f"{path}{key}={'null' if value is None else word(value)}"


def _from_hf(file: str) -> ModelConfig:
    """Its shape, named after its folder; a released checkpoint's own quantisation does not matter to a run."""
    from model.hf_config import config_from_hf

    path = Path(file).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("holds no JSON object; give a Hugging Face config.json, or a model by name")
        values.pop("quantization_config", None)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().parent.name).strip("._-")
        return config_from_hf(values, name=name or "custom")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise BadRequest(f"model={file}: is no readable JSON object ({error}); give a Hugging Face config.json, or a "
                         "model by name") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"model={file}: {error}") from None
