"""Manifests as they are filled, against golden files and the schemas of their readers; what is refused, and why."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest
from orchestrator.launch import HELP, Job, fill, pinned
from orchestrator.own_files import expanded
from orchestrator.plan.layout import check_run

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
TWO_NODES = ["experiment=tiny", "cluster.ranks_per_node=2", "data.path='/corpus/a b.txt'"]
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
GPUS = [*TWO_NODES, "hardware=h100", "run.dir=s3://bucket/runs/mine"]
MANY = ["model=mini", "layout=single", "layout.dp=64", "train.batch_size=192"]
FILLED = {
    "ray_job.sh": ["launch=ray_job", "launch.address=http://head:8265", "launch.install=true", *TWO_NODES,
                   "run.dir=/shared/runs/mine"],
    "slurm.sbatch": ["launch=slurm", "launch.hours=36.5", *TWO_NODES, "hardware=h100"],
    "kuberay.yaml": ["launch=kuberay", "launch.image=registry/sparing:1", *GPUS],
    "skypilot.yaml": ["launch=skypilot", *GPUS],
    "torchrun.sh": ["launch=torchrun", "launch.address=node1:29400", *TWO_NODES],
}


def filled(*arguments: str) -> Job:
    config = compose_config(list(arguments))
    check_run(config)
    return fill(config, list(arguments), stamp="20261125-120000", python="/env/bin/python", cwd=Path("/shared/sparing"))


@pytest.mark.parametrize("file, arguments", FILLED.items(), ids=FILLED.keys())
def test_a_filled_manifest_is_the_golden_one(file, arguments):
    """REWRITE_GOLDEN=1 writes them anew; read the difference."""
    manifest = filled(*arguments).manifest.replace(str(ROOT), "/checkout")
    if os.environ.get("REWRITE_GOLDEN"):
        (GOLDEN / file).write_text(manifest)
    assert manifest == (GOLDEN / file).read_text()
    if not file.endswith(".yaml"):
        assert subprocess.run(["bash", "-n", GOLDEN / file]).returncode == 0


def test_two_nodes_that_are_started_at_two_moments_meet_under_one_name():
    words = FILLED["torchrun.sh"]
    config = compose_config(words)
    found = {line for stamp in ("20261125-120000", "20261125-120007")
             for line in fill(config, words, stamp=stamp, python="/env/bin/python", cwd=ROOT).manifest.splitlines()
             if "--rdzv-id" in line}
    assert len(found) == 1


def test_the_command_in_a_manifest_composes_to_the_run_that_was_asked_for():
    line = next(line for line in filled(*FILLED["slurm.sbatch"]).manifest.splitlines() if "orchestrator train" in line)
    words = shlex.split(line.removesuffix(" &"))
    assert words[:4] == ["python", "-m", "orchestrator", "train"]
    config = compose_config(words[4:])
    assert config.data.path == "/corpus/a b.txt" and config.layout.pp == 2 and config.hardware.name == "h100"
    assert config.resume == "auto" and config.run.dir == "/shared/sparing/runs/tiny-20261125-120000"


@pytest.mark.parametrize("hardware", ["h100", "cpu"])
def test_kuberays_rayjob_passes_its_published_schema(hardware):
    import jsonschema

    schema = strict(json.loads((GOLDEN / "kuberay_rayjob_v1.json").read_text()))
    policy, job = yaml.safe_load_all(filled(*FILLED["kuberay.yaml"], f"hardware={hardware}").manifest)
    jsonschema.validate(job, schema)
    assert len(job["metadata"]["name"]) <= 47, "longer names are refused by the operator"
    assert policy["kind"] == "NetworkPolicy"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(job, schema)


def strict(node):
    """A Kubernetes structural schema as the API server reads it: an unknown field is an error."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {"additionalProperties": False} if isinstance(node.get("properties"), dict) and "type" in node else {}
    return {key: strict(value) for key, value in node.items()} | closed


