"""Which of several attempts may commit in a directory of checkpoints: the one with the highest claim.

A worker can outlive its node's death, and a job can be started twice; both go on writing. Each attempt therefore
creates `attempt-<number>.json` exclusively when it starts, and looks for a higher number before it publishes or
deletes.
"""

import json
import re
import secrets
from dataclasses import dataclass

from orchestrator.errors import NotFit
from orchestrator.train import storage

RETRY_S = 60.0
"""How long an object store may be silent when a run starts; later, a save's own deadline holds."""

_NAME = re.compile(r"attempt-(\d{4,9})\.json", re.ASCII)


@dataclass(frozen=True)
class Claim:
    directory: str
    number: int

    def check(self, *, retry_s: float) -> None:
        """Refuse to go on once a later attempt has claimed the directory."""
        newest = max(_numbers(self.directory, retry_s), default=self.number)
        if newest > self.number:
            raise NotFit(f"{self.directory}: attempt {newest} has taken over from this one ({self.number}); "
                         "another run uses the same checkpoint.dir")


def take_claim(directory: str, fence: str) -> Claim:
    """The next number in `directory`. Shows on the way that it can be written, and that exclusive creation is so."""
    older = _numbers(directory, RETRY_S)
    number = max(older, default=0) + 1
    note = json.dumps({"fence": fence, "token": secrets.token_hex(16)}).encode()
    while True:
        try:
            storage.create_exclusive(_path(directory, number), note, retry_s=RETRY_S)
            break
        except FileExistsError:
            number += 1
    try:
        storage.create_exclusive(_path(directory, number), b"{}", retry_s=RETRY_S)
    except FileExistsError:
        for claim in older:
            storage.remove(_path(directory, claim), retry_s=RETRY_S)
        return Claim(directory, number)
    raise NotFit(f"checkpoint.dir={directory}: this storage lets two writers create the same file, so two runs could "
                 "overwrite each other's checkpoints; use a local directory or s3://")


def _path(directory: str, number: int) -> str:
    return storage.join(directory, f"attempt-{number:04d}.json")


def _numbers(directory: str, retry_s: float) -> list[int]:
    return [int(match[1]) for name in storage.list_dir(directory, retry_s=retry_s) if (match := _NAME.fullmatch(name))]
