"""Values as overrides spell them, and `model=FILE.json`, or its folder, as the overrides of its shape."""

import json
import re
from enum import Enum
from pathlib import Path

from model.config import ModelConfig
from orchestrator.config import conf_dir
from orchestrator.errors import BadRequest

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


def expanded(overrides: list[str]) -> list[str]:
    """`plain`, and `model=FILE.json`, a Hugging Face config.json or the folder with it, as the keys of its shape,
    before those that are given."""
    overrides = plain(overrides)
    asked = next((text for text in overrides if text.startswith("model=") and _is_path(text[6:])), None)
    if asked is None:
        return overrides
    shape = vars(_from_hf(asked[6:]))
    return [*(f"model.{key}={word(value)}" for key, value in shape.items()),
            *(text for text in overrides if text is not asked)]


def _is_path(model: str) -> bool:
    """Not the name of a model, nor several."""
    named = Path(conf_dir(), "model", f"{model}.yaml").is_file()
    return model.endswith(".json") or not named and Path(model).exists()


def _from_hf(file: str) -> ModelConfig:
    """Its shape, named after its folder; a released checkpoint's own quantisation does not matter to a run."""
    from model.hf_config import config_from_hf

    path = Path(file, "config.json") if Path(file).is_dir() else Path(file)
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