def test_skypilots_task_passes_its_own_loader(tmp_path):
    """SKYPILOT_PYTHON names an interpreter that has skypilot, which is heavy and is none of our dependencies."""
    python = os.environ.get("SKYPILOT_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else None)
    if python is None:
        pytest.skip("skypilot is not installed; SKYPILOT_PYTHON may name an interpreter that has it")
    (tmp_path / "task.yaml").write_text(filled(*FILLED["skypilot.yaml"]).manifest)
    program = ("import sky; task = sky.Task.from_yaml('task.yaml'); r = list(task.resources)[0]; "
               "print(task.num_nodes, r.accelerators, r.job_recovery['recover_on_exit_codes'], r.network_tier.value)")
    done = subprocess.run([python, "-c", program], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env=os.environ | {"HOME": str(tmp_path)})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 {'H100': 2} [34] best", done.stderr


def test_clusters_that_manifests_start_ask_for_a_token_and_open_no_dashboard():
    for file in ("slurm.sbatch", "skypilot.yaml"):
        text = filled(*FILLED[file]).manifest
        assert "RAY_AUTH_MODE=token" in text and "--include-dashboard=false" in text and "dashboard-host" not in text
    policy, job = yaml.safe_load_all(filled(*FILLED["kuberay.yaml"]).manifest)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    callers = policy["spec"]["ingress"][0]["from"]
    name = {"app.kubernetes.io/instance": job["metadata"]["name"]}
    assert [caller["podSelector"]["matchLabels"] for caller in callers] == [
        name, {"app.kubernetes.io/component": "kuberay-operator"}]
    templates = [job["spec"]["submitterPodTemplate"], *(
        group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))]
    assert all(name.items() <= template["metadata"]["labels"].items() for template in templates)
    assert policy["spec"]["podSelector"]["matchLabels"] == name
    assert policy["metadata"]["name"] == job["metadata"]["name"], "nothing of another run's is changed or left"


def test_ray_that_is_told_to_end_waits_for_a_checkpoint_and_ends_before_it_is_killed():
    cluster = list(yaml.safe_load_all(filled(*FILLED["kuberay.yaml"]).manifest))[1]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        waits = {word["name"]: word["value"] for word in pod["containers"][0]["env"]}[DRAIN]
        assert 30 < int(waits) < pod["terminationGracePeriodSeconds"]
    batch = filled(*FILLED["slurm.sbatch"]).manifest
    assert 30 < int(re.search(rf"{DRAIN}=(\d+)", batch)[1]) < int(re.search(r"--signal=B:TERM@(\d+)", batch)[1])


def test_kuberay_gives_the_nodes_back_soon_after_the_end_and_where_they_never_all_come():
    def spec(*words: str) -> dict:
        return list(yaml.safe_load_all(filled(*FILLED["kuberay.yaml"], *words).manifest))[1]["spec"]

    assert spec()["ttlSecondsAfterFinished"] <= 60 and spec()["submissionMode"] == "K8sJobMode"
    assert 600 < spec()["preRunningDeadlineSeconds"] < 1800
    assert spec("cluster.join_timeout_s=7200")["preRunningDeadlineSeconds"] > 7200


def documented() -> list[str]:
    """Commands of the READMEs and of the verb's own help."""
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "deploy/README.md")] + [HELP]
    lines = [line.split(" # ")[0].strip() for text in texts for line in text.splitlines()]
    return [line.replace(" ... ", " ") for line in lines
            if line.startswith("sparing launch launch=") and "|" not in line]


@pytest.mark.parametrize("command", documented())
def test_every_documented_command_fills_a_manifest(command):
    assert filled(*shlex.split(command)[2:]).manifest


