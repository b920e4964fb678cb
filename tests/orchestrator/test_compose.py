"""The command line into a config: everything shipped composes, everything wrong is answered with key, rule, remedy."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from model.config import ModelConfig
from orchestrator.__main__ import MODULES, VERBS, main
from orchestrator.compose import compose_config, with_hydra_flags
from orchestrator.config import Config, HardwareConfig, conf_dir, from_dict, to_dict
from orchestrator.errors import INTERRUPTED, BadRequest
from orchestrator.overrides import check_overrides
from orchestrator.plan.hardware import catalogue, resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.plan_questions import settle
from orchestrator.plan_request import compose_plan
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


BAD = {
    "an unknown key": (["train.stepz=3"], r"train\.stepz: unknown key; did you mean train\.steps\?"),
    "a key of another group": (["train.pp=3"], r"train\.pp: unknown key; did you mean layout\.pp\?"),
    "a mistyped section": (["trian.steps=5"], r"trian\.steps: unknown key; did you mean train\.steps\?$"),
    "a mistyped section and key": (["trian.stesp=5"], r"did you mean train\.steps\?$"),
    "a mistyped section in a section": (["hardware.spto.usd_per_h=1"], r"did you mean hardware\.spot\.usd_per_h\?$"),
    "a mistyped section around one": (["hardwre.reserved.usd_per_h=1"], r"mean hardware\.reserved\.usd_per_h\?$"),
    "a mistyped section of no such key": (["trian.zzz=5"], r"did you mean train\?$"),
    "the beginning of one option": (["model=qwen3_235b"], r"did you mean qwen3_235b_a22b\?; options are"),
    "the beginning of one key": (["optim.warm=3"], r"did you mean optim\.warmup_steps\?$"),
    "an unknown group": (["modle=tiny"], r"modle: unknown key; did you mean model\?"),
    "an unknown option": (["model=mixtrl"], r"model=mixtrl: no such option; did you mean mixtral"),
    "an unknown group of whole configs": (["experimnt=tiny"], r"experimnt: unknown key; did you mean experiment\?$"),
    "a new key": (["+train.new=1"], r"train\.new: unknown key"),
    "a key like no other": (["zzz=1"], r"zzz: unknown key; `sparing train --cfg job` prints all keys"),
    "code": (["+model._target_=os.system"], r"model\._target_=os\.system: unknown key; a config names no code"),
    "code for Hydra": (["+hydra.callbacks.x._target_=os.system"], r"hydra\.callbacks.*a config names no code"),
    "a value from the environment": (["data.path='${oc.env:HOME}'"], r"data\.path=\$\{oc\.env:HOME\}: values are not"),
    "a nested one": (["tracker.tags=[a,'x${oc.decode:1}']"], r"tracker\.tags\.1=.*write the value itself"),
    "a removed group": (["~layout"], r"~layout: nothing can be removed"),
    "text for a whole number": (["train.steps=abc"], r"steps=abc: must be a whole number; use train\.steps=100$"),
    "a float for a whole number": (["train.steps=1e3"], r"=1e3: must be a whole number; use train\.steps=1000$"),
    "text for a degree": (["layout.pp=three"], r"layout\.pp=three: must be a whole number; use layout\.pp=1$"),
    "no number for a length": (["train.seq_len=nan"], r"seq_len=nan: must be a whole number; use train\.seq_len=256$"),
    "no key": (["=3"], r"^=3: is no override; write KEY=VALUE"),
    "a fraction for a whole number": (["train.steps=1.5"], r"train\.steps=1\.5: must be a whole number"),
    "neither steps nor auto": (["checkpoint.every=1.5"], r"checkpoint\.every=1\.5: must be a whole number or text"),
    "text for a number": (["optim.lr=fast"], r"optim\.lr=fast: must be a number"),
    "text for a switch": (["checkpoint.background=maybe"], r"must be true or false"),
    "an unknown choice": (["layout.schedule=2f2b"], r"must be one of gpipe, 1f1b, .*dualpipev"),
    "null where a value must be": (["train.steps=null"], r"train\.steps=null: must be a whole number"),
    "a list": (["layout.pp=2,3"], r"layout\.pp=2,3"),
    "no value": (["train.steps"], r"train\.steps: is no override; write KEY=VALUE"),
    "an option in capitals": (["hardware=H100"], r"hardware=H100: no such option; did you mean h100\?"),
    "no option": (["experiment=null"], r"experiment=null: no such option; options are"),
    "nothing": (["run.dir="], r"run\.dir='': is empty; give a value, or leave run\.dir out"),
    "a file that is no model": (["model=no/where.json"], r"model=no/where\.json: is no readable JSON object"),
    "no folder for a model": (["model=no/where"], r"path of a YAML file or a Hugging Face config\.json of yours$"),
    "a folder without one": (["model=tests"], r"^model=tests: is no readable JSON object \(.*give a Hugging Face"),
    "a file of something else": (["model=Makefile"], r"^model=Makefile: is no readable JSON object"),
    "text for a resource": (["cluster.resources={rack1:a}"], r"Value 'a' of type 'str' could not be converted"),
    "a value for a group": (["layout=5"], r"layout=5: no such option; options are"),
    "a number for names and numbers": (["cluster.resources=3"], r"cluster\.resources=3: must be names and numbers, as"),
    "several values": (["model=tiny,mini"], "model=tiny,mini: names several values; give one .*'model=\"tiny,mini\"'$"),
    "another name for a key": (["model.mtp_depth=0"], r"did you mean model\.mtp_loss_weight or model\.n_mtp_layers\?"),
    "a path of other letters": (["run.dir=runs/a \u00e9"], "characters: 'run.dir=\"runs/a \u00e9\"'$"),
    "bad quoting": (["data.path='x"], r"cannot be read; put quotes"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD.keys())
def test_a_bad_override_is_explained(overrides, message):
    with pytest.raises(BadRequest, match=message):
        compose_config(overrides)


def test_what_the_documents_name_is_no_secret_and_no_unknown_key():
    config = compose_config(["data.text_key=body", "data.tokenizer=byte", "cluster.resources={rack1: 1}"])
    assert config.data.text_key == "body" and config.cluster.resources == {"rack1": 1.0}


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


@pytest.mark.parametrize("key", ["tracker.wandb_api_key", "tracker.token", "data.s3_secret", "+password"])
def test_a_secret_is_refused_and_not_repeated(key):
    with pytest.raises(BadRequest, match="environment") as caught:
        compose_config([f"{key}=hunter2"])
    assert "hunter2" not in str(caught.value)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(BadRequest, match="data.path: holds a password") as caught:
        compose_config(["data.path='s3://me:hunter2@host/x'"])
    assert "hunter2" not in str(caught.value)


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


OWN_FILES = {
    "experiment": (["experiment=FILE", "train.steps=9"], """
        defaults: [override /model: mini, _self_]
        train: {batch_size: 64, steps: 7}
        optim: {lr: 1e-3}
        layout: {schedule: 1f1b, pp: 2}
        cluster: {resources: {rack1: 1}}
        data: {path: "it's, here"}""",
                   ["model=mini", "train.batch_size=64", "train.steps=9", "optim.lr=1e-3", "layout.schedule=1f1b",
                    "layout.pp=2", "cluster.resources={rack1: 1}", "data.path=\"it's, here\""]),
    "an option and what differs": (["hardware=FILE"], """
        defaults: [h100, _self_]
        name: ours
        usd_per_h: 1.9
        spot: {usd_per_h: 0.9}""",
                                   ["hardware=h100", "hardware.name=ours", "hardware.usd_per_h=1.9",
                                    "hardware.spot.usd_per_h=0.9"]),
    "a whole option": (["experiment=tiny", "model=FILE"], """
        defaults: [base_model, _self_]
        dim: 128
        n_layers: 3""", ["experiment=tiny", "model.name=own", "model.dim=128", "model.n_layers=3"]),
}


@pytest.mark.parametrize("words, text, same", OWN_FILES.values(), ids=OWN_FILES)
def test_a_file_of_the_users_own_is_an_option(words, text, same, tmp_path):
    """As if it were in conf/, wherever it lies."""
    file = tmp_path / "own.yaml"
    file.write_text(textwrap.dedent(text))
    config, like = compose_config([word.replace("FILE", str(file)) for word in words]), compose_config(same)
    if "model=FILE" in words:  # of the schema, not of what the experiment chose
        like = dataclasses.replace(like, model=ModelConfig(name="own", dim=128, n_layers=3))
    assert config == like


def test_a_users_own_file_is_found_in_the_home_folder_as_every_path_is(tmp_path, monkeypatch):
    """Which not every shell fills in for `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("train: {batch_size: 48}\n")
    (tmp_path / "config.json").write_text("[]")
    config, given = compose_plan(["experiment=~/own.yaml"])
    assert config.train.batch_size == 48 and "train.batch_size" in given
    for word in ("model=~", "model=~/config.json"):
        with pytest.raises(BadRequest, match=f"{word}: holds no JSON object"):
            compose_config([word])


@pytest.mark.parametrize("word, text, message", [
    ("experiment", "train: {stepz: 3}", r"train\.stepz: unknown key; did you mean train\.steps\?"),
    ("experiment", "optim: {lr: fast}", r"optim\.lr=fast: must be a number"),
    ("experiment", "tracker: {wandb_api_key: x}", "secrets are never part of a config"),
    ("experiment", "run: {name: '${oc.env:HOME}'}", "values are not computed from elsewhere"),
    ("experiment", "model: {_target_: os.system}", "unknown key"),
    ("experiment", "- 1", r"experiment=.*own\.yaml: holds no keys; write it as those of conf/experiment"),
    ("experiment", "train:", r"train=null: train is a group with keys steps, .*; set one of these"),
    ("experiment", "# steps: 3", r"experiment=.*own\.yaml: holds no keys"),
    ("experiment", "defaults: [override /model: ours.yaml]",
     r"own\.yaml: defaults has ours\.yaml, and a file builds on shipped options alone; write .* on the command line"),
    ("hardware", "defaults: [own.yaml]", r"defaults has own\.yaml, .*; write the name of an option of hardware"),
    ("experiment", "a: [", r"experiment=.*own\.yaml: cannot be read as YAML \(.*; write it as"),
    ("experiment", "defaults: [mini]", r"defaults has mini; write `- override /model: mini`"),
    ("hardware", "defaults: [override /model: mini]", r"defaults has .*; write the name of an option of hardware"),
    ("hardware", "defaults: [h1000]", r"hardware=h1000: no such option; did you mean h100\?"),
    ("hardware", None, r"hardware=.*own\.yaml: cannot be read as YAML \(.*No such file"),
])
def test_what_is_wrong_in_a_users_own_file_is_told_as_of_an_override(word, text, message, tmp_path):
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(BadRequest, match=message):
        compose_config([f"{word}={tmp_path}/own.yaml"])


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


@pytest.mark.parametrize("word, message", [
    ("experiment=tiny,tin", r"experiment=tin: no such option; did you mean tiny\?"),
    ("experiment=own.yaml,tiny", r"experiment=own\.yaml: no such option; .*tiny, and in a sweep no files"),
    ("model=tiny,minii", r"model=minii: no such option; did you mean mini\?"),
])
def test_a_sweep_over_what_is_no_option_runs_nothing(word, message):
    """An experiment that is none was a run of defaults."""
    with pytest.raises(BadRequest, match=message):
        check_overrides([word])
    check_overrides([word.replace(word.split("=")[1], "tiny,mini")])


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
