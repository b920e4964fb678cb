"""Manifests as they are filled, against golden files and the schemas of their readers; what is refused, and why."""

import http.server
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from orchestrator import launch_submit
from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, NotFit, Transient
from orchestrator.launch import HELP, Job, LaunchKind, fill, pinned
from orchestrator.launch_dashboard import authentication, has_ended, job_outcome
from orchestrator.launch_submit import submit
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
    "a relative run directory": (["launch=ray_job", "run.dir=runs/x"], r"run\.dir=runs/x: must be a URL or .*use"),
    "no run directory": (["launch=skypilot", "hardware=h100"], r"run\.dir=None: must be a URL"),
    "a folder where nothing is mounted": (["launch=kuberay", "launch.image=x", *GPUS, "run.dir=/shared/x"],
                                          r"run\.dir=/shared/x: must be a URL, as launch=kuberay runs elsewhere.*use"),
    "checkpoints there": (["launch=skypilot", *GPUS, "checkpoint.dir=/ckpt"], r"checkpoint\.dir=/ckpt: must be a URL"),
    "checkpoints beside the job": (["launch=ray_job", "run.dir=/x", "checkpoint.dir=x"], r"checkpoint\.dir=x: must be"),
    "more GPUs than a node has": (["launch=slurm", "hardware=h100", *MANY, "layout.dp=12",
                                   "train.validate_sequences=72"],
                                  r"ranks_per_node=0: 12 GPUs of h100 are not on one node.*ranks_per_node=8"),
    "a rack": (["launch=slurm", *MANY, "hardware=gb200"], r"64 GPUs of gb200 .* use cluster\.ranks_per_node=4"),
    "AMD's": (["launch=slurm", "hardware=mi300x"], r"hardware=mi300x: `sparing plan` alone knows it, .*ROCm"),
    "no image": (["launch=kuberay", *GPUS], r"launch\.image=null: .* needs a container image; build one"),
    "one machine": (["launch=ray_job", "cluster=local"], r"cluster=local: would keep the run on one machine.*leave"),
    "no rendezvous": (["launch=torchrun", *TWO_NODES], r"launch\.address=None: 2 nodes must find each other.*use"),
    "no time": (["launch=slurm", "hardware=cpu", "launch.hours=0"], r"launch\.hours=0: must be at least 0\.02; use"),
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


def test_a_scheduler_that_does_not_answer_is_asked_again_for_minutes(monkeypatch):
    monkeypatch.setattr(launch_submit, "POLL_S", 0.0)
    answers = iter([None, NotFit("busy"), None, NotFit("busy"), 93])

    def outcome():
        answer = next(answers, NotFit("gone"))
        if isinstance(answer, NotFit):
            raise answer
        return answer

    assert launch_submit._poll(outcome, stop="scancel 1") == 93
    monkeypatch.setattr(launch_submit, "SILENCE_S", 0.05)
    with pytest.raises(Transient, match="gone; .*the job may go on: end it with scancel 1"):
        launch_submit._poll(outcome, stop="scancel 1")


@pytest.mark.parametrize("state, code, ours", [
    ("COMPLETED", "0:0", 0), ("FAILED", "93:0", 93), ("FAILED", "0:9", 1), ("OUT_OF_MEMORY", "0:125", 1),
    ("TIMEOUT", "0:0", 34), ("PREEMPTED", "0:15", 34), ("NODE_FAIL", "0:0", 34)])
def test_a_slurm_jobs_last_state_is_an_exit_code_of_ours(state, code, ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for tool, said in (("sbatch", "7"), ("scontrol", f"JobId=7 JobState={state} Restarts=0 ExitCode={code}")):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / tool).chmod(0o755)
    assert submit(Job(LaunchKind.slurm, "name", "true\n"), tmp_path / "runs") == ours


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_explained(arguments, message):
    with pytest.raises(BadRequest, match=message):
        filled(*arguments)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(BadRequest, match=r"launch\.address: holds a password") as caught:
        filled("launch=ray_job", "launch.address=http://me:hunter2@head:8265", "run.dir=/x")
    assert "hunter2" not in str(caught.value)


