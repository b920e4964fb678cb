"""Command line and YAML into one typed `Config`; Hydra is known here, where its grammar is read (`overrides`,
`own_files`) and in `config.register` alone.

Nothing here can run code from a config: there is no `_target_`, and keys outside the schema are refused.
"""

import os
import re
import sys
import typing
from collections.abc import Callable

from orchestrator.config import Config, conf_dir, from_dict, register, to_dict
from orchestrator.errors import BadRequest, Preempted, SparingError
from orchestrator.overrides import all_keys, check_overrides, groups
from orchestrator.own_files import expanded

HYDRA_VERSION_BASE = "1.3"
RESOLVER = re.compile(r"\$\{[^{}]*:")
"""A value that OmegaConf would compute, from the environment for one, as opposed to `${run.name}`."""
FOREIGN = re.compile(r"--(co|e)|-c[pnd]")
"""Hydra's flags that take the config from elsewhere (--config-dir, --experimental-rerun, ...), however abbreviated."""
FLAGS = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--multirun", "-m", "--package", "-p",
         "--resolve", "--run", "-r", "--shell-completion", "-sc", "--version")


def compose_config(overrides: list[str]) -> Config:
    """The config that these overrides ask for; on `resume=auto` of an earlier run, that run's own config goes first."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    overrides = expanded(overrides)
    check_overrides(overrides)
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
        key = text.split("=", 1)[0]
        found.append([f"{key}={value}" for value in override.sweep_string_iterator()]
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
    plain.pop("hydra", None)
    return from_dict(Config, to_dict(plain))


def _refuse_resolvers(node: object, path: str = "") -> None:
    """A config is data: what it says is saved with the run, and a resolver could put a secret there."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            _refuse_resolvers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and RESOLVER.search(node):
        raise BadRequest(f"{path}={node}: values are not computed from elsewhere; write the value itself (the shell "
                         "can fill it in), and leave secrets to the environment")


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
            remedy = (f"write {key}=VALUE, without dashes" if key in (*all_keys(), *groups()) else
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
