"""Errors a user meets, with the exit code that a launcher acts on. No traceback is ever shown for one of these."""

INTERRUPTED = 130
"""Exit code after Ctrl-C where there is nothing to save, as shells have it."""
UNREAD = 141
"""Exit code where the reader of what is printed has gone (`| head`), as shells have it of what SIGPIPE ends."""


class SparingError(Exception):
    """The run failed."""

    exit_code = 1


class BadRequest(SparingError, ValueError):
    """The user asked for something that cannot be: names the key, the value, the rule and the remedy."""

    exit_code = 2


class NotFit(SparingError):
    """The environment cannot carry the run: no room, no disk, no package."""

    exit_code = 3


class NotTrustworthy(SparingError):
    """Results are not to be believed: non-finite too often, corrupted state. Do not retry blindly."""

    exit_code = 17


class Transient(SparingError):
    """Infrastructure failed in passing; the same command may be run again."""

    exit_code = 33


class Drifted(Transient):
    """This rank's state is not that of its peers; another one in its place goes on from a copy made before."""


class PeerLost(Transient):
    """Another rank is lost or to blame; this one is fit to go on."""


class Preempted(SparingError):
    """Stopped by notice with a checkpoint; the same command continues."""

    exit_code = 34


class NoProgress(SparingError):
    """Fault after fault without a step between them: do not start it again."""

    exit_code = 93


def words(error: Exception) -> str:
    """What a log says of it: a mistake of ours, or of a library, goes by its class."""
    return str(error) if isinstance(error, SparingError) else f"{type(error).__name__}: {error}"


def public_kind(error: SparingError) -> str:
    """The name of the nearest of these classes: finer ones are known where they are raised alone."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)


def require(holds: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """`BadRequest` of one sentence unless the rule holds."""
    if not holds:
        raise BadRequest(f"{key}={value}: {rule}; {remedy}")
