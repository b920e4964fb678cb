"""Conversations as text: chat templates against transformers' own rendering, and plain lines without one."""

import contextlib
import dataclasses
import json

import openai
import pytest

from model.config import ModelConfig
from orchestrator.inference import Weights, read_tokenizer
from orchestrator.serve_chat import render
from orchestrator.train.tokenizer import TEMPLATE, bytes_as_files, load_tokenizer
from tests.orchestrator.serving import NAME, Server

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA_LIKE = """{{- bos_token }}
{%- if not tools is defined or tools is none %}{% set date = strftime_now("%d %b %Y") %}{% endif %}
{% if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{% else %}
    {%- set said = "" %}
{% endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date }}

{{ said }}<|eot_id|>
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
WITH_ALL = """{% set seen = namespace(users=0) %}
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
    {% if message.role == "user" %}
        {% set seen.users = seen.users + 1 %}
    {% endif %}
    {% if seen.users > 2 %}
        {{ "too many" }}
        {% break %}
    {% endif %}
[{{ message | tojson }}, {{ {"b": "<&'>", "a": [1, none]} | tojson(indent=2, sort_keys=true) }}]
    {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% endfor %}
{{ unknown_token }}{{ dict(a=documents) }}
"""
TALKS = [[{"role": "user", "content": "hello <|im_end|>"}],
         [{"role": "system", "content": " Be \u6f22\u5b57 'brief'. "}, {"role": "user", "content": "<b>\n\"hi\"\u00e9"},
          {"role": "assistant", "content": ""}, {"role": "user", "content": "and\ttabs "}, {"role": "assistant",
          "content": "so"}, {"role": "user", "content": "a third"}]]


def files(folder, about: dict) -> str:
    """A tokenizer of bytes with special tokens, and what is said about it."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(bytes_as_files()["tokenizer.json"])
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | about
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, WITH_ALL], ids=["chatml", "llama", "all"])
@pytest.mark.parametrize("talk", TALKS, ids=["one", "many"])
def test_a_conversation_is_the_ids_that_transformers_makes_of_it(tmp_path, template, talk):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(files(tmp_path, {"chat_template": template}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(render(tokenizer.template, talk, tokenizer.names)).tolist() == list(expected)


def test_a_template_is_found_where_hugging_faces_files_have_it(tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for about, expected in ({"chat_template": several}, "plain"), ({"chat_template": several[:1]}, ""), ({}, ""), (
            {"chat_template": "alone"}, "alone"):
        assert load_tokenizer(files(tmp_path, about)).template == expected
    (tmp_path / TEMPLATE).write_text("a file's\n", encoding="utf-8")
    assert load_tokenizer(files(tmp_path, {"chat_template": "alone"})).template == "a file's\n"


@pytest.mark.parametrize("is_foreign, begin, template", [(True, (257,), CHATML), (False, (), "")])
def test_a_model_trained_here_has_neither_a_beginning_nor_a_template(tmp_path, is_foreign, begin, template):
    weights = Weights("", ModelConfig(vocab_size=300), {}, files(tmp_path, {"chat_template": CHATML}), 96, is_foreign)
    found = read_tokenizer(weights)
    assert (found.begin, found.template, found.eos) == (begin, template, 258)


@pytest.fixture
def served(loaded):
    """Serves a model of bytes under a template, and what its texts begin with."""
    with contextlib.ExitStack() as stack:
        def start(template: str, begin: tuple[int, ...] = ()) -> openai.OpenAI:
            tokenizer = dataclasses.replace(loaded.tokenizer, template=template, begin=begin, names={"bos_token": "AB"})
            return stack.enter_context(contextlib.closing(Server(dataclasses.replace(loaded, tokenizer=tokenizer),
                                                                 slots=1))).client()

        yield start


def test_a_chat_is_answered_by_its_template_and_a_text_behind_what_texts_begin_with(served):
    client = served("{{ bos_token }}{% for m in messages %}{{ m.role }}>{{ m.content }};{% endfor %}", (65, 66))
    ask = dict(model=NAME, max_tokens=8, temperature=0)
    chat = client.chat.completions.create(**ask, messages=[{"role": "user", "content": "hi"}])
    given = client.completions.create(**ask, prompt=list(b"ABuser>hi;"))
    assert chat.choices[0].message.content == given.choices[0].text
    assert chat.usage.prompt_tokens == given.usage.prompt_tokens == len("ABuser>hi;")
    for prompt in "user>hi;", "ABuser>hi;":
        text = client.completions.create(**ask, prompt=prompt)
        assert (text.choices[0].text, text.usage.prompt_tokens) == (given.choices[0].text, len("ABuser>hi;"))


@pytest.mark.parametrize("template, said", [
    ("{{ raise_exception('roles must\n alternate') }}", "refuses them .roles must alternate.; send others"),
    ("{{ messages[0].name.first }}", "refuses them .'dict object' has no attribute 'name'.;"),
    ("{% if %}", "refuses them .Expected an expression"), ("{{ ''.__class__.mro() }}", "refuses them .*unsafe"),
    ("{{ messages[0].content + 1 }}", "refuses them .can only concatenate")])
def test_what_a_template_refuses_is_refused_in_its_words(served, template, said):
    with pytest.raises(openai.BadRequestError, match=f"messages: the model's chat template {said}") as caught:
        served(template).chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_without_a_template_an_answer_ends_where_the_user_would_speak(loaded, server, monkeypatch):
    tokens = iter(b"well.\nuser\nuser: and")
    monkeypatch.setattr(server.engine.batch, "step", lambda: [
        (slot, next(tokens)) for slot in list(server.engine.batch.rows)])
    answer = server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hi"}],
                                                     stop=["never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("well.\nuser", "stop")
    assert answer.usage.prompt_tokens == len("user: hi\nassistant:")
