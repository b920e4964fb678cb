"""The verb on checkpoints of random weights: same text from each kind of path, stops, batches, and refusals."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch

from model import hf
from model.transformer import Transformer
from orchestrator.__main__ import main
from orchestrator.compose import compose_config
from orchestrator.errors import UNREAD, BadRequest
from orchestrator.inference import TextStream, load, load_for_inference, look
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.export import export_checkpoint
from orchestrator.train.loop import run_rank
from orchestrator.train.memory import _groups
from orchestrator.train.tokenizer import bytes_as_files, load_tokenizer
from tests.model.test_hf import TINY


def generate(capsys, *arguments, code=0) -> tuple[str, str]:
    assert main(["generate", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_a_run_a_checkpoint_and_a_hugging_face_directory_say_the_same(checkpoint, tmp_path, capsys):
    path = export_checkpoint(str(checkpoint), str(tmp_path / "hf"))
    texts = {generate(capsys, where, "prompt=def ", "max_tokens=20", *more)[0]
             for where, more in [(checkpoint, ()), (path, ()), (tmp_path / "hf", ()), (path, ("tokenizer=byte",))]}
    assert len(texts) == 1 and len(texts.pop()) == 21, "20 letters and the line's end"


@pytest.mark.parametrize("gpu, memory, expected", [
    (True, None, ("cuda", torch.bfloat16)), (False, None, ("cpu", torch.float32)),
    (True, {"max_gib": 1.0}, (None, torch.float32))])
def test_a_model_goes_to_the_gpu_unless_its_experts_stay_on_disk(monkeypatch, gpu, memory, expected):
    def asked(path, **how):
        return how.get("device"), how["dtype"]

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("orchestrator.inference.load_for_inference", asked)
    monkeypatch.setattr("orchestrator.cold_weights.load_within", asked)
    assert load("x", memory) == expected
    assert load("x", memory, dtype=torch.float32) == (expected[0], torch.float32)


def test_prompts_come_from_stdin_and_from_files_in_their_order(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def "))
    alone, _ = generate(capsys, checkpoint, "max_tokens=12")
    (tmp_path / "p.txt").write_text("def ")
    assert generate(capsys, checkpoint, "max_tokens=12", f"file={tmp_path / 'p.txt'}")[0] == alone
    (tmp_path / "p.jsonl").write_text('{"prompt": "class A"}\n{"prompt": "def "}\n')
    rows = [json.loads(line) for line in
            generate(capsys, checkpoint, "max_tokens=12", f"file={tmp_path / 'p.jsonl'}")[0].splitlines()]
    assert [row["prompt"] for row in rows] == ["class A", "def "] and rows[1]["text"] + "\n" == alone
    assert [(row["finish"], row["tokens"]) for row in rows] == [("length", 12)] * 2
    stop = rows[1]["text"][4:6]
    (row,) = (json.loads(line) for line in generate(capsys, checkpoint, f"file={tmp_path / 'p.jsonl'}", "max_tokens=12",
                                                    f"stop={stop}")[0].splitlines()[1:])
    assert row == {"prompt": "def ", "text": alone[: alone.index(stop)], "finish": "stop",
                   "tokens": alone.index(stop) + 2}
    (tmp_path / "q.txt").write_bytes(b"caf\xe9")
    assert f"1 file is not UTF-8 ({tmp_path}/q.txt)" in generate(capsys, checkpoint, "max_tokens=2",
                                                                 f"file={tmp_path / 'q.txt'}")[1]


def test_speculation_is_compared_with_plain_decoding_in_one_run(checkpoint, capsys):
    plain, _ = generate(capsys, checkpoint, "prompt=def ", "max_tokens=24")
    text, report = generate(capsys, checkpoint, "prompt=def ", "max_tokens=24", "speculative=compare")
    assert text == plain and "text         the same for 1 of 1" in report
    assert "acceptance" in report and "24 tokens in 24 steps" in report and "gain" in report


class Watched(str):
    """Counts how often a part of it is taken."""

    taken = 0

    def __getitem__(self, key):
        Watched.taken += 1
        return super().__getitem__(key)


def test_a_long_stop_text_costs_no_more_than_what_is_held_back():
    tokenizer = load_tokenizer("byte")
    stream = TextStream(tokenizer, [Watched("ab" * 100_000)])
    assert "".join(map(stream.push, tokenizer.encode("xxabab" * 3).tolist())) == "xxababxxababxx"
    assert stream.finish() == "abab" and Watched.taken < 100


def test_a_stop_text_is_never_shown_in_part(checkpoint, capsys):
    text = generate(capsys, checkpoint, "prompt=def ", "max_tokens=24")[0][:-1]
    stop = json.dumps([text[9:12], "not there"])
    assert generate(capsys, checkpoint, "prompt=def ", "max_tokens=24", f"stop={stop}")[0] == text[:text.index(
        text[9:12])] + "\n"
    stream = TextStream(load_tokenizer("byte"), ["</end>"])
    assert [stream.push(token) for token in "a\u00e9</en</end>b".encode()] == [
        "a", "", "\u00e9", "", "", "", "", "</en", "", "", "", "", "", ""] and stream.stopped


def test_text_that_stdout_cannot_show_is_told_by_number(checkpoint, monkeypatch):
    class Say:
        stopped = False

        def __init__(self, *given):
            pass

        def push(self, token):
            return "\u6f22"

        def finish(self):
            return ""

    monkeypatch.setattr("orchestrator.inference.TextStream", Say)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["generate", str(checkpoint), "prompt=def ", "max_tokens=2"]) == 0
    assert sys.stdout.buffer.getvalue() == b"\\u6f22\\u6f22\n"


@pytest.mark.parametrize("imported", [False, True])
def test_a_model_trained_elsewhere_reads_what_it_reads_under_transformers(tmp_path, capsys, imported):
    """A text behind its BOS token, up to the second of the tokens that end one."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(bytes_as_files()["tokenizer.json"])
    made.add_special_tokens(["<s>", "</s>", "<turn>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    folder, config = tmp_path / "hf", dataclasses.replace(TINY, vocab_size=264, max_seq_len=96)
    model = Transformer(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
        model.lm_head.weight[262:] = 0
    hf.export(folder, config, model.state_dict())
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, path = transformers.AutoTokenizer.from_pretrained(folder), folder
    prompt = tokenizer("def x", return_tensors="pt")
    ids = theirs.generate(**prompt, max_new_tokens=30, do_sample=False, eos_token_id=258)[0, 6:].tolist()
    ends = [258, ids[20]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    ids = theirs.generate(**prompt, max_new_tokens=30, do_sample=False, eos_token_id=ends)[0, 6:].tolist()
    assert prompt.input_ids[0].tolist() == [257, *b"def x"] and 3 < len(ids) <= 21
    if imported:
        assert main(["import", str(folder), str(tmp_path / "in")]) == 0
        capsys.readouterr()
        path = tmp_path / "in"
    text, _ = generate(capsys, path, "prompt=def x", "max_tokens=30")
    assert text == tokenizer.decode(ids[:-1], skip_special_tokens=True) + "\n"
    assert generate(capsys, path, "prompt=<s>def x", "max_tokens=30")[0] == text, "and not behind two"


def test_bf16_weights_keep_their_router_bias_in_fp32(checkpoint):
    model = load_for_inference(str(checkpoint), dtype=torch.bfloat16).model
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.layers["1"].moe.router.expert_bias.dtype == torch.float32


def test_going_beyond_the_length_of_training_is_said_once(checkpoint, capsys, monkeypatch):
    import orchestrator.inference as inference

    whole = inference.open_weights

    @contextlib.contextmanager
    def shorter(path):
        with whole(path) as weights:
            yield dataclasses.replace(weights, trained_len=20)

    plain, _ = generate(capsys, checkpoint, "prompt=def ", "max_tokens=24")
    monkeypatch.setattr(inference, "open_weights", shorter)
    text, err = generate(capsys, checkpoint, "prompt=def ", "max_tokens=24", "speculative=compare")
    assert text == plain and err.count("notice: ") == 1
    assert err.startswith("notice: sequences may reach 28 tokens, those of training had 20; ")
    assert "notice" not in generate(capsys, checkpoint, "prompt=def ", "max_tokens=16")[1]


@pytest.mark.parametrize("arguments, words", [
    (["tempersture=1"], "did you mean temperature?"),
    (["temperature=hot"], "temperature=hot: must be a number between 0 and 100; use temperature=0"),
    (["top_p=1.5", "temperature=1"], "top_p=1.5: must be a number between"),
    (["top_p=0.5"], "add temperature=1"),
    (["max_tokens=0"], "max_tokens=0: must be a whole number of at least 1"),
    (["seed=-1"], "seed=-1: must be"),
    (["speculative=maybe"], "must be one of false, true, compare"),
    (["stop=[1"], "stop=[1: must be"),
    (["stop=" + "x" * 257], f"stop={'x' * 20}...: 257 characters, must be at most 256"),
    (["file=nowhere"], "file=nowhere: "),
    (["file=tests"], "file=tests: is a directory"),
    (["file=x", "prompt=x"], "give one of them"),
    (["prompt="], "is empty; give at least one character"),
    (["prompt=" + "x" * 90], "90 tokens and max_tokens=200 must not exceed model.max_seq_len=96; use max_tokens=6"),
    (["prompt=x", "tokenizer=nowhere"], "tokenizer=nowhere: no such file"),
    (["prompt=\udcff"], "prompt: is no UTF-8 text"),
])
def test_what_cannot_be_is_one_line(checkpoint, capsys, arguments, words):
    prompt = [] if any(word.startswith(("prompt", "file")) for word in arguments) else ["prompt=def "]
    out, err = generate(capsys, checkpoint, *prompt, *arguments, code=2)
    assert not out and words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments, words", [
    (["generate", "nowhere", "prompt="], "prompt: is empty"),
    (["generate", "nowhere", "prompt=x", "tokenizer=gpt2"], "tokenizer=gpt2: no such file"),
    (["generate", "nowhere", "prompt=x", "weights=int3"], "weights=int3: must be one of fp32, bf16, fp8, int4"),
    (["serve", "nowhere", "tokenizer=gpt2"], "tokenizer=gpt2: no such file"),
    (["export", "nowhere", "tests"], "tests: must be a new or empty directory"),
    (["export", "nowhere", "new", "dtype=int8"], "dtype=int8: must be one of fp32, bf16, fp8"),
    (["import", "nowhere", "tests"], "tests: must be a new or empty directory"),
    (["evaluate", "nowhere", "text=README.md", "stride=0"], "stride=0: must be a whole number of at least 1"),
    (["evaluate", "nowhere", "text=none.txt"], "text=none.txt: matches no file"),
])
def test_what_needs_no_model_is_told_before_one_is_looked_for(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1


def test_bad_files_and_bytes_are_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"text": "x"}')
    assert "p.jsonl:1: has no text under prompt; its keys are ['text']" in generate(
        capsys, checkpoint, f"file={tmp_path / 'p.jsonl'}", code=2)[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert "stdin: is no UTF-8 text" in generate(capsys, checkpoint, code=2)[1]


def test_a_reader_that_has_read_enough_ends_it_quietly(checkpoint):
    command = [sys.executable, "-m", "orchestrator", "generate", str(checkpoint), "prompt=def ", "max_tokens=80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == UNREAD


def test_a_path_without_a_model_is_one_line(tmp_path, capsys):
    assert "no whole checkpoint there" in generate(capsys, tmp_path, "prompt=x", code=2)[1]
    (tmp_path / "config.json").write_text("{}")
    assert generate(capsys, tmp_path, "prompt=x", code=2)[1].count("\n") == 1
    assert "config.json: no whole checkpoint there; name" in generate(capsys, tmp_path / "config.json", "prompt=x",
                                                                      code=2)[1]
    assert main(["export", f"{tmp_path}/config.json", f"{tmp_path}/out"]) == 2


def test_a_tokenizer_travels_with_its_weights(checkpoint, tmp_path, capsys):
    """Out and in again: never do weights of one tokenizer meet another in silence."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(bytes_as_files()["tokenizer.json"])
    made.add_special_tokens(["<stop>"])
    shutil.copytree(checkpoint / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": [257, 10]}))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "in")]) == 0
    out = capsys.readouterr().out
    assert f"data.tokenizer={tmp_path}/in/tokenizer.json" in out and "M parameters, with any MTP module\n" in out
    assert look(str(tmp_path / "in"))[1].eos == 257
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    told = look(str(tmp_path / "out"))[1]
    assert told.eos == 257 and told.ends == {257, 10} and told.template == "{{ messages[0].content }}"

    data = ["data.path=stdlib:json", f"data.cache_dir={tmp_path}", "train.seq_len=32", "train.validate_sequences=2"]
    asked = compose_config(["model=tiny", "tracker=off", *data, f"resume={tmp_path / 'in'}", "train.steps=1",
                            f"run.dir={tmp_path / 'run'}", f"checkpoint.dir={tmp_path / 'run'}"])
    asked = dataclasses.replace(asked, model=look(str(tmp_path / "in"))[0].config)
    with pytest.raises(BadRequest, match=r"data\.tokenizer=byte: is not that of the weights .*use data\.tokenizer="):
        run_rank(asked, RankInfo(), control=Control(), placed_at=0.0)

    (tmp_path / "in" / "tokenizer.json").unlink()
    assert ": has no tokenizer.json; add tokenizer=FILE" in generate(capsys, tmp_path / "in", "prompt=x", code=2)[1]
    (tmp_path / "out" / "generation_config.json").unlink()
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0}, []))
    made.save(str(tmp_path / "out" / "tokenizer.json"))
    assert "does not say which token ends a text" in generate(capsys, tmp_path / "out", "prompt=x", code=2)[1]


def test_a_containers_limit_and_what_it_leaves_are_read(tmp_path):
    for name, text in (("max", "1000000"), ("current", "800000"), ("stat", "anon 1\nactive_file 5\ninactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert list(_groups(str(tmp_path))) == [(1_000_000, 800_000, 12)]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(_groups(str(tmp_path))) == []
