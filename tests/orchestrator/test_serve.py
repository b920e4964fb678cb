"""`sparing serve` as its clients see it: OpenAI's own Python client against a server in this process."""

import asyncio
import contextlib
import json
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest
import torch
import uvicorn

from model.decode import Decoder
from model.generate import Sampling, generate
from orchestrator import serve, serve_engine
from orchestrator.errors import BadRequest
from orchestrator.inference import Loaded
from orchestrator.serve_engine import Engine, Sequence, Usage
from tests.cluster_harness import wait_until
from tests.orchestrator.serving import CAPACITY, NAME, Server


@pytest.fixture(scope="module")
def narrow(loaded):
    """One slot and no queue."""
    with contextlib.closing(Server(loaded, slots=1, waiting=0)) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(loaded):
    """As `narrow`, with a second for an answer."""
    with contextlib.closing(Server(loaded, slots=1, waiting=0, timeout_s=1.0)) as found:
        yield found


def alone(loaded: Loaded, prompt: str, tokens: int) -> str:
    """What greedy decoding says without a server."""
    found = generate(Decoder(loaded.model, slots=1, capacity=CAPACITY), [loaded.tokenizer.encode(prompt).tolist()],
                     max_tokens=tokens)
    read = loaded.tokenizer.stream()
    return "".join(read(token) for _, token in found) + read(None)


def test_concurrent_requests_get_what_each_would_get_alone(server, loaded):
    prompts = [f"line {i} " * (i % 4 + 1) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: server.client().completions.create(
            model=NAME, prompt=p, max_tokens=12, temperature=0), prompts))
    assert [answer.choices[0].text for answer in answers] == [alone(loaded, prompt, 12) for prompt in prompts]
    assert all(a.choices[0].finish_reason == "length" and a.usage.completion_tokens == 12 for a in answers)
    assert server.engine.load() == {"running": 0, "waiting": 0}


def test_a_stream_says_the_same_piece_by_piece(server):
    ask = dict(model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=10, seed=3, temperature=0.9)
    whole = server.client().chat.completions.create(**ask)
    events = list(server.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant" and events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage == whole.usage and whole.usage.prompt_tokens == len("user: hello\nassistant:")


def test_log_probabilities_stand_beside_the_tokens_of_a_completion(server, loaded):
    ask = dict(model=NAME, prompt="hello", max_tokens=10, temperature=0)
    (choice,) = server.client().completions.create(**ask, logprobs=3).choices
    plain = server.client().completions.create(**ask)
    assert plain.choices[0].text == choice.text and plain.choices[0].logprobs is None
    odds, ids = choice.logprobs, loaded.tokenizer.encode("hello").tolist()
    ids += [token for _, token in generate(Decoder(loaded.model, slots=1, capacity=CAPACITY), [ids], max_tokens=10)]
    with torch.no_grad():
        scores = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)[4:-1]
    assert odds.token_logprobs == pytest.approx(scores.max(-1).values.tolist(), abs=1e-4)
    assert len(odds.tokens) == len(odds.text_offset) == 10 and odds.text_offset[:2] == [0, len(odds.tokens[0])]
    for token, logprob, tops in zip(odds.tokens, odds.token_logprobs, odds.top_logprobs, strict=True):
        assert tops[token] == logprob == max(tops.values()) and len(tops) <= 3
    bare = server.client().completions.create(**ask, logprobs=0).choices[0].logprobs
    assert bare.token_logprobs == pytest.approx(odds.token_logprobs, abs=1e-5) and bare.top_logprobs == [{}] * 10


def test_log_probabilities_of_a_chat_come_with_the_text_of_their_tokens(server):
    ask = dict(model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=10, seed=3, temperature=0.9,
               logprobs=True, top_logprobs=2)
    whole = server.client().chat.completions.create(**ask).choices[0].logprobs.content
    assert len(whole) == 10 and all(len(one.top_logprobs) == 2 for one in whole)
    assert all(one.bytes is None if "\ufffd" in one.token else bytes(one.bytes).decode() == one.token for one in whole)
    events = [event.choices[0] for event in server.client().chat.completions.create(**ask, stream=True)]
    parts = [one for event in events if event.logprobs for one in event.logprobs.content]
    assert [one.token for one in parts] == [one.token for one in whole]
    assert [one.logprob for one in parts] == pytest.approx([one.logprob for one in whole], abs=1e-5)
    assert all(event.delta.content or event.finish_reason for event in events if event.logprobs)


