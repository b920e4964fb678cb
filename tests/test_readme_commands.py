"""Every `sparing VERB ...` and `python benchmarks/X.py ...` of the documents: its words are checked, it is not run."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from orchestrator.__main__ import HELP, MODULES, VERBS
from orchestrator.arguments import options, positional, taken
from orchestrator.compose import FLAGS, compose_config
from orchestrator.overrides import check_overrides
from orchestrator.plan.layout import check_run
from orchestrator.show_plan import split_words
from orchestrator.words import plain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGINS = re.compile(r"(?:sparing [a-z]|python benchmarks/)")
TAKES = {"report": (None, ("out",)), "status": (1, ()), "export": (2, ("dtype",)), "import": (2, ())}
"""Of verbs without a module: how many paths, and which options."""


def commands() -> list[str]:
    """Of indented blocks and of `code` in prose, in order, each once; without comments, variables and what is piped in.
    """
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in [*re.findall(r"^    .*", text, re.MULTILINE),
                     *re.findall(r"`([^`]+)`", re.sub(r"^    .*", "", text, flags=re.MULTILINE))]:
            line = re.split(r" +# ", line)[0].split(" | ")[-1]
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", " ".join(line.split()))
            found += [line] * bool(BEGINS.match(line))
    return list(dict.fromkeys(found))


SPARING = [line for line in commands() if line.startswith("sparing")]
BENCHMARKS = [line for line in commands() if line.startswith("python")]


@pytest.fixture
def config_json(tmp_path, monkeypatch):
    """A Hugging Face config.json where the documents say one is."""
    from model.config import ModelConfig
    from model.hf_config import config_to_hf

    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/config.json").write_text(json.dumps(config_to_hf(ModelConfig())))


def test_commands_are_found():
    assert len(SPARING) > 50 and len(BENCHMARKS) > 15
    assert {line.split()[1] for line in SPARING} == {*VERBS, *MODULES}


@pytest.mark.parametrize("command", SPARING)
def test_a_command_has_words_that_its_verb_takes(command, config_json):
    _, verb, *words = (word for word in shlex.split(command) if word not in ("...", "NAME"))
    if not words:
        return
    if verb == "plan":
        check_plan(words)
    elif verb in ("train", "prepare", "launch", "compare"):
        if any(word.startswith("-") for word in words):
            assert words[0] in FLAGS
            return
        if verb == "compare":
            _, words = taken(plain(words), importlib.import_module(MODULES[verb]).OPTIONS)
        check_run(compose_config([word for word in words if not word.endswith("=NAME")]))
    else:
        module = importlib.import_module(MODULES[verb]) if verb in MODULES else None
        number, known = (1, module.OPTIONS) if module else TAKES[verb]
        help = module.HELP if module else HELP[verb]
        _, paths = options(verb, words, known, help)
        assert paths and (number is None or positional(verb, paths, number, help))


def check_plan(words: list[str]) -> None:
    if words[0] in ("prices", "budgets"):
        assert words[1:] == []
    elif words[0] == "diff":
        assert len(words) == 3
    else:
        check_overrides(split_words([word for word in words if word not in ("-m", "hardware=all")])[1])


class Parsed(Exception):
    """A script has read its arguments."""


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_takes_its_arguments(command, monkeypatch):
    _, script, *words = shlex.split(command)
    source = (ROOT / script).read_text()
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    if "argparse" not in source:  # keys of `sparing train`, and of the script
        own = {word: value for word, value in (word.split("=", 1) for word in words) if f'"{word}"' in source}
        check_overrides([word for word in words if word.split("=")[0] not in own])
        return

    def parse(self, parse=argparse.ArgumentParser.parse_args):
        parse(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