BAD = {
    "no launcher": (["launch=local"], r"launch=local: hands the run to nobody; use launch=ray_job, slurm"),
    "an unknown launcher": (["launch=slrum"], r"launch=slrum: no such option; did you mean slurm\?"),
    "devices not named": (["launch=slurm"], r"hardware=auto: launch=slurm asks for devices .*; name them"),
    "a relative run directory": (["launch=ray_job", "run.dir=runs/x"], r"run\.dir=runs/x: must be a URL .*or .*use"),
    "no run directory": (["launch=skypilot", "hardware=h100"], r"run\.dir=None: must be a URL"),
    "a folder where nothing is mounted": (["launch=kuberay", "launch.image=x", *GPUS, "run.dir=/shared/x"],
                                          r"run\.dir=/shared/x: must be a URL .*launch=kuberay runs elsewhere.*use"),
    "checkpoints there": (["launch=skypilot", *GPUS, "checkpoint.dir=/ckpt"], r"checkpoint\.dir=/ckpt: must be a URL"),
    "a folder there, as a URL": (["launch=kuberay", "launch.image=x", *GPUS, "run.dir=file:///shared/x"],
                                 r"run\.dir=file:///shared/x: must be a URL of an object store"),
    "a process's memory": (["launch=ray_job", "run.dir=memory://x"], r"run\.dir=memory://x: must be a URL of an"),
    "checkpoints beside the job": (["launch=ray_job", "run.dir=/x", "checkpoint.dir=x"], r"checkpoint\.dir=x: must be"),
    "more GPUs than a node has": (["launch=slurm", "hardware=h100", *MANY, "layout.dp=12",
                                   "train.validate_sequences=72"],
                                  r"ranks_per_node=0: 12 GPUs of h100 are not on one node.*ranks_per_node=8"),
    "a rack": (["launch=slurm", *MANY, "hardware=gb200"], r"64 GPUs of gb200 .* use cluster\.ranks_per_node=4"),
    "AMD's": (["launch=slurm", "hardware=mi300x"], r"hardware=mi300x: `sparing plan` alone knows it, .*ROCm"),
    "AMD's, with an image that nothing uses": (["launch=skypilot", "hardware=mi300x", "launch.image=x",
                                                "run.dir=s3://b/x"], r"hardware=mi300x: .*use launch=kuberay with"),
    "no image": (["launch=kuberay", *GPUS], r"launch\.image=null: .* needs a container image; build one"),
    "one machine": (["launch=ray_job", "cluster=local"], r"cluster=local: would keep the run on one machine.*leave"),
    "no rendezvous": (["launch=torchrun", *TWO_NODES], r"launch\.address=None: 2 nodes must find each other.*use"),
    "no time": (["launch=kuberay", "launch.image=x", "launch.hours=0", "hardware=cpu", "run.dir=s3://b/x"],
                r"launch\.hours=0: must be at least 0\.02; use launch\.hours=24"),
    "no time before the end is told": (["launch=slurm", "hardware=cpu", "launch.hours=0.1"],
                                       r"launch\.hours=0\.1: must be at least 0\.2; use launch\.hours=24"),
    "a time limit that nothing keeps": (["launch=ray_job", "run.dir=/x", "launch.hours=2"],
                                        r"launch\.hours=2: is of launch=slurm and kuberay alone, .*; leave it out"),
    "an image that nothing uses": (["launch=slurm", "hardware=cpu", "launch.image=x"], r"image=x: is of launch=kuber"),
    "a new run each time": (["launch=slurm", "hardware=cpu", "resume=none"], r"resume=none: a run that is launched"),
    "less than none": (["launch=slurm", "hardware=cpu", "launch.restarts=-1"], r"launch\.restarts=-1: must be at"),
    "no URL": (["launch=ray_job", "launch.address=head:8265", "run.dir=/x"], r"launch\.address=.*must be the .*use"),
    "an unknown key": (["launch=slurm", "launch.partition=x"], r"launch\.partition: unknown key"),
}


