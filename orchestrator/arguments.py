"""Words of the command line that are no Hydra overrides: a verb's own arguments and options, checked."""

from orchestrator.errors import BadRequest


def positional(verb: str, arguments: list[str], number: int, help: str) -> list[str]:
    if len(arguments) != number:
        raise BadRequest(f"{verb}: takes {number} arguments, {len(arguments)} were given; {help.splitlines()[0]}")
    return arguments


def options(verb: str, arguments: list[str], known: tuple[str, ...], help: str) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments of this verb, and the rest."""
    named = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.isidentifier():
            if key not in known:
                raise BadRequest(f"{argument}: {verb} has no option {key}; {help.splitlines()[0]}")
            named[key] = value
    return named, [argument for argument in arguments if argument.partition("=")[0] not in named]
