"""A Slurm of one's own: munged, slurmctld and one slurmd per node, all on this machine, gone with the context.

    with slurm(nodes=2) as environment:
        subprocess.run(["sbatch", ...], env=environment)

Needs root and Debian's slurm-wlm and munge: `why_no_slurm()` says what is missing. Nothing of an installed Slurm is
touched: configuration, key, sockets and state are in a temporary folder, ports are free ones.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster_harness import _end_with_parent, wait_until
from tests.harness import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """\
ClusterName=sparing
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
KillWait=5
MpiDefault=none
"""


def why_no_slurm() -> str | None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root, to run jobs"


@contextlib.contextmanager
def slurm(nodes: int = 1, *, cpus: int = 2) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to this cluster."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparing-slurm-")))
        stack.callback(_end_steps, str(folder))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RAY_"))}
        environment |= {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        ports = [free_port() for _ in range(nodes)]
        lines = [f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4096"
                 for i, port in enumerate(ports)]
        lines.append(f"PartitionName=all Nodes={','.join(f'n{i}' for i in range(nodes))} Default=YES MaxTime=INFINITE")
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ctld=free_port()) + "\n".join(lines) + "\n")
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

        def daemon(name: str, *arguments: str) -> None:
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(arguments, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=log, preexec_fn=_end_with_parent)
            stack.callback(_end, process)

        daemon("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
               f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed", "--num-threads=1")
        wait_until((folder / "munge.socket").exists, 30, "munged does not answer")
        daemon("slurmctld", "slurmctld", "-D", "-i")
        for i in range(nodes):
            daemon(f"slurmd-n{i}", "slurmd", "-D", "-N", f"n{i}")

        def idle() -> bool:
            done = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, text=True,
                                  capture_output=True)
            return done.stdout.split() == ["idle"] * nodes

        wait_until(idle, 60, lambda: "\n".join(log.read_text() for log in folder.glob("*.log")), every_s=0.2)
        stack.callback(_end_jobs, environment)
        yield environment


def _end_jobs(environment: dict[str, str]) -> None:
    """All jobs and the processes of their steps, while there are daemons to see to it."""
    for words in (["--full", "--signal=KILL"], []):
        subprocess.run(["scancel", *words, "--user=root"], env=environment)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not subprocess.run(["squeue", "--noheader"], env=environment, text=True,
                                              capture_output=True).stdout.strip(), 20, "", every_s=0.2)


def _end_steps(folder: str) -> None:
    """The daemons of steps, which tell a slurmd of their end and go on trying when it is gone."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text() == "slurmstepd\n" and os.readlink(process / "cwd").startswith(folder):
                os.kill(int(process.name), signal.SIGKILL)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
