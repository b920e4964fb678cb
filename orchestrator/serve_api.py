"""The OpenAI-compatible routes: completions and chat, whole or streamed, on an `Engine`.

A client that goes away frees its slots.
"""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from orchestrator.serve_engine import Engine, Full, Piece, Sequence
from orchestrator.serve_logprobs import Told, of_chat, of_completion
from orchestrator.serve_request import Asked, Limits, Refused, check_model, read

_HEADERS = {408: {"connection": "close"}, 413: {"connection": "close"}, 429: {"retry-after": "1"}}
"""By status. Where the rest of a request was not read, closing saves reading it."""


def build_app(engine: Engine, *, name: str, limits: Limits, token: str | None, usd_per_h: float | None) -> Starlette:
    """The ASGI application. token: what clients must send as their API key."""
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sparing"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        check_model(request.path_params["model"], name)
        return JSONResponse(card)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": name, **engine.load()})

    async def usage(request: Request) -> Response:
        return JSONResponse(engine.usage.report(usd_per_h))

    async def complete(request: Request) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        # In a thread of its own: a long text takes its tokenizer a while.
        asked = await asyncio.to_thread(read, await _body(request, limits), engine, limits, name, chat=chat)
        return await answer(asked, request, engine, limits, name, chat=chat)

    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body, error.status, _HEADERS.get(error.status))

    async def not_found(request: Request, error: Exception) -> Response:
        status, allowed = getattr(error, "status_code", 404), (getattr(error, "headers", None) or {}).get("Allow")
        message = (f"no such route; there are {', '.join(r.path for r in routes)}" if allowed is None else
                   f"is not for {request.method}; use {allowed}")
        return JSONResponse(Refused(status, f"{request.method} {request.url.path}: {message}").body, status,
                            {"allow": allowed} if allowed else None)

    routes = [Route("/v1/models", models), Route("/v1/models/{model:path}", model),
              Route("/health", health), Route("/v1/usage", usage),
              Route("/v1/completions", complete, methods=["POST"]),
              Route("/v1/chat/completions", complete, methods=["POST"])]
    middleware = [Middleware(_Bearer, token=token)] if token else []
    return Starlette(routes=routes, middleware=middleware,
                     exception_handlers={Refused: refused, 404: not_found, 405: not_found})


class Server(uvicorn.Server):
    """Ends its engine before its connections, so that whoever is being answered hears of it."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list | None = None) -> None:
        await asyncio.to_thread(self.engine.close)
        await super().shutdown(sockets)


async def answer(asked: Asked, request: Request, engine: Engine, limits: Limits, name: str, *, chat: bool) -> Response:
    """Queue the request's sequences and tell what comes of them."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue()

    def hear(index: int):
        def tell(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, (index, piece))

        return tell

    deadline = time.monotonic() + limits.timeout_s
    sequences = [Sequence(prompt, asked.sampling, asked.seed + index, asked.max_tokens, hear(index), asked.stops,
                          deadline)
                 for index, prompt in enumerate(prompt for prompt in asked.prompts for _ in range(asked.choices))]
    try:
        engine.submit(*sequences)
    except Full:
        raise Refused(429, f"{len(sequences)} more sequences than may wait; try again later",
                      code="rate_limit") from None
    form = _Form(name, chat, sum(map(len, asked.prompts)), with_odds=asked.sampling.tops is not None)
    if asked.stream:
        return _Stream(_events(asked, sequences, news, form, limits), sequences)
    listener = asyncio.create_task(_until_gone(request, sequences))
    texts, counts, ends = [""] * len(sequences), [0] * len(sequences), [None] * len(sequences)
    odds = [[] for _ in sequences]
    try:
        async for index, piece in _pieces(sequences, news):
            texts[index] += piece.text
            odds[index] += piece.odds
            counts[index], ends[index] = piece.tokens, piece.finish
            if failure := _failure(piece, limits):
                raise failure
    finally:
        listener.cancel()
        for sequence in sequences:
            sequence.cancelled = True
    return JSONResponse(form.whole(texts, ends, odds, sum(counts)))


