"""A Ray cluster of several nodes on one machine: each in its own network, process, mount and host-name namespace.

    with hosts(3, cpus=2) as cluster:
        cluster.head.popen([sys.executable, "-m", "orchestrator", "train", ...])   # a driver on the head
        cluster.nodes[2].kill()                                                    # a node lost, all its processes
        cluster.nodes[1].cut(); cluster.nodes[1].mend()                            # its cable pulled, silently

Every node has an address on a bridge that this process reaches, so it stands for the user's machine outside the
cluster. Token authentication is on; the token is a file, in no argument and no environment. The file system is
shared but for /tmp/ray and /dev/shm. A node's processes end with it, a cluster's with this process; process ids in a
node are its own (`Node.signal` takes them, `Node.root` shows its files). Root only: `why_no_hosts()` says what is
missing. Not a simulation of Ray: raylets, GCS and dashboard are the real ones.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.213"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
INIT = """
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
{ echo "127.0.1.1 $NAME"; grep -v " $NAME$" "$HOSTS"; } > /dev/shm/hosts  # as Debian installs it
mount --bind /dev/shm/hosts /etc/hosts && mount --bind /dev/null /etc/resolv.conf
for folder in $HIDDEN; do mount -t tmpfs -o size=4k tmpfs "$folder"; done
hostname "$NAME"
"$@" &
while :; do wait; sleep 3600 & done
"""
"""The first process of a node. It outlives Ray and reaps orphans, as a machine does; $1... starts Ray."""


def why_no_hosts() -> str | None:
    """Why this machine cannot carry such a cluster; None if it can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "sh", "-c",
                            "ip link add name v0 type veth peer name v1 && ip link add name b0 type bridge"],
                           capture_output=True, text=True)
    return None if probe.returncode == 0 else f"needs namespaces, veth and bridge: {probe.stderr.strip()}"


