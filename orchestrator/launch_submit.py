"""Filled manifests handed over: each launcher's own command line, its log on our stdout, the run's exit code back.

A job that is submitted goes on when we are interrupted; we say how it is ended.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.choices import LaunchKind
from orchestrator.errors import NotFit, Preempted, Transient
from orchestrator.launch import Job
from orchestrator.launch_dashboard import authentication, has_ended, job_outcome

POLL_S = 2.0
LOOK_S = 10.0
"""Between two looks at a job whose log is followed."""
SILENCE_S = 300.0
"""A scheduler that cannot be asked this long is given up; its job is not."""
SLURM_ENDS = {"COMPLETED": 0, "FAILED": 1, "OUT_OF_MEMORY": 1, "DEADLINE": 1, "CANCELLED": Preempted.exit_code,
              "PREEMPTED": Preempted.exit_code, "TIMEOUT": Preempted.exit_code, "NODE_FAIL": Preempted.exit_code,
              "BOOT_FAIL": Preempted.exit_code}
"""Our exit code by a job's last state, where the job has none of its own."""
RUNS_CODE = re.compile(r"entrypoint command failed with exit code (\d+)")
"""What Ray says of a run that failed. Others, as KubeRay of its submitter, have exit codes too."""
SUBMITTED = "Job submission server address"
"""What Ray's command says first: a new start of the run."""
KUBERAY_ENDS = {"DeadlineExceeded": Preempted.exit_code, "PreRunningDeadlineExceeded": NotFit.exit_code}
"""Our exit code by the reason that KubeRay gives for ending a job itself."""


def submit(job: Job, folder: Path) -> int:
    """Keep the manifest in the folder, submit it, follow it to its end; the run's exit code."""
    tool, launcher = {
        LaunchKind.ray_job: ("ray", _ray_job), LaunchKind.slurm: ("sbatch", _slurm),
        LaunchKind.kuberay: ("kubectl", _kuberay), LaunchKind.skypilot: ("sky", _skypilot),
        LaunchKind.torchrun: ("torchrun", _torchrun)}[job.kind]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which(tool, path=path) is None:
        raise NotFit(f"launch={job.kind.name}: needs the command {tool}, which is not here; install it, or see what "
                     "would be submitted with launch.dry_run=true")
    folder.mkdir(exist_ok=True)
    file = folder / job.file
    file.write_text(job.manifest)
    print(f"manifest  {file}", flush=True)
    return launcher(job, file, os.environ | {"PATH": path})


def _ray_job(job: Job, file: Path, environment: dict[str, str]) -> int:
    environment |= authentication(job.address, allow_insecure=job.allow_insecure)
    ended, mode = 0, environment["RAY_AUTH_MODE"]

    with subprocess.Popen(["sh", str(file)], env=environment, text=True, errors="replace",
                          stderr=subprocess.PIPE) as shown:
        complaint: list[str] = []
        reader = threading.Thread(target=_copy_to_a_traceback, args=(shown.stderr, complaint), daemon=True)
        reader.start()

        def returned() -> int | None:
            """Ray's log may stall when nodes are lost, and then never ends with its job."""
            nonlocal ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                return shown.wait(LOOK_S)
            ended += has_ended(job.address, job.name, mode=mode)
            if ended > 1:
                shown.terminate()
            return None

        code = _poll(returned, stop=f"ray job stop --address {job.address} {job.name}")
        reader.join(POLL_S)
    outcome = job_outcome(job.address, job.name, code, mode=mode)
    if outcome is None:
        raise Transient(f"{job.name}: the connection to {job.address} ended before the job; it goes on if the head "
                        f"does: ray job logs --address {job.address} --follow {job.name}; if the head is gone, launch "
                        "again on another one with the same run.dir and resume=auto")
    if outcome and outcome == code:  # the command's own failure, perhaps
        sys.stderr.writelines(complaint)
    return outcome


