"""Command line and YAML into one typed `Config`; with `config.register`, the only code that knows Hydra.

Overrides are checked against the schema before Hydra sees them, so that a mistake is answered with key, value, rule
and remedy. Nothing here can run code from a config: there is no `_target_`, and keys outside the schema are refused.
"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from enum import Enum
from functools import reduce
from pathlib import Path

from orchestrator.config import Config, conf_dir, from_dict, register, to_dict
from orchestrator.errors import BadRequest, Preempted, SparingError
from orchestrator.own_files import expanded
from orchestrator.words import word

HYDRA_VERSION_BASE = "1.3"
RESOLVER = re.compile(r"\$\{[^{}]*:")
"""A value that OmegaConf would compute, from the environment for one, as opposed to `${run.name}`."""
PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")
FOREIGN = re.compile(r"--(co|e)|-c[pnd]")
"""Hydra's flags that take the config from elsewhere (--config-dir, --experimental-rerun, ...), however abbreviated."""
FLAGS = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--multirun", "-m", "--package", "-p",
         "--resolve", "--run", "-r", "--shell-completion", "-sc", "--version")
SECRET = re.compile(r"key|token(?!izer|s)|secret|password|credential", re.IGNORECASE)


def compose_config(overrides: list[str]) -> Config:
    """The config that these overrides ask for; on `resume=auto` of an earlier run, that run's own config goes first."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    check_overrides(overrides := expanded(overrides))
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION_BASE):
            config = to_config(compose("config", overrides=_opened(overrides)))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
            one = several[1].replace("=", '="', 1) + '"'
            raise BadRequest(f"{several[1]}: names several values; give one (train and plan take -m, for each), "
                             f"or quotes if it is one: '{one}'") from None
        raise BadRequest(_first_lines(error)) from error
    return _over_saved(config, overrides)


def _opened(overrides: list[str]) -> list[str]:
    """As Hydra takes names that a mapping does not have yet: to be added."""
    mappings = {key for key, hint in all_keys().items() if typing.get_origin(hint) is dict}
    return [f"++{text}" if text.split("=", 1)[0] in mappings else text for text in overrides]


def combinations(overrides: list[str]) -> list[list[str]]:
    """What `--multirun` makes of them: every combination of values separated by commas, as Hydra reads them."""
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise BadRequest(f"{text}: cannot be read as KEY=VALUE or KEY=VALUE,VALUE; {_first_lines(error)}") from None
        found.append([f"{text.split('=', 1)[0]}={value}" for value in override.sweep_string_iterator()]
                     if override.is_sweep_override() else [text])
    return [list(each) for each in product(*found)]


def to_config(composed) -> Config:
    """OmegaConf ends here."""
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(composed, resolve=False)
    _refuse_resolvers({key: value for key, value in raw.items() if key != "hydra"})
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra."))
    if missing:
        raise BadRequest(f"{missing[0]}: must be given; add {missing[0]}=VALUE to the command")
    plain = OmegaConf.to_object(composed)
    if isinstance(plain, Config):
        return plain
    return from_dict(Config, to_dict({key: value for key, value in plain.items() if key != "hydra"}))


def _refuse_resolvers(node: object, path: str = "") -> None:
    """A config is data: what it says is saved with the run, and a resolver could put a secret there."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            _refuse_resolvers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and RESOLVER.search(node):
        raise BadRequest(f"{path}={node}: values are not computed from elsewhere; write the value itself (the shell "
                         "can fill it in), and leave secrets to the environment")


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
        if override.key_or_group.split("@")[0] in _groups():
            _check_group(override)
        else:
            _check_key(override, shown)


def _check_group(override) -> None:
    group, value = override.key_or_group.split("@")[0], override.value()
    options = _options(group)
    for name in value if isinstance(value, list) else [value]:
        if str(name) not in options and not override.is_sweep_override():
            own = f", or the path of a YAML file{' or a Hugging Face config.json' * (group == 'model')} of yours"
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
                    or _near(key, [*all_keys(), *_groups()]))
            raise BadRequest(f"{key}: unknown key{near or '; `sparing train --cfg job` prints all keys'}")
        walked.append(part)
        hint = hints[part]
    if dataclasses.is_dataclass(hint):
        raise BadRequest(f"{shown}: {key} is a group with options {', '.join(_options(key))} and keys "
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


def _over_saved(config: Config, overrides: list[str]) -> Config:
    """Continuing a run takes its saved config, then what this command overrides; an experiment names everything."""
    from orchestrator.train import storage
    from orchestrator.train.run_dir import CONFIG, read_config

    if config.resume != "auto" or config.run.dir is None or any(o.startswith("experiment=") for o in overrides):
        return config
    path = storage.join(config.run.dir, CONFIG)
    if not storage.exists(path):
        return config
    saved, asked = read_config(path), to_dict(config)
    merged = to_dict(saved)
    if saved.run.dir and saved.checkpoint.dir == storage.join(saved.run.dir, "checkpoints"):
        merged["checkpoint"]["dir"] = None  # with the run, which may have been copied or renamed since
    for key in (text.split("=", 1)[0].lstrip("+") for text in overrides if not text.lstrip("+").startswith("hydra")):
        *parents, leaf = key.split("@")[0].replace("/", ".").split(".")
        source, target = asked, merged
        for part in parents:
            source, target = source[part], target[part]
        target[leaf] = source[leaf]
    return from_dict(Config, merged)


def _groups() -> list[str]:
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


def _first_lines(error: Exception) -> str:
    """Hydra's own words without its search path."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if (cause := error.__cause__) is not None and str(cause) not in lines[0]:
        lines.insert(1, str(cause).splitlines()[0])
    return "; ".join(lines[:3])


def with_hydra_flags(arguments: list[str], run: Callable[[Config], int], *, program: str = "sparing train") -> int:
    """Hydra's own command line (--cfg, --info, --multirun, completion). `run`: once per job, until one is preempted."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for flag in filter(FOREIGN.match, arguments):
        raise BadRequest(f"{flag}: configs come from conf/ alone, because one could make Hydra run code; give "
                         "yours as a file, as in experiment=FILE.yaml")
    flags = [text.split("=", 1)[0] for text in arguments if text.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            key = flag.lstrip("-")
            remedy = (f"write {key}=VALUE, without dashes" if key in (*all_keys(), *_groups()) else
                      f"there are {', '.join(flag for flag in FLAGS if flag.startswith('--'))}")
            raise BadRequest(f"{flag}: no such flag; {remedy}")
        if flag in ("--resolve", "--package", "-p") and not {"--cfg", "-c"} & set(flags):
            raise BadRequest(f"{flag}: is of what --cfg prints; use --cfg job {flag}")
    register()
    codes: list[int] = []

    def job(composed) -> None:
        try:
            if Preempted.exit_code not in codes:
                codes.append(run(_over_saved(to_config(composed), list(HydraConfig.get().overrides.task))))
        except SparingError as error:
            print(f"error: {error}", file=sys.stderr)
            codes.append(error.exit_code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, not to Hydra's printer
    before, sys.argv = sys.argv, [program, *_opened(arguments)]
    try:
        hydra.main(version_base=HYDRA_VERSION_BASE, config_path=str(conf_dir()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise BadRequest(_first_lines(error)) from error
    except SystemExit as stop:
        return 2 if stop.code else 0
    finally:
        sys.argv = before
    return max(codes, default=0)