def test_an_end_of_a_text_is_no_token_of_the_answer(server, loaded, monkeypatch):
    ids = loaded.tokenizer.encode("hello").tolist()
    said = [token for _, token in generate(Decoder(loaded.model, slots=1, capacity=CAPACITY), [ids], max_tokens=10)]
    monkeypatch.setattr(server.engine, "loaded", replace(
        loaded, tokenizer=replace(loaded.tokenizer, ends=frozenset([said[4]]))))
    (choice,) = server.client().completions.create(model=NAME, prompt="hello", max_tokens=10, temperature=0,
                                                   logprobs=0).choices
    assert choice.finish_reason == "stop" and len(choice.logprobs.tokens) == said.index(said[4])


def test_several_choices_and_stop_texts(server, loaded):
    said = alone(loaded, "abc", 20)
    stop = said[5:7]
    answer = server.client().completions.create(model=NAME, prompt=["abc", "xyz"], n=2, max_tokens=20, temperature=0,
                                                stop=[stop])
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == said[: said.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_temperature_next_to_nothing_is_greedy_and_harms_nobody(server):
    greedy, next_to = (server.client().completions.create(model=NAME, prompt="def ", max_tokens=8, temperature=t)
                       for t in (0, 1e-40))
    assert greedy.choices[0].text == next_to.choices[0].text


def test_a_request_that_does_not_arrive_in_time_is_answered_so(hasty):
    with socket.create_connection(hasty.listener.getsockname(), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = client.makefile("rb").read().decode()  # to the end: head and body come apart
    assert answer.startswith("HTTP/1.1 408") and "did not arrive within timeout_s=1;" in answer


def test_prefill_is_charged_for_when_it_is_done(loaded, monkeypatch):
    """As a GPU computes: what was told it is done when it was waited for."""
    with contextlib.closing(Server(loaded, slots=1)) as server:
        waited = []
        monkeypatch.setattr(server.engine.batch.decoder, "wait", lambda: waited.append(time.sleep(0.3)))
        server.client().completions.create(model=NAME, prompt="x", max_tokens=1)
        assert len(waited) == 1 and server.engine.usage.prefill_s >= 0.3


LONG = dict(model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=64, temperature=0)
"""Greedy: a sampled continuation now and then ends early, by the token that says so. A stream of it begins with an
event before the first token."""


def test_a_client_that_leaves_midway_frees_its_slot(narrow):
    def ends_early(sequence: Sequence, go) -> bool:
        wait_until(lambda: sequence.cancelled, 30, "nobody heard that the client left")
        go.set()
        wait_until(lambda: narrow.engine.batch.free == [0], 30, "the slot is not free")
        return sequence.tokens < 64

    with narrow.held() as go:
        events = narrow.client().chat.completions.create(**LONG, stream=True)
        next(iter(events))
        sequence = narrow.running()
        events.close()
        assert ends_early(sequence, go)
    body = json.dumps(LONG).encode()
    with narrow.held() as go:
        with socket.create_connection(narrow.listener.getsockname(), timeout=20) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                           % (len(body), body))
            sequence = narrow.running()
        assert ends_early(sequence, go)


def test_a_client_that_leaves_before_the_first_byte_of_a_stream_frees_its_slot(server, monkeypatch):
    """The server hears of it while the head of its answer is on the way, before a piece was asked for."""
    submit, queued, sent = server.engine.submit, [], []
    monkeypatch.setattr(server.engine, "submit", lambda *sequences: (queued.extend(sequences), submit(*sequences))[1])
    body = json.dumps({"model": NAME, "prompt": ["ab", "cd"], "max_tokens": 64, "stream": True}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: dict) -> None:
        await asyncio.sleep(30)
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [],
             "asgi": {"spec_version": "2.3"}}
    asyncio.run(server.server.config.app(scope, receive, send))
    assert not sent and len(queued) == 2 and all(sequence.cancelled for sequence in queued)
    wait_until(lambda: server.engine.load() == {"running": 0, "waiting": 0}, 30, "its slots are not free")


