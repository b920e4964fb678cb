"""The command line into a config: what is shipped composes, what is continued goes on, what cannot be is told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.__main__ import MODULES, VERBS, main
from orchestrator.compose import compose_config, with_hydra_flags
from orchestrator.config import Config, HardwareConfig, conf_dir, from_dict, to_dict
from orchestrator.errors import INTERRUPTED, BadRequest
from orchestrator.plan.hardware import catalogue, resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.plan_questions import settle
from orchestrator.show_plan import split_words
from orchestrator.train.run_dir import named
from orchestrator.words import plain

ROOT = Path(__file__).parents[2]
OPTIONS = [(folder.name, file.stem) for folder in sorted(conf_dir().iterdir()) if folder.is_dir()
           for file in sorted(folder.glob("*.yaml"))]
FOUR = ["experiment=tiny"]


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_shipped_option_composes(group, option):
    config = compose_config([f"{group}={option}"] + (["data.path=x.txt"] if option == "text" else []))
    config.model.check()
    if group == "experiment":
        check_run(config)
    assert from_dict(Config, to_dict(config)) == config


def test_an_experiment_of_ones_own_is_taken_whole_and_a_slip_in_it_is_said(tmp_path, monkeypatch):
    shutil.copytree(conf_dir(), tmp_path / "conf")
    for module in ("compose", "overrides"):
        monkeypatch.setattr(f"orchestrator.{module}.conf_dir", lambda: tmp_path / "conf")
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults: [override /model: mini]\nrun: {name: mine}\ntrain: {steps: 7}\n")
    config = compose_config(["experiment=mine", "train.batch_size=8"])
    assert (config.run.name, config.model.name, config.train.steps, config.train.batch_size) == ("mine", "mini", 7, 8)
    mine.write_text("train: [7\n")
    with pytest.raises(BadRequest, match=r"while parsing a flow sequence; .*mine\.yaml., line 1"):
        compose_config(["experiment=mine"])


def test_a_group_may_be_asked_for_as_hydras_manual_has_it(tmp_path):
    assert compose_config(["+experiment=tiny"]) == compose_config(FOUR)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(compose_config(["model=mini"]))))
    assert compose_config(["+experiment=tiny", f"run.dir={tmp_path}", "resume=auto"]).model.name == "tiny"


def test_every_verb_drops_the_plus_and_takes_the_last_of_a_repeated_key():
    words = ["+model=mini", "train.steps=3", "~x", "--cfg", "job", "+hydra.x=1", "model=tiny", "++train.steps=5", "job"]
    assert plain(words) == ["~x", "--cfg", "job", "+hydra.x=1", "model=tiny", "train.steps=5", "job"]
    assert compose_config(["train.steps=3", "+train.steps=5"]).train.steps == 5
    assert compose_config(["+model=no/where.json", "model=mini"]).model.name == "mini"
    assert split_words(["gpus=8", "+hardware=h100", "+gpus=16", "hardware=h200"]) == (
        {"gpus": "16"}, ["hardware=h200"])
    told = settle(*split_words(["+hardware=h100,h200", "tokens=1e12", "gpus=8", "model=mini", "hardware=h200"]))
    assert told.overrides == ["model=mini", "hardware=h200"] and told.question is None
    done = run("train", "experiment=tiny", "train.steps=3", "+train.steps=5", "--cfg", "job")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["train"]["steps"] == 5
    done = run("launch", "launch=torchrun", "launch=slurm", "+launch.dry_run=true", "experiment=tiny", "hardware=h100",
               "+train.steps=3", "train.steps=5")
    assert "#SBATCH" in done.stdout and "train.steps=5" in done.stdout and "train.steps=3" not in done.stdout


def test_a_runs_saved_config_runs_no_code_and_reads_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    saved = to_dict(compose_config([*FOUR, f"run.dir={tmp_path}"]))
    saved["data"]["path"] = "${oc.env:AWS_SECRET_ACCESS_KEY}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    config = compose_config([f"run.dir={tmp_path}", "resume=auto"])
    assert config.data.path == "${oc.env:AWS_SECRET_ACCESS_KEY}"
    canary = tmp_path / "canary"
    for evil in (f"x: !!python/object/apply:os.mkdir ['{canary}']", f"model: {{_target_: os.mkdir, path: '{canary}'}}"):
        (tmp_path / "config.yaml").write_text(evil)
        with pytest.raises(BadRequest, match=r"config\.yaml: is no config of a run"):
            compose_config([f"run.dir={tmp_path}", "resume=auto"])
    assert not canary.exists()


RULES = {
    "experts by ep": ([*FOUR, "model.n_routed_experts=6", "layout.dp=4", "layout.ep=4"],
                      "layout.ep=4: must divide model.n"),
    "dp by ep": ([*FOUR, "layout.ep=3"], r"layout\.ep=3: must divide layout\.dp=2; use one of \[1, 2\]"),
    "experts of a dense model": (["model=tiny_dense_total", "layout.dp=2", "layout.ep=2"], "the model is dense"),
    "stages and layers": ([*FOUR, "layout.pp=8"], r"layout\.pp=8: makes 8 stages.*model\.n_layers=4"),
    "microbatches of 1F1B": ([*FOUR, "layout.microbatches=1"],
                             r"layout\.microbatches=1: must be at least the 2 stages"),
    "looped microbatches": ([*FOUR, "layout.schedule=interleaved_1f1b", "layout.microbatches=5"],
                            r"layout\.microbatches=5: must be a multiple of layout\.pp=2"),
    "batch by microbatches": ([*FOUR, "train.batch_size=18"],
                              r"train\.batch_size=18: must be a multiple.*use 16 or 20"),
    "validation by microbatches": ([*FOUR, "train.validate_sequences=6"], "validate_sequences=6: must be a multiple"),
    "recompute and split backward": ([*FOUR, "layout.schedule=zbv", "layout.microbatches=4", "layout.recompute=full"],
                                     "layout.recompute=full: does not go with the split backward"),
    "sequence too long": ([*FOUR, "train.seq_len=4096"], r"train\.seq_len=4096: must not exceed model\.max_seq_len"),
    "a budget without end": ([*FOUR, "budget.max_usd=inf"], r"budget\.max_usd=inf: must be positive and finite"),
    "a budget without a price": ([*FOUR, "hardware=cpu", "hardware.usd_per_h=null", "budget.max_usd=1"],
                                 "needs a price.*set hardware.usd_per_h"),
    "another word than auto": ([*FOUR, "checkpoint.every=often"], "every=often: must be auto or a number of"),
    "a negative rate": ([*FOUR, "optim.lr=-1"], "optim.lr=-1.0: must be positive"),
    "an endless rate": ([*FOUR, "optim.lr=inf"], "optim.lr=inf: must be positive and finite"),
    "a negative seed": ([*FOUR, "seed=-1"], "seed=-1: must be at least 0"),
    "a number of too many digits": ([*FOUR, "train.batch_size=100000000000000000000"], "must be at most 2,147,483,647"),
    "more ranks than can be": ([*FOUR, "layout.dp=1000000000"], r"layout\.dp=1000000000: makes 2,000,000,000 ranks"),
    "more experts than can be": ([*FOUR, "model.n_routed_experts=1000000007"], "must be at most 1,000,000; lower it"),
    "a negative size": ([*FOUR, "model.n_shared_experts=-1"], "model.n_shared_experts=-1: must not be negative"),
    "no number": ([*FOUR, "model.init_std=nan"], "model.init_std=nan: must be positive and finite"),
    "an unknown device": ([*FOUR, "hardware.device=gpu"], "hardware.device=gpu: must be cpu or cuda; use cuda"),
    "half a ramp": ([*FOUR, "train.batch_start=4"], "train.batch_start=4: makes a ramp only with train.batch_ramp"),
    "no steps": ([*FOUR, "train.steps=0"], "train.steps=0: must be at least 1"),
    "nodes and ranks": ([*FOUR, "cluster.nodes=3"], "cluster.nodes=3: must divide the 4 ranks"),
    "missing data": (["data=text"], r"data\.path='': must name text.*use data\.path="),
    "weights of other parts": (["data=text", "data.path=\"a,b\"", "data.weights=[1]"],
                               r"data\.weights=\[1\.0\]: must be a positive number for each of the 2 parts of "
                               r"data\.path=a,b; use data\.weights=\[1,1\]"),
    "a weight of none": ([*FOUR, "data.weights=[0]"], r"data\.weights=\[0\.0\]: must be a positive number"),
    "a contradiction in the model": ([*FOUR, "model.n_activated_experts=9"], "model.n_activated_experts"),
}


@pytest.mark.parametrize("overrides, message", RULES.values(), ids=RULES.keys())
def test_a_run_that_cannot_be_is_refused_with_rule_and_remedy(overrides, message):
    with pytest.raises(BadRequest, match=message) as caught:
        check_run(compose_config(overrides))
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


def test_continuing_takes_the_runs_own_config_then_this_commands_overrides(tmp_path):
    saved = compose_config([*FOUR, "model=mini", "train.steps=70", f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(saved)))
    config = compose_config([f"run.dir={tmp_path}", "resume=auto", "layout.pp=4", "tracker=off"])
    assert config.model == saved.model and config.train == saved.train
    assert config.layout.pp == 4 and config.layout.dp == 2 and config.tracker.wandb.name == "off"
    assert compose_config([f"run.dir={tmp_path}"]).model.name == "tiny"
    (tmp_path / "config.yaml").write_text("train: {stepz: 3}")
    with pytest.raises(BadRequest, match=r"config\.yaml: is no config of a run \(train\.stepz: unknown key"):
        compose_config([f"run.dir={tmp_path}", "resume=auto"])


def test_a_run_that_was_copied_or_renamed_has_its_checkpoints_with_it(tmp_path):
    for name, own in (("auto", None), ("named", str(tmp_path / "elsewhere"))):
        before, after = tmp_path / name, tmp_path / f"{name}-renamed"
        before.mkdir()
        saved = named(compose_config([*FOUR, f"run.dir={before}", *([f"checkpoint.dir={own}"] if own else [])]))
        (before / "config.yaml").write_text(yaml.safe_dump(to_dict(saved)))
        before.rename(after)
        config = named(compose_config([f"run.dir={after}", "resume=auto"]))
        assert (config.run.dir, config.checkpoint.dir) == (str(after), own or f"{after}/checkpoints")


def test_every_price_has_a_source_and_a_day():
    for name, entry in catalogue().items():
        assert entry.name == name
        if entry.usd_per_h is not None:
            assert entry.source and re.fullmatch(r"20\d\d-\d\d-\d\d", entry.date), name


def test_auto_finds_the_device_and_keeps_what_the_user_set():
    auto = HardwareConfig()
    assert resolve_hardware(auto, None).name == "cpu"
    assert resolve_hardware(auto, "NVIDIA H200").name == "h200"
    assert resolve_hardware(auto, "NVIDIA H100 80GB HBM3").bf16_tflops == 989
    unknown = resolve_hardware(auto, "Some GPU 9000")
    assert unknown.usd_per_h is None and unknown.bf16_tflops is None and unknown.device == "cuda"
    assert resolve_hardware(HardwareConfig(usd_per_h=1.25), "NVIDIA H200").usd_per_h == 1.25
    assert resolve_hardware(HardwareConfig(name="mine"), "NVIDIA H200").name == "mine"


def run(*arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "orchestrator", *arguments], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, env=env)


@pytest.mark.parametrize("arguments, code, words", [
    (["train", "train.stepz=3"], 2, "error: train.stepz: unknown key"),
    (["train", "layout.ep=3"], 2, "error: layout.ep=3: must divide"),
    (["trian"], 2, "did you mean train?"),
    (["status", "nowhere"], 2, "nowhere: is no run directory"),
    (["report", "nowhere"], 2, "nowhere"),
    (["report"], 2, "no run directory was given"),
    (["export", "nowhere", "out"], 2, "nowhere: no whole checkpoint there"),
    (["export", "nowhere", "out", "dtype=int4"], 2, "dtype=int4: must be one of"),
    (["import", "nowhere", "out"], 2, "nowhere: is no directory"),
    (["import"], 2, "import: takes 2 arguments"),
    (["train", "launch=slurm"], 2, "launch=slurm: train runs on the machine or the cluster it is in; leave it out, or"),
    (["train", "checkpoint.dir=/proc/c"], 3, "checkpoint.dir=/proc/c: cannot be written (No such file or directory); "),
    (["train", "tracker.tags=a"], 2, "tracker.tags=a: must be a list, as in [a,b]; use tracker.tags=[a]"),
    (["train", "--train.steps=3"], 2, "--train.steps: no such flag; write train.steps=VALUE, without dashes"),
    (["train", "--verbose"], 2, "--verbose: no such flag; there are --cfg"),
    (["train", "--cfg", "job", "train.stepz=3"], 2, "unknown key"),
    (["train", "--resolve"], 2, "error: --resolve: is of what --cfg prints; use --cfg job --resolve"),
    (["-sc", "install=csh"], 2, "error: --shell-completion: takes install=SHELL"),
    (["train", "--config-dir=/tmp", "--cfg", "job"], 2, "--config-dir=/tmp: configs come from conf/ alone"),
])
def test_a_users_mistake_is_one_line_and_its_exit_code(arguments, code, words, capfd):
    assert main(arguments) == code
    told = capfd.readouterr().err
    assert words in told and "Traceback" not in told and len(told.splitlines()) == 1


def test_a_users_mistake_is_the_exit_code_of_the_command_too():
    done = run("train", "train.stepz=3")
    assert done.returncode == 2 and done.stderr.startswith("error: train.stepz: unknown key")
    assert len(done.stderr.splitlines()) == 1


def test_hydras_own_flags_work_behind_the_verb():
    done = run("train", "experiment=tiny", "--cfg", "job")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["layout"]["pp"] == 2 and done.stderr == ""


def test_a_sweep_goes_on_with_each_run_by_its_own_config_and_ends_with_one_that_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, lr in (("a", 0.01), ("b", 0.02), ("c", 0.03)):
        (tmp_path / name).mkdir()
        saved = to_dict(compose_config([f"optim.lr={lr}", f"run.dir={tmp_path / name}"]))
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(saved))
    found, codes = [], [0, 34]

    def train(config: Config) -> int:
        found.append((config.optim.lr, config.train.steps))
        return codes.pop(0)

    words = ["-m", f"run.dir={tmp_path}/a,{tmp_path}/b,{tmp_path}/c", "resume=auto", "train.steps=9",
             "cluster.resources={x: 1}"]
    assert with_hydra_flags(words, train) == 34
    assert found == [(0.01, 9), (0.02, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "runs"]


@pytest.mark.parametrize("line, choices", [
    ("sparing pl", {"plan"}), ("sparing train layout.sched", {"layout.schedule="}), ("sparing status ", set()),
    ("sparing plan cluster=h800_", {"cluster=h800_2048", "cluster=h800_256"}),
    ("sparing train tracker=", {"tracker=off", "tracker=wandb", "tracker=wandb_offline"}),
    ("sparing train x=1 layout.schedule=zb", {"layout.schedule=zbv"})])
def test_a_shell_completes_verbs_and_overrides(line, choices):
    done = run("-sc", "query=bash", env=os.environ | {"COMP_LINE": line})
    assert (done.returncode, done.stderr) == (0, "")
    assert {word for word in done.stdout.split() if word.startswith(line.split(" ")[-1])} == choices


def test_a_shell_takes_the_script_that_completes_for_it():
    script = 'eval "$(cat)"; complete -p sparing'
    done = subprocess.run(["bash", "-c", script], input=run("train", "--shell-completion", "install=bash").stdout,
                          text=True, capture_output=True, timeout=60)
    assert "hydra_bash_completion sparing" in done.stdout, done


INTERRUPTING = """
import signal, sys

class Interrupting:
    def find_spec(name, path, target=None):
        if "orchestrator.errors" in sys.modules:
            sys.meta_path.remove(Interrupting)
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting)
"""


@pytest.mark.parametrize("verb", [*VERBS, *MODULES])
def test_ctrl_c_while_a_verb_is_imported_is_quiet(verb, tmp_path):
    """At the very first import after those of the command itself."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    done = run(verb, "x", env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")
