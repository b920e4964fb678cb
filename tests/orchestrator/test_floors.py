"""The floors: a module imports from its own or from below. Walks every import, those inside functions too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for package in ("model", "orchestrator")
               for path in (ROOT / package).rglob("*.py"))
HYDRA_FILES = {f"orchestrator/{name}.py" for name in ("compose", "config", "overrides", "own_files")}
TORCHLESS = ["model.config", "model.count", "orchestrator.config", "orchestrator.errors", "orchestrator.compose",
             "orchestrator.plan.layout", "orchestrator.plan.cost", "orchestrator.plan.hardware",
             "orchestrator.train.storage", "orchestrator.train.data", "orchestrator.train.finish",
             "orchestrator.train.lineage", "orchestrator.cluster.policy", "orchestrator.report",
             "orchestrator.__main__"]
MAX_LINES = 340


def imports(source: str) -> set[str]:
    """Dotted names of all that a source imports, `from a import b` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(file: str, source: str) -> list[str]:
    """What this file may not import."""
    def used(*prefixes: str) -> list[str]:
        return [name for name in imports(source) for p in prefixes if name == p or name.startswith(p + ".")]

    rooms = ["plan", "parallel", "train", "cluster"]
    found = []
    if file.startswith("model/"):
        found += used("ray", "hydra", "omegaconf", "fsspec", "wandb", "torch.distributed", "orchestrator")
    for level, room in enumerate(rooms):
        if file.startswith(f"orchestrator/{room}/"):
            found += used(*(f"orchestrator.{above}" for above in rooms[level + 1 :]), "orchestrator.__main__")
    if not file.startswith("orchestrator/cluster/"):
        found += used("ray")
    if file not in HYDRA_FILES:
        found += used("hydra", "omegaconf")
    if file != "orchestrator/train/storage.py":
        found += used("fsspec", "s3fs")
    if file != "orchestrator/train/wandb_sink.py":
        found += used("wandb")
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_file_keeps_to_its_floor(file):
    source = (ROOT / file).read_text()
    assert breaches(file, source) == []
    assert source.isascii() and len(source.splitlines()) <= MAX_LINES
    assert not source or ast.get_docstring(ast.parse(source)), "a file opens with what it is"
    if file != "orchestrator/parallel/rank_info.py":
        names = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"}
    assert Path(file).name != "utils.py"


@pytest.mark.parametrize("file", ["model/config.py", "orchestrator/config.py", "orchestrator/config_cluster.py"])
def test_every_key_says_what_it_is(file):
    for kind in ast.parse((ROOT / file).read_text()).body:
        if isinstance(kind, ast.ClassDef) and kind.name != "Config":
            keys = [line for line in kind.body if isinstance(line, ast.AnnAssign)]
            told = [line for line, after in zip(kind.body, kind.body[1:], strict=False)
                    if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr)]
            assert keys == told, kind.name


def test_a_breach_inside_a_function_is_found():
    source = "def f():\n    import ray\n    from torch import distributed\n    from orchestrator.train import loop\n"
    assert sorted(breaches("model/new.py", source)) == ["orchestrator.train", "orchestrator.train.loop", "ray", "ray",
                                                        "torch.distributed"]
    assert "orchestrator.train" in breaches("orchestrator/plan/new.py", source)
    assert breaches("orchestrator/cluster/new.py", source) == []


def test_the_arithmetic_floors_do_without_torch():
    program = (f"import sys\nfor name in {TORCHLESS}: __import__(name)\n"
               "print([name for name in ('torch', 'ray', 'hydra', 'wandb', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_rank_program_does_without_ray_hydra_and_wandb():
    blocked = "ray hydra omegaconf wandb s3fs transformers tokenizers pyarrow rich".split()
    program = (f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
               "import orchestrator.train.rank, orchestrator.train.loop, orchestrator.train.export\nprint('fine')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr
