"""The documents against the disk: the tree, verbs, configs, links, files and tests that they name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


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


@pytest.mark.parametrize("verb", ["train", "prepare", "status", "report", "export", "import"])
def test_verbs_explain_themselves(verb):
    assert commands(verb), f"the README shows no use of {verb}"
    done = subprocess.run([sys.executable, "-m", "orchestrator", verb, "--help"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: sparing {verb}") and done.stderr == ""


def test_the_configs_are_those_of_conf():
    section = README[README.index("## Configs") :].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([\w, ]+) \|$", section, re.MULTILINE)
    there = {folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
             for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert {group: sorted(options.split(", ")) for group, options in rows} == there
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", (ROOT / "conf" / "config.yaml").read_text(), re.MULTILINE))
    assert {group: options.split(", ")[0] for group, options in rows if group in defaults} == defaults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_pictures_files_and_tests_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for file in re.findall(r"(?:tests|benchmarks|docs|deploy|conf|orchestrator|model)/[\w/]+\.[a-z]{2,4}\b", text):
        assert (ROOT / file).exists() or (ROOT / "orchestrator" / file).exists(), file
    for name in re.findall(r"`(test_\w+)(?:`|\.\.\.)", text):
        assert f"def {name}" in TESTS, name
    assert "<!--" not in text