def test_more_than_may_wait_are_sent_away(narrow):
    with ThreadPoolExecutor(1) as pool, narrow.held() as go:
        first = pool.submit(lambda: narrow.client().chat.completions.create(**LONG))
        narrow.running()
        with pytest.raises(openai.RateLimitError):
            narrow.client().completions.create(model=NAME, prompt="y")
        go.set()
        assert first.result(60).choices


def test_late_answers_end(hasty):
    with ThreadPoolExecutor(1) as pool, hasty.held() as go:
        late = pool.submit(lambda: hasty.client().chat.completions.create(**LONG))
        deadline = hasty.running().deadline
        wait_until(lambda: time.monotonic() > deadline, 30, "no end")
        go.set()
        with pytest.raises(openai.APIStatusError, match="no answer within timeout_s=1;") as caught:
            late.result(60)
    assert caught.value.status_code == 504


def test_a_stream_that_the_end_of_the_server_cuts_short_does_not_look_whole(loaded, capfd):
    with contextlib.closing(Server(loaded, slots=1)) as server, server.held() as go:
        events = server.client().chat.completions.create(**LONG, stream=True)
        next(iter(events))
        server.running()
        server.server.should_exit = True  # as on Ctrl-C
        wait_until(lambda: server.engine.closed, 30, "it does not close")
        go.set()
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(events)
        server.thread.join(60)
        assert capfd.readouterr().err == "" and not server.thread.is_alive()
        late = []
        server.engine.submit(Sequence([1], Sampling(), 0, 4, late.append))
        assert late[0].finish == "cancelled"


def test_an_error_after_a_sequence_ended_frees_its_slot_once(loaded, monkeypatch):
    """Both join in one step, in which the first ends and the second's text fails."""
    class Fails:
        stopped = False

        def push(self, token: int) -> str:
            raise RuntimeError("no text")

    stream, told = serve_engine.TextStream, queue.Queue()
    monkeypatch.setattr(serve_engine, "TextStream",
                        lambda tokenizer, stops, before: Fails() if stops else stream(tokenizer, stops, before))
    with contextlib.closing(Engine(loaded, slots=2, capacity=CAPACITY)) as engine:
        engine.submit(Sequence([1], Sampling(), 0, 1, told.put), Sequence([2], Sampling(), 0, 9, told.put, ["x"]))
        assert [told.get(timeout=60).finish for _ in range(2)] == ["length", "error"]
        engine.submit(Sequence([3], Sampling(), 0, 1, told.put))
        assert told.get(timeout=60).finish == "length", "and none is told twice"
        assert sorted(engine.batch.free) == [0, 1]


