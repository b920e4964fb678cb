"""A manifest's way to its scheduler: submitted, followed, and its exit code returned."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator import launch_submit
from orchestrator.errors import NotFit, Transient
from orchestrator.launch import Job, LaunchKind
from orchestrator.launch_dashboard import authentication, has_ended, job_outcome
from orchestrator.launch_submit import submit
from tests.cluster_harness import wait_until


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


TORCHRUN = """
import os, signal, subprocess, sys
from pathlib import Path
from orchestrator import launch_submit
from orchestrator.launch import Job, LaunchKind

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if early:
            while not Path("ready").exists():
                pass
            os.kill(os.getpid(), signal.SIGTERM)

early, subprocess.Popen, sys.executable = "early" in sys.argv, Popen, str(Path("python").absolute())
before = signal.getsignal(signal.SIGTERM)
code = launch_submit.submit(Job(LaunchKind.torchrun, "name", Path("script").read_text()), Path("runs"))
raise SystemExit(code if signal.getsignal(signal.SIGTERM) is before else 1)
"""
"""The command, in a process of its own; early: with a SIGTERM before the ranks are known to it."""


@pytest.mark.parametrize("early", [[], ["early"]], ids=["while they run", "as they start"])
def test_ranks_under_torchrun_hear_of_sigterm_and_are_waited_for(tmp_path, early):
    (tmp_path / "torchrun").touch(mode=0o755)
    (tmp_path / "script").write_text("trap 'echo heard; sleep 0.5; exit 34' TERM; touch ready\n"
                                     "until [ -e over ]; do sleep 0.1; done\n")
    with subprocess.Popen([sys.executable, "-c", TORCHRUN, *early], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}) as launch:
        try:
            wait_until((tmp_path / "ready").exists, 120, "nothing has started")
            if not early:
                launch.send_signal(signal.SIGTERM)
            out, _ = launch.communicate(timeout=120)
        finally:
            (tmp_path / "over").touch()
            launch.kill()
    assert launch.returncode == 34 and out.count("heard") == 1


def test_a_torchrun_that_sigterm_ends_at_once_is_preempted(tmp_path):
    (tmp_path / "script").write_text("kill -TERM $$\n")
    job = Job(LaunchKind.torchrun, "name", "")
    assert launch_submit._torchrun(job, tmp_path / "script", dict(os.environ)) == 34


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
    answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": "RUNNING"}))
    looked = launch_submit.has_ended

    def look(*arguments, **options):
        if (tmp_path / "said").exists():
            answers["/api/jobs/mine", "right"] = (200, json.dumps({"status": "FAILED", "driver_exit_code": 34}))
        return looked(*arguments, **options)

    monkeypatch.setattr(launch_submit, "has_ended", look)
    monkeypatch.setattr(launch_submit, "POLL_S", 0.01)
    monkeypatch.setattr(launch_submit, "LOOK_S", 0.2)
    script = f"echo step 1\ntouch {tmp_path}/said\nexec sleep 600\n"
    job = Job(LaunchKind.ray_job, "mine", script, f"http://127.0.0.1:{port}")
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