@pytest.mark.parametrize("given, meant", [
    (["run.dir='/tmp/a,b (1)'"], {"run.dir": "/tmp/a,b (1)"}), (["run.dir=x y"], {"run.dir": "/shared/sparing/x y"}),
    (["data.path='a/*.txt, stdlib:json, s3://b/c'", "data.tokenizer=t.json", "resume=runs/x", "run.calibrate=runs/y"],
     {"data.path": "/shared/sparing/a/*.txt,stdlib:json,s3://b/c", "data.tokenizer": "/shared/sparing/t.json",
      "resume": "/shared/sparing/runs/x", "run.calibrate": "/shared/sparing/runs/y"})])
def test_a_path_means_on_the_cluster_what_it_means_here(given, meant):
    line = next(line for line in filled("launch=slurm", "hardware=cpu", *given).manifest.splitlines()
                if "orchestrator train" in line)
    config = compose_config(shlex.split(line.removesuffix(" &"))[4:])
    for key, value in meant.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_explained(arguments, message):
    with pytest.raises(BadRequest, match=message):
        filled(*arguments)


def test_a_whole_file_of_ones_own_launches_as_the_shipped_one_that_it_copies(tmp_path):
    """Of all keys it has a value, also of those that are other launchers'."""
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [base_launch, _self_]\nkind: slurm\nhours: 5\n")
    like = filled("launch=slurm", *GPUS, "launch.hours=5")
    assert filled(*expanded([f"launch={own}", *GPUS])).manifest == like.manifest
    own.write_text("kind: torchrun\naddress: node1:29400\nhours: 5\n")
    with pytest.raises(BadRequest, match=r"launch\.hours=5: is of launch=slurm and kuberay alone"):
        filled(*expanded([f"launch={own}", *GPUS]))


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(BadRequest, match=r"launch\.address: holds a password") as caught:
        filled("launch=ray_job", "launch.address=http://me:hunter2@head:8265", "run.dir=/x")
    assert "hunter2" not in str(caught.value)


def test_more_gpus_than_a_node_has_are_asked_of_several():
    manifest = filled("launch=slurm", *MANY, "hardware=h100").manifest
    assert "--nodes=8\n" in manifest and "--gpus-per-node=8\n" in manifest and "--mem=0\n" in manifest


@pytest.mark.parametrize("words, memory", [
    (["hardware=h100", "layout.dp=8"], "0"), (["hardware=h100", "layout.dp=2"], "128G"),
    (["hardware=cpu", "layout.dp=8", "cluster.nodes=2"], "16G")])
def test_slurm_is_asked_for_all_memory_of_whole_nodes_and_for_a_share_of_others(words, memory):
    manifest = filled("launch=slurm", *MANY, *words).manifest
    assert f"--mem={memory}\n" in manifest


def test_an_address_is_a_word_whatever_is_in_it():
    manifest = filled("launch=torchrun", "launch.address='$(id):29400'", *TWO_NODES).manifest
    assert "--rdzv-endpoint '$(id):29400' " in manifest


def test_dry_run_prints_the_manifest_alone_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "orchestrator", "launch", "launch=torchrun", "launch.dry_run=true"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/sh\n") and done.stderr == ""
    assert "launch" not in done.stdout.split("orchestrator train")[1] and list(tmp_path.iterdir()) == []


def test_the_images_lock_is_hashed_and_holds_what_is_tested():
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    entries = [line for line in lock.replace("\\\n", " ").splitlines() if line and not line.lstrip().startswith("#")]
    versions = {}
    for entry in entries:
        requirement, *rest = entry.split()
        assert any(word.startswith("--hash=sha256:") for word in rest), entry
        versions.update([requirement.split("==")])
    tested = pinned(ROOT)
    assert {name: versions[name] for name in tested if name in versions} == {name: version for name, version in
                                                                             tested.items() if name in versions}
    packages = filled(*FILLED["ray_job.sh"]).manifest
    assert all(f'"{name}==' in packages for name in ("tokenizers", "pyarrow")), "as the image and SkyPilot's have"
    assert {"torch", "ray", "hydra-core", "wandb", "fsspec", "s3fs", "grain", "safetensors", "jinja2"} <= set(versions)
    assert "://" not in lock, "no index of anybody's"
