"""Verbs and overrides completed by a shell: Hydra's own completion, which knows no verbs, behind one."""

import io
import os
from contextlib import redirect_stdout

from orchestrator.errors import BadRequest

OVERRIDING = ("train", "plan", "prepare", "launch", "compare")
"""Verbs that take keys of the config."""


def complete(arguments: list[str], verbs: list[str]) -> int:
    """What Hydra's script for a shell asks for (`query=bash`, the line so far in COMP_LINE), or the script itself
    (`install=bash`, to be evaluated)."""
    from orchestrator.compose import with_hydra_flags
    from orchestrator.overrides import all_keys

    command, _, shell = arguments[0].partition("=") if len(arguments) == 1 else ("", "", "")
    if command not in ("install", "uninstall", "query") or shell not in ("bash", "fish", "zsh"):
        raise BadRequest("--shell-completion: takes install=SHELL, one of bash, fish and zsh; use sparing -sc "
                         "install=bash")
    line = os.environ.get("COMP_LINE", "")
    if line and command == "query":
        words, begins = line.split(), line.endswith(" ")
        if len(words) + begins < 3:
            print(*verbs)
            return 0
        if words[1] not in OVERRIDING:
            return 0
        key, is_given, _ = ("" if begins else words[-1]).partition("=")
        if is_given and (members := getattr(all_keys().get(key), "__members__", ())):
            print(*(f"{key}={member}" for member in members))
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]]) + " " * begins
    with redirect_stdout(io.StringIO()) as told:
        code = with_hydra_flags(["-sc", *arguments], lambda config: 0, program="sparing")
    if command == "query":  # among the options that Hydra knows are the schemas of the groups
        print(*(word for word in told.getvalue().split() if "=base_" not in word))
    else:
        print(told.getvalue(), end="")
    return code
