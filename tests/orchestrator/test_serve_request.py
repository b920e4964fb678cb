"""What a client of `sparing serve` may ask for, and in which words it is refused."""

import json

import httpx
import openai
import pytest

from tests.orchestrator.serving import CAPACITY, NAME


@pytest.mark.parametrize("bad, said", [
    (dict(prompt="x" * CAPACITY), "prompt: 96 tokens, must be 1 to 95"),
    (dict(prompt=""), "prompt: 0 tokens"), (dict(prompt=[999]), "token ids below"),
    (dict(max_tokens=65), r"max_tokens=65: must be a whole number from 1 to 64 .this server's max_tokens=64."),
    (dict(max_tokens=65, prompt="x" * 40), r"max_tokens=65: .* from 1 to 56 .context=96 less 40 of the prompt."),
    (dict(temperature=3), "temperature=3: must be a number from 0 to 2"),
    (dict(logprobs=21), "logprobs=21: must be a whole number from 0 to 20"),
    (dict(n=99), "n=99"), (dict(stop=[1]), "stop"), (dict(extra_body={"stop": 0}), "stop=0: must be a text or up to"),
    (dict(extra_body={"stop": {}}), "stop={}: must be a text or up to four texts"),
    (dict(extra_body={"stop": False}), "stop=false: must be"), (dict(stop=["a", ""]), "stop=.*: must be a text"),
    (dict(stop=["a", "x" * 257]), "stop: 257 characters, must be at most 256"),
    (dict(extra_body={"stream": 1}), "stream=1: must be true or false"),
    (dict(extra_body={"tmperature": 1}), "tmperature: no such parameter"),
    (dict(prompt=["a", "b"], n=6), "n=6: 12 answers, must be at most 11 here"),
    (dict(stream_options={"include_usage": True}), "stream_options: are of a stream"),
    (dict(extra_body={"stream_options": 5, "stream": True}), "stream_options=5: must be {include_usage: true or"),
    (dict(extra_body={"stream_options": {"x": 1}, "stream": True}), "stream_options={.x.: 1}: must be"),
    (dict(extra_body={"stream_options": {"include_usage": 1}, "stream": True}), "include_usage=1: must be true or"),
    (dict(top_p=-0.1), "top_p=-0.1: must be a number from 0 to 1"), (dict(extra_body={"top_k": 5}), "top_k=5: is not"),
    (dict(extra_body={"min_p": False}), "min_p=false: is not supported"),
    (dict(extra_body={"model": None}), "model: must be given; use model=small")])
def test_a_bad_request_names_the_parameter(server, bad, said):
    with pytest.raises(openai.BadRequestError, match=said):
        server.client().completions.create(**dict(model=NAME, prompt="x") | bad)


@pytest.mark.parametrize("content, said", [
    ([{"type": "image_url", "image_url": {"url": "http://x"}}], "images and the like are not supported"),
    ([{"type": "text", "text": 5}], "a part of a content must be"), (5, "a content of text"),
    ("\\ud800", "messages: holds half of a surrogate pair")])
def test_a_message_that_is_no_text_is_refused(server, content, said):
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": content}]}).replace("\\\\", "\\")
    answer = httpx.post(f"{server.client().base_url}chat/completions", content=body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ['{"model": "\\ud800", "prompt": "x"}', '{"\\ud800": 1, "prompt": "x"}'])
def test_what_cannot_be_said_back_is_refused_in_openais_words(server, body):
    answer = httpx.post(f"{server.client().base_url}completions", content=body)
    assert answer.status_code in (400, 404) and "ud800" in answer.json()["error"]["message"]


def test_other_refusals_have_their_status(server):
    with pytest.raises(openai.NotFoundError, match="use model=small"):
        server.client().completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().completions.create(model=NAME, prompt="x" * 5000)
    assert caught.value.status_code == 413
    with pytest.raises(openai.NotFoundError, match="no such route; there are /v1/models"):
        server.client().embeddings.create(model=NAME, input="x")


def test_the_model_is_listed_and_told_of_by_name(server):
    (listed,) = server.client().models.list()
    assert listed.id == NAME and server.client().models.retrieve(NAME) == listed
    with pytest.raises(openai.NotFoundError, match="model=gpt/4: is not served here; use model=small") as caught:
        server.client().models.retrieve("gpt/4")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("nothing", [
    dict(top_logprobs=0, logprobs=False), dict(parallel_tool_calls=True), dict(tool_choice="none"),
    dict(modalities=["text"]), dict(verbosity="medium"), dict(reasoning_effort="none"), dict(prompt_cache_key="mine")],
    ids=str)
def test_what_asks_for_nothing_is_granted(server, nothing):
    ask = dict(model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0)
    assert server.client().chat.completions.create(**ask, **nothing).choices[0].message.content == (
        server.client().chat.completions.create(**ask).choices[0].message.content)


@pytest.mark.parametrize("nothing", [
    dict(stop=""), dict(stop=[]), dict(extra_body={"repetition_penalty": 1.0, "ignore_eos": False, "min_p": 0}),
    dict(extra_body={"top_k": -1}), dict(extra_body={"top_k": 0})], ids=str)
def test_extensions_that_ask_for_nothing_are_granted(server, nothing):
    ask = dict(model=NAME, prompt="hello", max_tokens=4, temperature=0)
    assert server.client().completions.create(**ask, **nothing).choices == (
        server.client().completions.create(**ask).choices)


def test_no_share_of_probability_leaves_the_likeliest_token(server):
    ask = dict(model=NAME, prompt="hello", max_tokens=8, seed=1)
    assert server.client().completions.create(**ask, top_p=0).choices == (
        server.client().completions.create(**ask, temperature=0).choices)


@pytest.mark.parametrize("bad, said", [
    (dict(top_logprobs=2), "top_logprobs=2: are of log probabilities; add logprobs=true, or leave it out"),
    (dict(logprobs=True, top_logprobs=21), "top_logprobs=21: must be a whole number from 0 to 20"),
    (dict(logprobs=3), "logprobs=3: must be true or false")], ids=str)
def test_log_probabilities_are_asked_for_as_in_openais_chat(server, bad, said):
    with pytest.raises(openai.BadRequestError, match=said):
        server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], **bad)


@pytest.mark.parametrize("something", [dict(tool_choice="required"), dict(verbosity="low"),
                                       dict(modalities=["text", "audio"]), dict(reasoning_effort="high")], ids=str)
def test_what_asks_for_something_else_is_refused(server, something):
    with pytest.raises(openai.BadRequestError, match=f"{next(iter(something))}=.* is not supported"):
        server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], **something)


def test_an_assistant_may_have_said_nothing(server):
    ask, hello = dict(model=NAME, max_tokens=4, temperature=0), {"role": "user", "content": "hello"}
    texts = {server.client().chat.completions.create(**ask, messages=[hello, {"role": "assistant"} | said, hello])
             .choices[0].message.content for said in ({}, {"content": None}, {"content": "", "tool_calls": None})}
    assert len(texts) == 1
    called = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    for said, words in (({"role": "user"}, "each must have a role"), (called, "tool_calls is not supported in a"),
                        (called | {"content": "x"}, "tool_calls is not"), (hello | {"name": "bob"}, "name is not")):
        with pytest.raises(openai.BadRequestError, match=f"messages: {words}"):
            server.client().chat.completions.create(**ask, messages=[hello, said])