async def _events(asked: Asked, sequences: list[Sequence], news: asyncio.Queue, form: "_Form",
                  limits: Limits) -> AsyncIterator[str]:
    begins = [0] * len(sequences)
    for index in range(len(sequences)) if form.chat else ():
        yield form.event(index, "", None, opening=True)
    async for index, piece in _pieces(sequences, news):
        if failure := _failure(piece, limits):
            yield f"data: {json.dumps(failure.body)}\n\n"
            return
        yield form.event(index, piece.text, piece.finish, odds=piece.odds, begin=begins[index])
        begins[index] += sum(len(one.text) for one in piece.odds)
    if asked.with_usage:
        yield form.closing(sum(sequence.tokens for sequence in sequences))
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A response whose sequences end with it, also where the client goes before anything was asked of `events`."""

    def __init__(self, events: AsyncIterator[str], sequences: list[Sequence]):
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"},  # of nginx
                         media_type="text/event-stream")
        self.sequences = sequences

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for sequence in self.sequences:
                sequence.cancelled = True


async def _pieces(sequences: list[Sequence], news: asyncio.Queue) -> AsyncIterator[tuple[int, Piece]]:
    """Until every sequence has ended."""
    left = len(sequences)
    while left:
        index, piece = await news.get()
        left -= piece.finish is not None
        yield index, piece


async def _until_gone(request: Request, sequences: list[Sequence]) -> None:
    """Ends the sequences of a client that has closed its connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)
    for sequence in sequences:
        sequence.cancelled = True


def _failure(piece: Piece, limits: Limits) -> Refused | None:
    """What a client must hear instead of an answer that would look whole."""
    if piece.finish == "timeout":
        return Refused(504, f"no answer within timeout_s={limits.timeout_s:g}; ask for fewer tokens", code="timeout")
    if piece.finish == "error":
        return Refused(500, piece.error, code="error")
    if piece.finish == "cancelled":
        return Refused(503, "the server is ending, or the client has gone", code="cancelled")
    return None


class _Form:
    """OpenAI's objects for one answer."""

    def __init__(self, name: str, chat: bool, input_tokens: int, *, with_odds: bool):
        self.chat, self.input_tokens, self.with_odds = chat, input_tokens, with_odds
        self.head = {"id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
                     "object": "chat.completion" if chat else "text_completion", "created": int(time.time()),
                     "model": name}

    def whole(self, texts: list[str], ends: list[str | None], odds: list[list[Told]], tokens: int) -> dict:
        choices = [{"index": index, "finish_reason": end, "logprobs": self._logprobs(odds[index], 0),
                    **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})}
                   for index, (text, end) in enumerate(zip(texts, ends, strict=True))]
        return self.head | {"choices": choices, "usage": self._usage(tokens)}

    def event(self, index: int, text: str, end: str | None, *, opening: bool = False, odds: tuple[Told, ...] = (),
              begin: int = 0) -> str:
        delta = ({"role": "assistant"} if opening else {}) | ({"content": text} if text or opening else {})
        choice = {"index": index, "finish_reason": end, "logprobs": self._logprobs(odds, begin) if odds else None,
                  **({"delta": delta} if self.chat else {"text": text})}
        return self._line({"choices": [choice]})

    def closing(self, tokens: int) -> str:
        return self._line({"choices": [], "usage": self._usage(tokens)})

    def _line(self, fields: dict) -> str:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return f"data: {json.dumps(self.head | kind | fields)}\n\n"

    def _logprobs(self, odds: list[Told] | tuple[Told, ...], begin: int) -> dict | None:
        if not self.with_odds:
            return None
        return of_chat(odds) if self.chat else of_completion(odds, begin)

    def _usage(self, tokens: int) -> dict:
        return {"prompt_tokens": self.input_tokens, "completion_tokens": tokens,
                "total_tokens": self.input_tokens + tokens}


class _Bearer:
    """Lets in who sends the token; compared in constant time."""

    def __init__(self, app, token: str):
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        given = dict(scope.get("headers") or []).get(b"authorization", b"")
        if scope["type"] == "http" and scope["path"] != "/health" and not hmac.compare_digest(given, self.expected):
            error = Refused(401, "this server wants its token as API key; send `Authorization: Bearer TOKEN`",
                            code="invalid_api_key")
            await JSONResponse(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        await self.app(scope, receive, send)


async def _body(request: Request, limits: Limits) -> dict:
    """The request's JSON object, read up to the limit."""
    data = bytearray()

    async def arrive() -> None:
        async for part in request.stream():
            data.extend(part)
            if len(data) > limits.max_bytes:
                raise Refused(413, f"the request is larger than {limits.max_bytes} bytes; send less text")

    try:
        await asyncio.wait_for(arrive(), limits.timeout_s)
    except ClientDisconnect:
        raise Refused(400, "the client has gone") from None
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within timeout_s={limits.timeout_s:g}; send it faster",
                      code="timeout") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is no JSON; send an object") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request must be a JSON object")
    return body
