"""A directory that one command fills: new or empty before, whole after, or gone."""

import contextlib
import os
from collections.abc import Iterator

from orchestrator.errors import BadRequest, SparingError
from orchestrator.train import storage


def check_new(folder: str) -> None:
    """`BadRequest` where something is there already."""
    local = storage.local_path(folder)
    if local is not None and os.path.exists(local) and not os.path.isdir(local) or storage.list_dir(folder):
        raise BadRequest(f"{folder}: must be a new or empty directory; name another one")


@contextlib.contextmanager
def filled(folder: str) -> Iterator[None]:
    """What is written there meanwhile stays only if all of it was."""
    check_new(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, SparingError):  # what ended it is the news
            storage.remove_tree(folder)
        raise