def test_an_error_of_the_model_ends_its_requests_not_the_server(server, monkeypatch, capfd):
    monkeypatch.setattr(server.engine.batch, "step", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        server.client().completions.create(model=NAME, prompt="x", max_tokens=2)
    monkeypatch.undo()
    assert "in _attempt" in capfd.readouterr().err, "whoever runs the server hears where"
    assert server.client().completions.create(model=NAME, prompt="x", max_tokens=2).usage.completion_tokens == 2


def test_an_error_in_a_prompt_ends_those_that_are_being_read_alone(server, monkeypatch):
    with server.held() as go:
        events = server.client().chat.completions.create(**LONG, stream=True)
        next(iter(events))
        server.running()
        monkeypatch.setattr(server.engine.batch.decoder, "read_on", lambda *a, **b: 1 / 0)
        with ThreadPoolExecutor(1) as pool:
            fails = pool.submit(lambda: server.client().completions.create(model=NAME, prompt="y", max_tokens=2))
            go.set()
            with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
                fails.result(60)
    assert list(events)[-1].choices[0].finish_reason == "length"


def test_a_prompt_that_goes_on_from_an_answer_is_not_read_again(narrow):
    before = narrow.engine.usage.report(None)
    narrow.client().completions.create(model=NAME, prompt="once upon a", max_tokens=4)
    said = narrow.engine.batch.held[0]
    narrow.client().completions.create(model=NAME, prompt=[*said, *b" time"], max_tokens=1)
    after = narrow.engine.usage.report(None)
    assert after["input_tokens"] - before["input_tokens"] == 11 + len(said) + 5 and len(said) == 11 + 4
    assert after["cached_tokens"] - before["cached_tokens"] == len(said) - 1, "the last one was not read yet"


def test_small_answers_are_sent_at_once():
    """asyncio sets TCP_NODELAY where a socket says what it is."""
    with contextlib.closing(serve._listen("127.0.0.1", 0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_token_is_asked_for_where_one_is_set(loaded):
    with contextlib.closing(Server(loaded, token="open sesame", slots=1)) as server:
        assert server.client("open sesame").completions.create(model=NAME, prompt="x", max_tokens=1)
        for key in ("sesame", ""):
            with pytest.raises(openai.OpenAIError):
                server.client(key).completions.create(model=NAME, prompt="x", max_tokens=1)


def test_usage_prices_input_and_output_by_the_seconds_they_took(server):
    usage = Usage(input_tokens=1000, output_tokens=100, prefill_s=2.0, decode_s=10.0)
    report = usage.report(3.6)  # a tenth of a cent a second
    assert report["usd_per_million_input"] == pytest.approx(0.001 * 2 / 1000 * 1e6)
    assert report["usd_per_million_output"] == pytest.approx(0.001 * 10 / 100 * 1e6)
    assert "$2.00 per million input" in serve.summary(report, "cpu")
    assert usage.report(None)["usd_per_million_input"] is None
    with pytest.raises(openai.APIStatusError, match="GET /v1/completions: is not for GET; use POST") as caught:
        server.client().get("/completions", cast_to=object)
    assert caught.value.status_code == 405
    with pytest.raises(openai.NotFoundError):
        server.client().get("/nothing", cast_to=object)
    server.client().completions.create(model=NAME, prompt="x", max_tokens=1)
    told = json.loads(server.client().get("/usage", cast_to=str))
    assert told["output_tokens"] == server.engine.usage.output_tokens > 0 and told["usd_per_million_output"] > 0


@pytest.mark.parametrize("words, said", [
    (["x", "host=0.0.0.0"], "host=0.0.0.0: others reach that address; set the environment variable SPARING_API_TOKEN"),
    (["x", "host=here"], "host=here: must be an IP address"), (["x", "prot=1"], "did you mean port"),
    (["x", "slots=0"], "slots=0: must be a whole number"), (["x", "name="], "name=: is empty"),
    ([], "takes 1 argument,"), (["/nowhere/run", "port=0"], "no whole checkpoint there")])
def test_bad_words_are_refused_before_anything_listens(words, said, monkeypatch):
    monkeypatch.delenv("SPARING_API_TOKEN", raising=False)
    with pytest.raises(BadRequest, match=said):
        serve.run(words)


@pytest.mark.parametrize("host, shown", [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_a_server_shows_an_address_that_works_and_limits_its_connections(loaded, host, shown, monkeypatch, capsys):
    try:
        serve._listen(host, 0).close()
    except BadRequest:
        pytest.skip(f"no {host} here")
    config, seen = uvicorn.Config, {}
    monkeypatch.setattr(uvicorn, "Config", lambda app, **how: (seen.update(how), config(app, **how))[1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("orchestrator.inference.load", lambda *given, **how: loaded)
    monkeypatch.setattr("orchestrator.inference.look", lambda path, tokenizer: (
        SimpleNamespace(config=loaded.model.config, trained_len=CAPACITY), None))
    assert serve.run(["x", "port=0", f"host={host}", "slots=2", "waiting=5"]) == 0
    assert f"at {shown}" in capsys.readouterr().out and seen["limit_concurrency"] == 46


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BadRequest, match=f"port={port}: cannot be listened on"):
            serve.run(["x", f"port={port}"])


def test_sampling_is_by_seed(server):
    ask = dict(model=NAME, prompt="x", max_tokens=16, temperature=1.0)
    texts = [server.client().completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
