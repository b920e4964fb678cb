"""The verb: bits per byte where they are known, refusals, and a local task under lm-evaluation-harness."""

import dataclasses
import importlib
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from orchestrator.__main__ import main
from orchestrator.evaluate import evaluate_text
from orchestrator.inference import load_for_inference
from orchestrator.train.tokenizer import begun


def evaluate(capsys, *arguments, code=0) -> tuple[str, str]:
    assert main(["evaluate", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_a_model_that_knows_nothing_needs_the_vocabularys_bits(checkpoint, tmp_path, capsys, monkeypatch):
    """All 264 tokens are equally likely: log2(264) bits per byte, perplexity 264, by hand."""
    def even(path, **options):
        loaded = load_for_inference(path, **options)
        torch.nn.init.zeros_(loaded.model.lm_head.weight)
        return loaded

    monkeypatch.setattr("orchestrator.inference.load_for_inference", even)
    (tmp_path / "a.txt").write_text("x" * 300)
    (tmp_path / "b.jsonl").write_text('{"text": "a\\u00e9b"}\n{"text": "c"}\n')
    evaluate(capsys, checkpoint, f"text={tmp_path / '*.txt'},{tmp_path / '*.jsonl'}", f"out={tmp_path / 'out.json'}")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["file"], row["documents"], row["bytes"]) for row in result["files"]] == [
        ("a.txt", 1, 300), ("b.jsonl", 2, 5)]
    assert result["total"]["bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-5)
    assert result["total"]["perplexity"] == pytest.approx(264, rel=1e-5)


def test_text_that_is_not_utf8_is_scored_and_said_so(checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    out, err = evaluate(capsys, checkpoint, f"text={tmp_path}/a.txt")
    assert "a.txt" in out and err == (f"warning: text={tmp_path}/a.txt: 1 file is not UTF-8 ({tmp_path}/a.txt): stray "
                                      "bytes are read as U+FFFD; convert to UTF-8 (iconv), or leave out\n")


def test_documents_are_scored_together_each_as_if_alone(checkpoint, tmp_path, monkeypatch):
    import model.score

    loaded, score, sizes = load_for_inference(str(checkpoint)), model.score.score, []
    loaded = dataclasses.replace(loaded, tokenizer=dataclasses.replace(loaded.tokenizer, begin=(65, 66)))
    texts = [f"def {'x' * n}(): # {n}" for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, "AB begins"]))
    monkeypatch.setattr(model.score, "score", lambda given, rows, firsts, **how: (
        sizes.append(len(rows)), score(given, rows, firsts, **how))[1])
    found, total = evaluate_text(loaded, str(tmp_path / "a.jsonl"), window=96, stride=48)
    assert sizes == [41] and found.documents == 41 and found.bytes == sum(map(len, texts)) + 9 == found.tokens + 2
    nats = sum(-float(score(loaded.model, [begun(loaded.tokenizer, text, (65, 66))], [2])[0].log_prob.double().sum())
               for text in [*texts, "AB begins"])
    assert found.nats == pytest.approx(nats, rel=1e-5) and total.nats == found.nats


@pytest.mark.parametrize("arguments, words", [
    ([], "takes text=FILE or tasks=NAME"),
    (["text=nowhere.txt"], "text=nowhere.txt: matches no file"),
    (["text=README.md", "window=97"], "window=97: must be a whole number between 1 and 96"),
    (["text=README.md", "window=8", "stride=9"], "stride=9: must be a whole number between 1 and 8"),
    (["tekst=README.md"], "did you mean text?"),
    (["text=BINARY"], "is no text, it holds zero bytes"), (["text=EMPTY"], "holds no text"),
    (["tasks=mine"], "add task_dir=DIR"),
    (["tasks=mine", "task_dir=x", "stride=2"], "stride=2: means nothing beside tasks=; leave it out"),
    (["text=README.md", "limit=3"], "limit=3: means nothing beside text=; leave it out"),
    (["text=README.md", "out=/nowhere/x.json"], "out=/nowhere/x.json: cannot be written; name a file"),
])
def test_what_cannot_be_is_one_line(checkpoint, tmp_path, capsys, arguments, words):
    for name, content in (("BINARY", b"a\0"), ("EMPTY", b"")):
        (tmp_path / name).write_bytes(content)
        arguments = [word.replace(name, f"{tmp_path}/{name}") for word in arguments]
    out, err = evaluate(capsys, checkpoint, *arguments, code=2)
    assert not out and words in err and err.count("\n") == 1


