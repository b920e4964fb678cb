"""What a client may ask for: a request's JSON, checked against the limits, by the parameters of OpenAI's API.

What a model here cannot do (log probabilities, tools, penalties, ...) is refused with the parameter's name rather than
passed over. No HTTP here.
"""

import json
import secrets
from dataclasses import dataclass

from model.generate import Sampling
from orchestrator.inference import MAX_STOP
from orchestrator.serve_engine import Engine

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "echo": False,
           "suffix": None, "best_of": 1, "tools": [], "response_format": {"type": "text"},
           "top_logprobs": 0, "tool_choice": "none", "modalities": ["text"], "verbosity": "medium",
           "reasoning_effort": "none"}
"""Parameters that are refused unless they ask for nothing."""
MAX_CHOICES = 16


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
    known = {"model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed"}
    known |= {"messages", "max_completion_tokens"} if chat else {"prompt"}
    for key, value in body.items():
        if key in NEUTRAL and value is not None and not _alike(value, NEUTRAL[key]):
            raise Refused(400, f"{key}={json.dumps(value)[:80]}: is not supported; leave it out", param=key)
        if key not in known and key not in NEUTRAL and key not in IGNORED and value is not None:
            raise Refused(400, f"{key}: no such parameter here; leave it out", param=key)
    if body.get("model") is None:
        raise Refused(400, f"model: must be given; use model={name}", param="model")
    check_model(body["model"], name)
    tokenizer, key = engine.loaded.tokenizer, "messages" if chat else "prompt"
    if chat:
        prompts = [_encoded(transcript(body.get("messages")), tokenizer, key)]
    else:
        prompts = _prompts(body.get("prompt"), tokenizer)
    for prompt in prompts:
        if not 1 <= len(prompt) < engine.capacity:
            raise Refused(400, f"{key}: {len(prompt)} tokens, must be 1 to {engine.capacity - 1} (context="
                               f"{engine.capacity}); send a text of that length", param=key,
                          code="context_length_exceeded" if prompt else None)
    room = engine.capacity - max(map(len, prompts))
    default = min(room, limits.max_tokens if chat else 16)
    wanted = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    most = min(room, limits.max_tokens)
    sampling = Sampling(_number(body, "temperature", 1, 0, 2), _number(body, "top_p", 1, 1e-6, 1))
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop: must be a text or up to four texts", param="stop")
    if longest := max((len(stop) for stop in stops if len(stop) > MAX_STOP), default=0):
        raise Refused(400, f"stop: {longest} characters, must be at most {MAX_STOP}; end at a shorter text",
                      param="stop")
    if body.get("stream_options") is not None and body.get("stream") is not True:
        raise Refused(400, "stream_options: are of a stream; add stream=true, or leave them out",
                      param="stream_options")
    stream, choices = _flag(body, "stream"), int(_number(body, "n", 1, 1, MAX_CHOICES, whole=True))
    if choices * len(prompts) > engine.room:
        raise Refused(400, f"n={choices}: {choices * len(prompts)} answers, must be at most {engine.room} here (slots "
                           "and waiting); ask for fewer", param="n")
    return Asked(prompts, choices,
                 int(_number(body, wanted, default, 1, most, whole=True)), sampling,
                 int(_number(body, "seed", secrets.randbits(32), -(2**63), 2**63, whole=True)), stops, stream,
                 stream and _flag(body.get("stream_options") or {}, "include_usage"))


def check_model(asked: object, name: str) -> None:
    if asked != name:
        raise Refused(404, f"model={asked}: is not served here; use model={name}", param="model",
                      code="model_not_found")


def transcript(messages: object) -> str:
    """Chat as plain text, `role: content` by line, open at the assistant's turn: models here know no other form."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: must be a list of at least one {role, content}", param="messages")
    lines = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if content is None and isinstance(message, dict) and message.get("role") == "assistant" and not (
                message.get("tool_calls") or message.get("function_call")):
            content = ""  # as a client's own library gives back an answer that was empty
        if isinstance(content, list):
            content = "".join(map(_text_of, content))
        if not isinstance(content, str) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise Refused(400, "messages: each must have a role of system, developer, user or assistant and a content "
                               "of text", param="messages")
        lines.append(f"{message['role']}: {content}\n")
    return "".join(lines) + "assistant:"


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise Refused(400, "messages: a part of a content must be {type: text, text: ...}; images and the like are not "
                           "supported", param="messages")
    return text


def _encoded(text: str, tokenizer, key: str) -> list[int]:
    try:
        return tokenizer.encode(text).tolist()
    except UnicodeEncodeError:
        raise Refused(400, f"{key}: holds half of a surrogate pair; send whole characters", param=key) from None


def _prompts(prompt: object, tokenizer) -> list[list[int]]:
    """A text, token ids, or a list of either."""
    items = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    found = []
    for item in items:
        if isinstance(item, str):
            found.append(_encoded(item, tokenizer, "prompt"))
        elif isinstance(item, list) and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in item):
            found.append(item)
        else:
            raise Refused(400, f"prompt: must be a text, a list of token ids below {tokenizer.vocab_size}, or a list "
                               "of those", param="prompt")
    if len(found) > MAX_CHOICES:
        raise Refused(400, f"prompt: {len(found)} texts, must be at most {MAX_CHOICES}", param="prompt")
    return found


def _number(body: dict, key: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
    value = default if body.get(key) is None else body[key]
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refused(400, f"{key}={json.dumps(value)[:80]}: must be {kind} from {low:g} to {high:g}", param=key)
    return value


def _alike(value: object, neutral: object) -> bool:
    """As JSON has it, where 0 (logprobs=0 asks for those of the tokens alone) is not false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _flag(body: object, key: str) -> bool:
    value = body.get(key) if isinstance(body, dict) else None
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{key}={json.dumps(value)[:80]}: must be true or false", param=key)
    return bool(value)