@dataclass
class Node:
    """One machine of the cluster."""

    name: str
    """Also its host name and that of its network namespace."""
    address: str
    link: str
    """The bridge's end of its cable."""
    bridge: str
    environment: dict[str, str]
    start: list[str]
    """The `ray start` that makes it a node."""
    process: subprocess.Popen | None = None
    """`unshare`, whose only child is the node's first process."""

    def boot(self, log: Path) -> None:
        """Start the node's processes; after `kill`, again, with the same address."""
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "--mount", "--uts", "sh", "-c", INIT, "init", *self.start],
                env=self.environment | {"NAME": self.name}, cwd="/", stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, preexec_fn=_end_with_parent)

    @property
    def init(self) -> int:
        """The first process's id, as seen from here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(wait_until(lambda: children.read_text().split(), 60, f"{self.name} has no first process")[0])

    @property
    def root(self) -> Path:
        """The node's files as it sees them: `root / "tmp/ray/session_latest/logs"`."""
        return Path(f"/proc/{self.init}/root")

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        """Start a command on the node."""
        options.setdefault("cwd", "/")
        environment = self.environment | options.pop("env", {})
        return subprocess.Popen(["nsenter", f"--target={self.init}", "--net", "--pid", "--mount", "--uts",
                                 f"--wd={options.pop('cwd')}", *map(str, command)], env=environment,
                                preexec_fn=_end_with_parent, **options)

    def run(self, command: list[str], *, timeout_s: float = 60, **options) -> subprocess.CompletedProcess:
        """A command on the node, to its end; output is text."""
        with self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def processes(self, word: str = "") -> list[int]:
        """Ids, in the node, of its processes whose command line holds the word."""
        found = []
        for folder in (self.root / "proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if word in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(folder.name))
        return sorted(found)

    def signal(self, pid: int, number: int) -> None:
        """To a process by its id in the node, as `sparing status` shows it."""
        self.run(["kill", f"-{int(number)}", str(pid)]).check_returncode()

    def kill(self) -> None:
        """Power off: every process of the node dies at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def cut(self) -> None:
        """Pull its cable: packets vanish, no connection is told."""
        _ip("link", "set", self.link, "nomaster")

    def mend(self) -> None:
        _ip("link", "set", self.link, "master", self.bridge)


@dataclass
class Hosts:
    """The nodes, the first of them the head, and what a client outside needs."""

    nodes: list[Node]
    folder: Path
    """Logs by node, the token."""
    client: dict[str, str] = field(default_factory=dict)
    """Environment of a client of this cluster on the user's machine."""

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def named(self, host: str) -> Node:
        """The node of a host name, as a run's status has it."""
        return next(node for node in self.nodes if node.name == host)

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def boot(self, node: Node) -> None:
        node.boot(self.folder / f"{node.name}.log")

    def get(self, path: str, *, authenticated: bool = True) -> tuple[int, bytes]:
        """Status and body of a page of the dashboard."""
        token = (self.folder / "token").read_text().strip()
        request = urllib.request.Request(self.dashboard + path,
                                         headers={"Authorization": f"Bearer {token}"} if authenticated else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def alive(self) -> list[str]:
        """Addresses of the nodes that the GCS counts as alive; none while the head does not answer."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            _, body = self.get("/api/v0/nodes")
            return sorted(node["node_ip"] for node in json.loads(body)["data"]["result"]["result"]
                          if node["state"] == "ALIVE")
        return []

    def wait_for(self, nodes: list[Node], timeout_s: float = 180) -> None:
        """Until Ray counts exactly these nodes as alive."""
        wanted = sorted(node.address for node in nodes)
        wait_until(lambda: self.alive() == wanted, timeout_s,
                   lambda: f"alive are {self.alive()}, wanted {wanted}\n{self.logs()}", every_s=0.2)

    def logs(self, lines: int = 20) -> str:
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
                         for log in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def hosts(number: int = 3, *, cpus: int | list[int] = 2, resources: list[dict[str, float]] | None = None,
          environment: dict[str, str] | None = None, hidden: list[Path] = (),
          timeout_s: float = 180) -> Iterator[Hosts]:
    """A running cluster of `number` nodes, removed afterwards whatever happens. `cpus`, of each or one by one.
    `environment` is added to the nodes' (give PYTHONPATH to have this tree imported there); `hidden` folders look
    empty to them."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparing-hosts-")))
        index = stack.enter_context(_claimed_network())
        base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        base |= {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "RAY_AUTH_MODE": "token",
                 "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
        _make_token(base, folder)
        client = dict(base)
        base |= {"OMP_NUM_THREADS": "1", "HIDDEN": " ".join(map(str, hidden)), "HOSTS": str(folder / "hosts"),
                 **(environment or {})}
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{NETWORK}.{index}.{i + 2} spar{index}n{i}\n" for i in range(number)))
        cluster = Hosts([], folder, client)
        stack.callback(_remove_network, index)
        _remove_network(index)  # what a killed test may have left
        _add_bridge(index)
        for i in range(number):
            cluster.nodes.append(_add_node(index, i, base, cpus[i] if isinstance(cpus, list) else cpus,
                                           (resources or [{}] * number)[i]))
            stack.callback(cluster.nodes[i].kill)
        cluster.boot(cluster.head)
        wait_until(lambda: _listens(cluster.head.address, GCS_PORT), timeout_s,
                   lambda: f"the head does not answer\n{cluster.logs()}", every_s=0.2)
        for node in cluster.nodes[1:]:
            cluster.boot(node)
        cluster.wait_for(cluster.nodes, timeout_s)
        cluster.client["RAY_API_SERVER_ADDRESS"] = cluster.dashboard
        yield cluster


def wait_until(condition: Callable, timeout_s: float, otherwise: str | Callable[[], str], *, every_s: float = 0.05):
    """The condition's first true answer; AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s:g} s: {otherwise if isinstance(otherwise, str) else otherwise()}")
        time.sleep(every_s)
    return answer


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), timeout=1).close()
        return True
    return False


def _make_token(environment: dict[str, str], folder: Path) -> None:
    """By Ray's own command, readable by its owner alone (which Ray does not see to)."""
    path = {key: value for key, value in environment.items() if key != "RAY_AUTH_TOKEN_PATH"}
    subprocess.run([str(BIN / "ray"), "get-auth-token", "--generate"], env=path, check=True, capture_output=True,
                   umask=0o077)
    (folder / ".ray/auth_token").rename(folder / "token")


def _add_bridge(index: int) -> None:
    _ip("link", "add", f"spar{index}", "type", "bridge")
    _ip("address", "add", f"{NETWORK}.{index}.1/24", "dev", f"spar{index}")
    _ip("link", "set", f"spar{index}", "up")


def _add_node(index: int, i: int, environment: dict[str, str], cpus: int, resources: dict[str, float]) -> Node:
    name, link, bridge = f"spar{index}n{i}", f"spar{index}v{i}", f"spar{index}"
    address, head = f"{NETWORK}.{index}.{i + 2}", f"{NETWORK}.{index}.2"
    _ip("netns", "add", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", link, "master", bridge, "up")
    for arguments in (["address", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"], ["route", "add", "default", "via", f"{NETWORK}.{index}.1"]):
        _ip("-n", name, *arguments)
    start = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}",
             f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}", f"--object-store-memory={100 << 20}"]
    start += ([f"--port={GCS_PORT}", "--head", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
              if i == 0 else [f"--address={head}:{GCS_PORT}"])
    return Node(name, address, link, bridge, environment | {"RAY_ADDRESS": f"{head}:{GCS_PORT}"}, start)


@contextlib.contextmanager
def _claimed_network() -> Iterator[int]:
    """A network number that no other running test holds."""
    for index in range(1, 200):
        with open(f"/tmp/sparing-hosts-{index}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield index
            os.unlink(file.name)
            return
    raise AssertionError("200 clusters are running on this machine")


def _remove_network(index: int) -> None:
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    for name in names:
        if name.startswith(f"spar{index}n"):
            for pid in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", name)
    for folder in Path("/sys/class/net").glob(f"spar{index}v*"):
        subprocess.run(["ip", "link", "delete", folder.name], capture_output=True)
    subprocess.run(["ip", "link", "delete", f"spar{index}"], capture_output=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


def _end_with_parent() -> None:
    """PR_SET_PDEATHSIG: a killed test takes its cluster along."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