def test_the_harness_runs_local_tasks_offline(checkpoint, tmp_path, capsys, monkeypatch):
    """Multiple choice, rolling perplexity and generation: figures of the harness against figures by hand."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install 'sparing[eval]'")
    from model.score import score

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"def {name}", "choices": [" abc", " (x)", "zz"], "answer": i % 3, "text": name * 70}
            for i, name in enumerate("abcdef")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    common = (f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.json'}\n"
              "test_split: test\n")
    (tmp_path / "choice.yaml").write_text(
        "task: choice\n" + common + "output_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''\ndoc_to_target: '{{answer}}'\nmetric_list:\n"
        "  - metric: acc\n")
    (tmp_path / "rolling.yaml").write_text(
        "task: rolling\n" + common + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n")
    (tmp_path / "say.yaml").write_text(
        "task: say\n" + common + "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: 'x'\n"
        "generation_kwargs:\n  max_gen_toks: 8\n  until: []\nmetric_list:\n  - metric: exact_match\n")
    evaluate(capsys, checkpoint, "tasks=choice,rolling,say", f"task_dir={tmp_path}", f"out={tmp_path / 'out.json'}")
    found = json.loads((tmp_path / "out.json").read_text())["tasks"]
    model, right, nats = load_for_inference(str(checkpoint)).model, 0, 0.0
    for row in rows:
        question = [256, *row["question"].encode()]
        sums = [float(score(model, [[*question, *choice.encode()]], [len(question)])[0].log_prob.sum())
                for choice in row["choices"]]
        right += sums.index(max(sums)) == row["answer"]
        nats -= float(score(model, [[256, *row["text"].encode()]], [1])[0].log_prob.sum())
    assert found["choice"]["acc,none"] == pytest.approx(right / 6)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / (6 * 70), rel=1e-4)
    assert found["say"]["exact_match,none"] == 0
    assert "tasks=nothing: not in task_dir" in evaluate(capsys, checkpoint, "tasks=nothing", f"task_dir={tmp_path}",
                                                        code=2)[1]


CHOICE = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: [a, b]
doc_to_target: '{{answer}}'
metric_list: [{metric: acc}]
"""
SAY = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: x
generation_kwargs: {GIVEN}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Writes one task, over one row of data, and returns what the verb takes."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install 'sparing[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text(json.dumps({"question": "def f", "answer": 1}) + "\n")

    def write(text: str) -> list[str]:
        (tmp_path / "mine.yaml").write_text(text.replace("DATA", str(tmp_path / "rows.json")))
        return ["tasks=mine", f"task_dir={tmp_path}"]

    return write


@pytest.mark.parametrize("was, becomes, words", [
    ("DATA", "/nowhere/rows.json", "/nowhere/rows.json"), ("{{answer}}", "{{answr}}", "mine"),
    ("dataset_path: json", "dataset_path: nobody/nothing", "nobody/nothing"),
    ("output_type: multiple_choice", "output_type: multiple", "multiple"),
    ("metric: acc", "metric: accuracy_of_mine", "KeyError")])
def test_a_task_that_cannot_run_is_one_line(checkpoint, capsys, tasks, was, becomes, words):
    _, err = evaluate(capsys, checkpoint, *tasks(CHOICE.replace(was, becomes)), code=2)
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: tasks=mine: ") and words in line and "mend the task's YAML file" in line