def test_more_gpus_than_a_node_has_are_asked_of_several():
    manifest = filled("launch=slurm", *MANY, "hardware=h100").manifest
    assert "--nodes=8\n" in manifest and "--gpus-per-node=8\n" in manifest and "--mem=512G\n" in manifest


def test_an_address_is_a_word_whatever_is_in_it():
    manifest = filled("launch=torchrun", "launch.address='$(id):29400'", *TWO_NODES).manifest
    assert "--rdzv-endpoint '$(id):29400' " in manifest


def test_ranks_under_torchrun_hear_of_sigterm_and_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "torchrun").touch(mode=0o755)
    script = f"trap 'sleep 0.5; exit 34' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done\n"

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert submit(Job(LaunchKind.torchrun, "name", script), tmp_path / "runs") == 34
    assert signal.getsignal(signal.SIGTERM) is before


def test_dry_run_prints_the_manifest_alone_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "orchestrator", "launch", "launch=torchrun", "launch.dry_run=true"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/sh\n") and done.stderr == ""
    assert "launch" not in done.stdout.split("orchestrator train")[1] and list(tmp_path.iterdir()) == []


@pytest.fixture
def dashboard():
    """A stand-in for Ray's dashboard; `answers` maps (path, token) to a status and a body."""
    answers: dict[tuple[str, str], tuple[int, str]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, body = answers.get((self.path, token), (401, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answers, server.server_port
    server.shutdown()
    server.server_close()


def test_an_open_dashboard_on_another_machine_is_refused_unless_told_to(dashboard, monkeypatch):
    answers, port = dashboard
    answers["/api/jobs/", ""] = (200, "[]")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [(2, 1, 6, "", ("192.0.2.7", port))])
    monkeypatch.setattr(socket, "create_connection", lambda address, *_, **__: connect(address))

    def connect(address):
        connection = socket.socket()
        connection.connect(("127.0.0.1", address[1]))
        return connection

    with pytest.raises(NotFit, match=r"lets anyone .* run code.*RAY_AUTH_MODE=token.*launch\.allow_insecure=true"):
        authentication(f"http://head:{port}", allow_insecure=False)
    assert authentication(f"http://head:{port}", allow_insecure=True) == {"RAY_AUTH_MODE": "disabled"}
    monkeypatch.undo()
    assert authentication(f"http://127.0.0.1:{port}", allow_insecure=False) == {"RAY_AUTH_MODE": "disabled"}


def test_a_dashboard_that_asks_gets_the_token_and_says_how_the_job_ended(dashboard, monkeypatch, tmp_path):
    answers, port = dashboard
    address = f"http://127.0.0.1:{port}"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NotFit, match=r"asks for a token, and there is none here; put"):
        authentication(address, allow_insecure=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("right\n")
    with pytest.raises(NotFit, match=r"refuses the token that is here"):
        authentication(address, allow_insecure=True)
    answers["/api/jobs/", "right"] = (200, "[]")
    assert authentication(address, allow_insecure=False) == {"RAY_AUTH_MODE": "token"}
    for status, code, outcome in [("SUCCEEDED", 0, 0), ("FAILED", 93, 93), ("FAILED", None, 1), ("STOPPED", None, 34),
                                  ("RUNNING", None, None)]:
        answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": status, "driver_exit_code": code}))
        assert job_outcome(address, "mine", 1, mode="token") == outcome
        assert has_ended(address, "mine", mode="token") == (status != "RUNNING")
    for error, outcome in [("JOB_SUPERVISOR_ACTOR_DIED", 33), ("RUNTIME_ENV_SETUP_FAILURE", 1)]:
        answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": "FAILED", "error_type": error}))
        assert job_outcome(address, "mine", 1, mode="token") == outcome, "one lost with its node may go again"
    assert not has_ended(address, "unknown", mode="token")


def test_a_dashboard_that_asks_for_no_token_is_told_none(dashboard, monkeypatch):
    answers, port = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    answers["/api/jobs/", ""], answers["/api/jobs/mine", ""] = (200, "[]"), (200, '{"status": "SUCCEEDED"}')
    mode = authentication(f"http://127.0.0.1:{port}", allow_insecure=False)["RAY_AUTH_MODE"]
    assert has_ended(f"http://127.0.0.1:{port}", "mine", mode=mode)
    assert job_outcome(f"http://127.0.0.1:{port}", "mine", 1, mode=mode) == 0


def test_a_log_that_stalls_does_not_outlast_its_job(dashboard, monkeypatch, tmp_path, capfd):
    answers, port = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    answers["/api/jobs/", "right"] = (200, "[]")
    answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": "FAILED", "driver_exit_code": 34}))
    monkeypatch.setattr(launch_submit, "POLL_S", 0.01)
    monkeypatch.setattr(launch_submit, "LOOK_S", 0.2)
    job = Job(LaunchKind.ray_job, "mine", "echo step 1\nexec sleep 600\n", f"http://127.0.0.1:{port}")
    assert submit(job, tmp_path / "runs") == 34 and "step 1" in capfd.readouterr().out


@pytest.mark.parametrize("known", [False, True])
def test_rays_own_traceback_is_not_shown_where_the_cluster_is_gone(dashboard, monkeypatch, tmp_path, capfd, known):
    answers, port = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    answers["/api/jobs/", "right"] = (200, "[]")
    answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": "FAILED", "driver_exit_code": 1} if known else
                                                          {"status": "RUNNING"}))
    script = "echo said 1>&2\necho Traceback of ray 1>&2\necho ConnectionError 1>&2\nexit 1\n"
    job = Job(LaunchKind.ray_job, "mine", script, f"http://127.0.0.1:{port}")
    if known:
        assert submit(job, tmp_path / "runs") == 1
    else:
        with pytest.raises(Transient, match="the connection to .* ended before the job"):
            submit(job, tmp_path / "runs")
    shown = capfd.readouterr().err
    assert "said\n" in shown and ("Traceback" in shown) == known and ("ConnectionError" in shown) == known


