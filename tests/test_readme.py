"""The README against the disk: its tree, its commands, its links."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.compose import compose_config
from orchestrator.plan.layout import check_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    """Indented code blocks."""
    return [block for block in re.split(r"\n(?=\S)", README) if re.search(r"^    \S", block, re.MULTILINE)]


def commands(verb: str) -> list[str]:
    lines = [line.split(" # ")[0].strip() for block in blocks() for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"sparing {verb}")]


def test_the_tree_names_every_source_file_and_no_other():
    tree = README[README.index("## The files") :].split("\n## ")[0]
    named, folders = set(), {}
    for line in re.findall(r"^    ( *\S.*)$", tree, re.MULTILINE):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        previous = {level: folder for level, folder in folders.items() if level < depth}
        if name.endswith("/"):
            folders = previous | {depth: name}
        elif name.endswith(".py"):
            if depth in folders:  # back on the level of a folder that has ended
                folders = previous
            named.add("".join(folders[level] for level in sorted(previous)) + name)
    there = {str(path.relative_to(ROOT)) for package in ("model", "orchestrator")
             for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"}
    assert named == there


@pytest.mark.parametrize("command", commands("train"))
def test_every_train_command_composes_and_passes_the_checks(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[2:]
    if "model=path/to/config.json" in arguments:
        from model.config import ModelConfig
        from model.hf_config import config_to_hf

        Path("path/to").mkdir(parents=True)
        Path("path/to/config.json").write_text(json.dumps(config_to_hf(ModelConfig())))
    check_run(compose_config(arguments))


@pytest.mark.parametrize("verb", ["train", "prepare", "status", "report", "export", "import"])
def test_verbs_explain_themselves(verb):
    assert commands(verb), f"the README shows no use of {verb}"
    done = subprocess.run([sys.executable, "-m", "orchestrator", verb, "--help"], cwd=ROOT, text=True,
                          capture_output=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: sparing {verb}") and done.stderr == ""


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    assert "<!--" not in README