def test_a_mistake_of_the_model_is_not_laid_at_the_tasks_door(checkpoint, tasks, monkeypatch):
    words = tasks(CHOICE)
    monkeypatch.setattr("orchestrator.evaluate_tasks.score", lambda *given, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", str(checkpoint), *words])


def test_a_task_that_asks_for_samples_gets_them(checkpoint, capsys, tasks, monkeypatch):
    from orchestrator import evaluate_tasks

    seen, generate = [], evaluate_tasks.generate
    monkeypatch.setattr(evaluate_tasks, "generate",
                        lambda *args, **named: seen.append(named["sampling"]) or generate(*args, **named))
    for given in "do_sample: true, temperature: 0.7, top_p: 0.9", "do_sample: false, temperature: 0.0":
        evaluate(capsys, checkpoint, *tasks(SAY.replace("GIVEN", f"max_gen_toks: 8, until: [], {given}")))
    assert [(one.temperature, one.top_p) for one in seen] == [(0.7, 0.9), (0.0, 1.0)]


@pytest.mark.parametrize("given, words", [
    ("top_k: 5", "top_k=5: is not supported"), ("temperature: 101", "temperature=101.0: must be a number between 0"),
    ("max_gen_toks: 0", "max_gen_toks=0: must be a whole number of at least 1"),
    ("max_gen_toks: -3", "max_gen_toks=-3"), ("max_gen_toks: '8'", "max_gen_toks='8'"),
    ("max_gen_toks: 2.5", "max_gen_toks=2.5"),
    ("until: 5", "until=5: must be a text or a list of texts"), ("until: [5]", "until=[5]")])
def test_an_answer_that_cannot_be_is_one_line(checkpoint, capsys, tasks, given, words):
    _, err = evaluate(capsys, checkpoint, *tasks(SAY.replace("GIVEN", given)), code=2)
    assert err.strip().splitlines()[-1].startswith(f"error: generation_kwargs.{words}")


@pytest.fixture
def harness(checkpoint, monkeypatch):
    """The adapter's module and its model; without the extra `eval`, on a stand-in for the class that it adapts to."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        for name in "lm_eval", "lm_eval.api", "lm_eval.api.model":
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {"__init__": lambda self: None})
    module = importlib.import_module("orchestrator.evaluate_tasks")
    yield module, module.HarnessModel(load_for_inference(str(checkpoint)))
    if not hasattr(sys.modules["lm_eval"], "__file__"):
        del sys.modules["orchestrator.evaluate_tasks"]


def requests(*given: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in given]


def test_answers_are_decoded_together_and_say_what_each_says_alone(harness, monkeypatch):
    module, model = harness
    alone, slots, decoder = [], [], module.Decoder
    asked = requests(*((f"def {'x' * n}", {"until": ["q"][: n % 2], "max_gen_toks": 8 + n % 3}) for n in range(20)))
    for request in asked:
        alone += model.generate_until([request])
    monkeypatch.setattr(module, "Decoder", lambda model, **how: slots.append(how["slots"]) or decoder(model, **how))
    assert model.generate_until(asked) == alone and slots == [7, 7, 6] and len(set(alone)) > 1
    asked = requests(*(("def ", {"max_gen_toks": 8, "temperature": 1.0}) for _ in range(20)))
    texts = model.generate_until(asked)
    assert len(set(texts)) > 10 and model.generate_until(asked[:9]) == texts[:9] and slots[3:] == [16, 9]
    model.loaded = dataclasses.replace(model.loaded, cache_tokens=60)
    assert model.generate_until(asked) == texts and slots[-1] == 60 // (5 + 8 + 1)


def test_tasks_put_before_a_text_what_its_model_read_there(harness, monkeypatch):
    module, model = harness
    tokenizer, rows = dataclasses.replace(model.loaded.tokenizer, begin=(65, 66)), []
    model = module.HarnessModel(dataclasses.replace(model.loaded, tokenizer=tokenizer))
    for name in "score", "score_texts", "generate":
        monkeypatch.setattr(module, name, lambda model, texts, *given, **how: rows.extend(texts) or ())
    model.loglikelihood(requests(("def", " x"), ("", "def x"), ("AB def", " x")))
    model.loglikelihood_rolling(requests(("def x",)))
    model.generate_until(requests(("def x", {})))
    assert [bytes(row) for row in rows] == [b"ABdef x", b"ABdef x", b"AB def x", b"ABdef x", b"ABdef x"]


@pytest.mark.parametrize("context, most, read, told", [
    (40, 16, 41, 16), (40, 96, 41, 55), (40, 5000, 41, 55), (94, 50, 95, 1), (95, 50, 48, 48), (200, 16, 80, 16),
    (200, 5000, 48, 48)])
def test_a_context_that_fits_is_read_whole_however_long_an_answer_may_be(harness, monkeypatch, context, most, read,
                                                                         told):
    module, model = harness
    seen, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda decoder, prompts, **how: seen.append((len(prompts[0]), sum(
        1 for _ in generate(decoder, prompts, **how)))) or ())
    model.generate_until(requests(("x" * context, {"max_gen_toks": most})))
    assert seen == [(read, told)]
