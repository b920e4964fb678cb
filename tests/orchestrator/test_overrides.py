"""What a command line says wrong is answered with key, rule and remedy, and no secret is repeated."""

import pytest

from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest
from orchestrator.overrides import check_overrides

FOUR = ["experiment=tiny"]


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


@pytest.mark.parametrize("key", ["tracker.wandb_api_key", "tracker.token", "data.s3_secret", "+password"])
def test_a_secret_is_refused_and_not_repeated(key):
    with pytest.raises(BadRequest, match="environment") as caught:
        compose_config([f"{key}=hunter2"])
    assert "hunter2" not in str(caught.value)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(BadRequest, match="data.path: holds a password") as caught:
        compose_config(["data.path='s3://me:hunter2@host/x'"])
    assert "hunter2" not in str(caught.value)


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
