"""Ray's dashboard as seen by who submits: whether it asks for a token, whether ours is its, how a job ended.

Plain HTTP, without Ray: asked before any of Ray's code runs. Whoever reaches a dashboard that asks for no token can
run code on its cluster (CVE-2023-48022).
"""

import contextlib
import ipaddress
import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import NotFit, Preempted, Transient

JOBS = "/api/jobs/"
TIMEOUT_S = 15.0
REFUSED = (401, 403)
UNDER_WAY = ("PENDING", "RUNNING")
SUPERVISOR = "JOB_SUPERVISOR_ACTOR"
"""What Ray's words for a job begin with that was lost with its node, or never had a place."""


def authentication(address: str, *, allow_insecure: bool) -> dict[str, str]:
    """The environment in which Ray may submit to this dashboard; `NotFit` where it may not."""
    status = _get(address, JOBS)[0]
    if status == 200:
        if not allow_insecure and not _is_loopback(address):
            raise NotFit(f"launch.address={address}: lets anyone who reaches it run code: it asks for no token; "
                         "start the cluster with RAY_AUTH_MODE=token, or take the risk with launch.allow_insecure=true")
        return {"RAY_AUTH_MODE": "disabled"}
    if status not in REFUSED:
        raise NotFit(f"launch.address={address}: answers with HTTP {status}, and Ray's would with 200 or 401; "
                     "give the dashboard's address (port 8265 as a rule)")
    token = _token()
    if token is None:
        raise NotFit(f"launch.address={address}: asks for a token, and there is none here; put the cluster's into a "
                     "file and its path into RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token)")
    if _get(address, JOBS, token)[0] in REFUSED:
        raise NotFit(f"launch.address={address}: refuses the token that is here; take the one that its nodes have "
                     "(RAY_AUTH_TOKEN, else RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token)")
    return {"RAY_AUTH_MODE": "token"}


def job_outcome(address: str, name: str, returned: int, *, mode: str) -> int | None:
    """The run's exit code; None while it runs. `returned` is what submitting it said, for a dashboard that is gone.
    mode: RAY_AUTH_MODE as `authentication` gave it; a dashboard that asked for no token gets none."""
    try:
        status, body = _get(address, f"{JOBS}{name}", _token() if mode == "token" else None)
    except NotFit:
        return None if returned else 0
    if status != 200:
        return returned or 1
    job = json.loads(body)
    if job["status"] in UNDER_WAY:
        return None
    failed = Preempted.exit_code if job["status"] == "STOPPED" else 1
    if (job.get("error_type") or "").startswith(SUPERVISOR):  # the run itself has not ended its driver
        failed = Transient.exit_code
    return 0 if job["status"] == "SUCCEEDED" else job.get("driver_exit_code") or failed


def has_ended(address: str, name: str, *, mode: str) -> bool:
    """Whether the dashboard knows the job, and that it has ended. mode: as for `job_outcome`."""
    try:
        status, body = _get(address, f"{JOBS}{name}", _token() if mode == "token" else None)
    except NotFit:
        return False
    return status == 200 and json.loads(body)["status"] not in UNDER_WAY


def _token() -> str | None:
    """Where Ray looks for it, in Ray's order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() or None
    return None


def _get(address: str, path: str, token: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NotFit(f"launch.address={address}: no dashboard answers there ({reason}); start the cluster, or give "
                     "another address") from error


def _is_loopback(address: str) -> bool:
    try:
        return all(ipaddress.ip_address(entry[4][0]).is_loopback
                   for entry in socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False