FAKES = {
    "kubectl": """case "$1" in
apply) echo "rayjob created" ;;
logs) echo "2026-11-25T12:00:00.1Z step 1"
      case "$*" in *--since-time=2026-11-25T12:00:00.1Z*)
        echo "2026-11-25T12:00:00.3Z Status message: Job entrypoint command failed with exit code 93, last logs"
        echo "2026-11-25T12:00:00.4Z step 1" ;; esac ;;
get) n=$(cat count 2> /dev/null || echo 0); echo $((n + 1)) > count
     [ "$n" -lt 2 ] && echo '{"status": {"jobDeploymentStatus": "Running"}}' || echo '{"status": {"jobDeploymentStatus":
     "Failed", "message": "Ray head pod container ray-job-submitter terminated with exit code 1: Error"}}' ;;
esac""",
    "sky": '[ ${#RAY_AUTH_TOKEN} = 64 ] && [ "$4" = --secret=RAY_AUTH_TOKEN ] && echo "step 1" && exit 93',
    "torchrun": 'echo "step 1"; exit 93',
}


@pytest.mark.parametrize("kind, tool", [("kuberay", "kubectl"), ("skypilot", "sky"), ("torchrun", "torchrun")])
def test_a_job_is_followed_and_its_exit_code_returned(kind, tool, tmp_path, monkeypatch, capfd):
    """The launchers' own programs are stand-ins here: what is checked is what we make of their answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launch_submit, "POLL_S", 0.01)
    with pytest.raises(NotFit, match=f"launch={kind}: needs the command {tool}, which is not here; install it"):
        monkeypatch.setenv("PATH", "/nowhere")
        submit(Job(LaunchKind[kind], "name", "exit 1\n"), tmp_path / "runs")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / tool).write_text(f"#!/bin/bash\n{FAKES[tool]}\n")
    (tmp_path / tool).chmod(0o755)
    manifest = f"{tool}\n"
    assert submit(Job(LaunchKind[kind], "name", manifest), tmp_path / "runs") == 93
    assert capfd.readouterr().out.count("step 1") == 1
    assert [file.read_text() for file in (tmp_path / "runs").iterdir()] == [manifest]


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
