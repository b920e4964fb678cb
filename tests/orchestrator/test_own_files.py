"""A file of the user's own is what its words are, and is answered as they are."""

import dataclasses
import textwrap

import pytest

from model.config import ModelConfig
from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest
from orchestrator.plan_request import compose_plan

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
