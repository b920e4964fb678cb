"""What a client may ask for: a request's JSON, checked against the limits, by the parameters of OpenAI's API.

What a model here cannot do (tools, penalties, ...) is refused with the parameter's name rather than
passed over. No HTTP here.
"""

import json
import secrets
from dataclasses import dataclass

from model.generate import Sampling
from orchestrator.inference import MAX_STOP
from orchestrator.serve_chat import PLAIN_STOP, plain, render
from orchestrator.serve_engine import Engine
from orchestrator.train.tokenizer import Tokenizer, begun

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "echo": False,
           "suffix": None, "best_of": 1, "tools": [], "response_format": {"type": "text"},
           "tool_choice": "none", "modalities": ["text"], "verbosity": "medium",
           "reasoning_effort": "none", "repetition_penalty": 1, "ignore_eos": False, "top_k": (-1, 0), "min_p": 0}
"""Parameters that are refused unless they ask for nothing: this, or one of these."""
MAX_CHOICES = 16
MAX_TOPS = 20


class Refused(Exception):
    """Answered with a status and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # What a client sent may hold half of a surrogate pair, which no answer can.
        return {"error": {key: text and text.encode(errors="backslashreplace").decode() for key, text in said.items()}}


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    max_tokens: int
    """Of an answer; a request that names no number of a chat gets as many as fit below this."""
    timeout_s: float
    max_bytes: int = 1 << 20


@dataclass(frozen=True)
class Asked:
    """A request that was read and checked."""

    prompts: list[list[int]]
    choices: int
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: list[str]
    stream: bool
    with_usage: bool


def read(body: dict, engine: Engine, limits: Limits, name: str, *, chat: bool) -> Asked:
    """Check a request's JSON; `Refused` names the parameter."""
    known = {"model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logprobs"}
    known |= {"messages", "max_completion_tokens", "top_logprobs"} if chat else {"prompt"}
    for key, value in body.items():
        if key in NEUTRAL and value is not None and not _alike(value, NEUTRAL[key]):
            raise Refused(400, f"{key}={json.dumps(value)[:80]}: is not supported; leave it out", param=key)
        if key not in known and key not in NEUTRAL and key not in IGNORED and value is not None:
            raise Refused(400, f"{key}: no such parameter here; leave it out", param=key)
    if body.get("model") is None:
        raise Refused(400, f"model: must be given; use model={name}", param="model")
    check_model(body["model"], name)
    tokenizer, key = engine.loaded.tokenizer, "messages" if chat else "prompt"
    prompts = [_conversation(body.get(key), tokenizer)] if chat else _prompts(body.get(key), tokenizer)
    for prompt in prompts:
        if not 1 <= len(prompt) < engine.capacity:
            raise Refused(400, f"{key}: {len(prompt)} tokens, must be 1 to {engine.capacity - 1} (context="
                               f"{engine.capacity}); send a text of that length", param=key,
                          code="context_length_exceeded" if prompt else None)
    stops = _stops(body.get("stop"))
    if chat and not tokenizer.template:
        stops.append(PLAIN_STOP)
    stream, choices = _flag(body, "stream"), int(_number(body, "n", 1, 1, MAX_CHOICES, whole=True))
    if choices * len(prompts) > engine.room:
        raise Refused(400, f"n={choices}: {choices * len(prompts)} answers, must be at most {engine.room} here (slots "
                           "and waiting); ask for fewer", param="n")
    return Asked(prompts, choices, _max_tokens(body, engine, limits, max(map(len, prompts)), chat=chat),
                 Sampling(_number(body, "temperature", 1, 0, 2), max(1e-6, _number(body, "top_p", 1, 0, 1)),
                          _tops(body, chat=chat)),
                 int(_number(body, "seed", secrets.randbits(32), -(2**63), 2**63, whole=True)), stops, stream,
                 _with_usage(body.get("stream_options"), stream))


def check_model(asked: object, name: str) -> None:
    if asked != name:
        raise Refused(404, f"model={asked}: is not served here; use model={name}", param="model",
                      code="model_not_found")