def _copy_to_a_traceback(lines: Iterable[str], rest: list[str]) -> None:
    """Lines to our stderr, but for a traceback and what follows it: Ray's command has one where the cluster is gone."""
    for line in lines:
        if rest or line.startswith("Traceback "):
            rest.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def _torchrun(job: Job, file: Path, environment: dict[str, str]) -> int:
    """SIGTERM is handed on, Ctrl-C has been to all of a terminal: the ranks save, and only then there is an end."""
    early: list[int] = []
    tell = early.append
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _frame: tell(number)),
              signal.SIGINT: signal.signal(signal.SIGINT, lambda _number, _frame: None)}
    try:
        with subprocess.Popen(["sh", str(file)], env=environment) as ranks:
            tell = ranks.send_signal
            for number in early:
                tell(number)
            code = ranks.wait()
            return Preempted.exit_code if code == -signal.SIGTERM else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _slurm(job: Job, file: Path, environment: dict[str, str]) -> int:
    number = _output(["sbatch", "--parsable", str(file)], environment).split(";")[0]
    print(f"job       {number}", flush=True)
    log, position, said = file.with_suffix(".log"), 0, ""

    def tail() -> None:
        nonlocal position
        if log.exists():
            with log.open("rb") as lines:
                lines.seek(position)
                text = lines.read()
            position += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()

    def outcome() -> int | None:
        nonlocal said
        shown = _output(["scontrol", "show", "job", number, "--oneliner"], environment)
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        state = fields.get("JobState", "")
        tail()
        restarts = fields.get("Restarts", "0")
        shown = f"[{state.lower()}{f', restart {restarts}' if restarts != '0' else ''}]"
        if shown != said:
            print(shown, flush=True)
            said = shown
        if state not in SLURM_ENDS:
            return None
        code = int(fields.get("ExitCode", "1:0").split(":")[0])
        return code or SLURM_ENDS[state]

    return _poll(outcome, stop=f"scancel {number}")


def _kuberay(job: Job, file: Path, environment: dict[str, str]) -> int:
    print(_output(["kubectl", "apply", "-f", str(file)], environment), flush=True)
    head = f"$(kubectl get pods -o name -l app.kubernetes.io/instance={job.name},ray.io/node-type=head)"
    stop = (f"kubectl exec {head} -c ray-head -- ray job stop --address http://127.0.0.1:8265 {job.name}; and then "
            f"kubectl delete rayjob/{job.name} networkpolicy/{job.name}")
    log = _PodLog(job.name)

    def outcome() -> int | None:
        shown = _output(["kubectl", "get", "rayjob", job.name, "-o", "json"], environment)
        status = json.loads(shown).get("status", {})
        state, reason, message = (status.get(key, "") for key in ("jobDeploymentStatus", "reason", "message"))
        if state == "Running":
            log.follow(environment)
        if state == "Complete":
            return 0 if status.get("jobStatus") == "SUCCEEDED" else Preempted.exit_code
        if state in ("Failed", "ValidationFailed"):
            print(f"{state}: {reason} {message.splitlines()[:1]}", file=sys.stderr)
            code = RUNS_CODE.search(message)
            return int(code[1]) if code else KUBERAY_ENDS.get(reason) or log.code or 1
        return None

    code = _poll(outcome, stop=stop)
    print(f"left      kubectl delete rayjob/{job.name} networkpolicy/{job.name}", flush=True)
    return code


class _PodLog:
    """The log of a Kubernetes job on our stdout, each line once, however often the stream breaks."""

    def __init__(self, name: str):
        self.command = ["kubectl", "logs", "--follow", f"job/{name}", "--timestamps", "--pod-running-timeout=5m"]
        self.seen, self.over = "", False
        self.code: int | None = None
        """What the log says that the run ended with."""

    def follow(self, environment: dict[str, str]) -> None:
        """To the end of the stream."""
        before, since = self.seen, [f"--since-time={self.seen}"] if self.seen else []
        with subprocess.Popen([*self.command, *since], env=environment, stdout=subprocess.PIPE, text=True,
                              errors="replace") as shown:
            for stamped in shown.stdout:
                stamp, _, line = stamped.partition(" ")
                if stamp <= before:
                    continue
                self.seen = stamp
                found = RUNS_CODE.search(line)
                self.over = self.over and not line.startswith(SUBMITTED)
                if not self.over:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                if found:  # what follows is the end of the log again
                    self.code, self.over = int(found[1]), True


def _skypilot(job: Job, file: Path, environment: dict[str, str]) -> int:
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    given = [f"--secret={name}" for name in ("RAY_AUTH_TOKEN", "WANDB_API_KEY") if name in environment]
    return _follow(["sky", "jobs", "launch", "--yes", *given, str(file)], environment,
                   stop=f"sky jobs cancel --name {job.name}")


def _poll(outcome: Callable[[], int | None], *, stop: str) -> int:
    """Ask until there is an answer; a scheduler that is busy or restarts is asked again."""
    heard = time.monotonic()
    try:
        while True:
            try:
                if (code := outcome()) is not None:
                    return code
                heard = time.monotonic()
            except NotFit as error:
                if time.monotonic() - heard > SILENCE_S:
                    raise Transient(f"{error}; not to be reached for {SILENCE_S / 60:.0f} minutes, the job may go on: "
                                    f"end it with {stop}") from None
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: {stop}", file=sys.stderr)
        raise


def _follow(command: list[str], environment: dict[str, str], *, stop: str) -> int:
    """A command that shows its own output."""
    return _poll(lambda: subprocess.run(command, env=environment).returncode, stop=stop)


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode != 0:
        raise NotFit(f"{' '.join(command[:2])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()
