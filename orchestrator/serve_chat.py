"""A conversation as the text that its model continues: by a chat template in Jinja, or as plain lines.

A template is a program that came with the weights: it runs in Jinja's sandbox, and finds there what transformers has
for it (`apply_chat_template`), so that the text is the same.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN_STOP = "\nuser:"
"""Ends an answer to plain lines: the model would go on to speak for the user."""


def plain(messages: list[dict[str, str]]) -> str:
    """`role: content` by line, open at the assistant's turn."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def render(template: str, messages: list[dict[str, str]], names: Mapping[str, str]) -> str:
    """names: the texts of `bos_token` and the like. Raises what the template raises."""
    return _compiled(template).render(messages=messages, add_generation_prompt=True, tools=None, documents=None,
                                      **names)


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` around what an assistant said: a mark for training, nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Without the escapes for HTML that Jinja's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