def _conversation(messages: object, tokenizer: Tokenizer) -> list[int]:
    """By the model's chat template, which has its own beginning, or as plain lines."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: must be a list of at least one {role, content}", param="messages")
    found = [_message(message if isinstance(message, dict) else {}) for message in messages]
    if not tokenizer.template:
        return _encoded(plain(found), tokenizer, "messages", begin=tokenizer.begin)
    try:
        text = render(tokenizer.template, found, tokenizer.names)
    except Exception as error:  # a template is a program of others
        said = " ".join(str(error).split())[:400]
        raise Refused(400, f"messages: the model's chat template refuses them ({said}); send others",
                      param="messages") from error
    return _encoded(text, tokenizer, "messages")


def _message(message: dict) -> dict[str, str]:
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, [], {}):
            raise Refused(400, f"messages: {key} is not supported in a message; leave it out", param="messages")
    role, content = message.get("role"), message.get("content")
    if content is None and role == "assistant":
        content = ""  # as a client's own library gives back an answer that was empty
    if isinstance(content, list):
        content = "".join(map(_text_of, content))
    if not isinstance(content, str) or role not in ("system", "developer", "user", "assistant"):
        raise Refused(400, "messages: each must have a role of system, developer, user or assistant and a content of "
                           "text", param="messages")
    return {"role": role, "content": content}


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise Refused(400, "messages: a part of a content must be {type: text, text: ...}; images and the like are not "
                           "supported", param="messages")
    return text


def _encoded(text: str, tokenizer: Tokenizer, key: str, *, begin: tuple[int, ...] = ()) -> list[int]:
    try:
        return begun(tokenizer, text, begin)
    except UnicodeEncodeError:
        raise Refused(400, f"{key}: holds half of a surrogate pair; send whole characters", param=key) from None


def _prompts(prompt: object, tokenizer: Tokenizer) -> list[list[int]]:
    """A text, token ids, or a list of either. Ids are taken as they are."""
    items = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    found = []
    for item in items:
        if isinstance(item, str):
            found.append(_encoded(item, tokenizer, "prompt", begin=tokenizer.begin))
        elif isinstance(item, list) and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in item):
            found.append(item)
        else:
            raise Refused(400, f"prompt: must be a text, a list of token ids below {tokenizer.vocab_size}, or a list "
                               "of those", param="prompt")
    if len(found) > MAX_CHOICES:
        raise Refused(400, f"prompt: {len(found)} texts, must be at most {MAX_CHOICES}", param="prompt")
    return found


def _max_tokens(body: dict, engine: Engine, limits: Limits, longest: int, *, chat: bool) -> int:
    """Of an answer to prompts of `longest` tokens or fewer."""
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    room = engine.capacity - longest
    why = (f"this server's max_tokens={limits.max_tokens}" if limits.max_tokens <= room else
           f"context={engine.capacity} less {longest} of the {'messages' if chat else 'prompt'}")
    most = min(room, limits.max_tokens)
    return int(_number(body, key, min(most, limits.max_tokens if chat else 16), 1, most, whole=True, why=f" ({why})"))


def _stops(stops: object) -> list[str]:
    found = [stops] * (stops != "") if isinstance(stops, str) else [] if stops is None else stops
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(stop, str) and stop for stop in found):
        raise Refused(400, f"stop={json.dumps(stops)[:80]}: must be a text or up to four texts", param="stop")
    if longest := max((len(stop) for stop in found if len(stop) > MAX_STOP), default=0):
        raise Refused(400, f"stop: {longest} characters, must be at most {MAX_STOP}; end at a shorter text",
                      param="stop")
    return list(found)


def _tops(body: dict, *, chat: bool) -> int | None:
    """So many of the likeliest tokens beside each of the answer's, None without log probabilities: a completion asks
    for a number, a chat whether, and then for a number."""
    if not chat and not isinstance(body.get("logprobs"), bool):
        return None if body.get("logprobs") is None else int(_number(body, "logprobs", 0, 0, MAX_TOPS, whole=True))
    tops = int(_number(body, "top_logprobs", 0, 0, MAX_TOPS, whole=True))
    if tops and not body.get("logprobs"):
        raise Refused(400, f"top_logprobs={tops}: are of log probabilities; add logprobs=true, or leave it out",
                      param="top_logprobs")
    return tops if _flag(body, "logprobs") else None


def _with_usage(options: object, stream: bool) -> bool:
    """Whether a stream is to tell its usage at its end."""
    if options is None:
        return False
    if not stream:
        raise Refused(400, "stream_options: are of a stream; add stream=true, or leave them out",
                      param="stream_options")
    if not isinstance(options, dict) or any(value is not None for key, value in options.items()
                                            if key != "include_usage"):
        raise Refused(400, f"stream_options={json.dumps(options)[:80]}: must be {{include_usage: true or false}}",
                      param="stream_options")
    return _flag(options, "include_usage")


def _number(body: dict, key: str, default: float, low: float, high: float, *, whole: bool = False,
            why: str = "") -> float:
    value = default if body.get(key) is None else body[key]
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refused(400, f"{key}={json.dumps(value)[:80]}: must be {kind} from {low:g} to {high:g}{why}", param=key)
    return value


def _alike(value: object, neutral: object) -> bool:
    """As JSON has it, where 0 (logprobs=0 asks for those of the tokens alone) is not false."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool)
               for one in (neutral if isinstance(neutral, tuple) else (neutral,)))


def _flag(body: object, key: str) -> bool:
    value = body.get(key) if isinstance(body, dict) else None
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{key}={json.dumps(value)[:80]}: must be true or false", param=key)
    return bool(value)
