"""A model within a limit of memory says what the whole one says; limits and formats that cannot be are refused."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from model.cold_experts import Store
from model.decode import Decoder
from model.generate import generate
from model.hf import Assembled, export
from model.hf_files import safetensors_header
from model.packed import packed_bytes
from model.transformer import Transformer
from orchestrator import evaluate, serve
from orchestrator import generate as generate_verb
from orchestrator.cold_weights import GIB, experts_of, load_within
from orchestrator.errors import BadRequest, NotFit
from orchestrator.inference import cache_bytes, forward_bytes, load_for_inference
from tests.model.test_hf import TINY

CONFIG = dataclasses.replace(TINY, vocab_size=260, n_mtp_layers=0)
PROMPT = list(b"def walk(top):")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    folder = tmp_path_factory.mktemp("model") / "hf"
    export(folder, CONFIG, model.state_dict())
    return str(folder)


def said(model) -> list[int]:
    return [token for _, token in generate(Decoder(model, slots=1, capacity=48), [PROMPT], max_tokens=24)]


def test_experts_on_disk_say_what_the_whole_model_says(path, tmp_path):
    expected = said(load_for_inference(path, tokenizer="byte").model)
    for share in (1.0, 0.0):
        least = _least(path, tmp_path)
        cold = load_within(path, max_gib=least + share, tokenizer="byte", cache_dir=str(tmp_path))
        assert said(cold.model) == expected
        hot = experts_of(cold.model)[0].hot
        assert hot.bytes <= hot.max_bytes and (hot.misses <= 2 * CONFIG.n_routed_experts) == (share == 1.0)
    assert len(list(tmp_path.iterdir())) == 1, "the second start found what the first had written"


def test_a_store_is_the_weights_own_whatever_their_path_is_called(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(os.path.dirname(path))
    for name in (path, os.path.basename(path)):
        assert load_within(name, max_gib=1, tokenizer="byte").model
    assert len(list((tmp_path / "sparing" / "experts").iterdir())) == 1
    assert capsys.readouterr().err.count("writing experts to") == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.expanduser", Mock(side_effect=RuntimeError("no home")))
    with pytest.raises(NotFit, match="no place on disk .no home.; set XDG_CACHE_HOME"):
        load_within(path, max_gib=1, tokenizer="byte")


def test_a_store_may_be_larger_than_the_machines_memory(tmp_path):
    file, size = tmp_path / "w13.safetensors", packed_bytes(2**20, 2**18, "fp32")
    header = safetensors_header([("0", "U8", [size], size)],
                                {"format": "fp32", "rows": str(2**20), "columns": str(2**18)})
    file.write_bytes(header)
    os.truncate(file, len(header) + size)  # a terabyte of nothing
    assert Store(file).expert_bytes == size == 2**40


def test_neither_start_reads_more_than_one_expert_at_a_time(path, tmp_path, monkeypatch):
    read, whole = [], Assembled.__getitem__
    monkeypatch.setattr(Assembled, "__getitem__", lambda self, name: (read.append(name), whole(self, name))[1])
    for _ in range(2):
        load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path))
    assert read and not [name for name in read if ".experts." in name]


def _least(path, tmp_path) -> float:
    with pytest.raises(BadRequest, match="memory.max_gib=1e-06: must be at least") as caught:
        load_within(path, max_gib=1e-6, tokenizer="byte", cache_dir=str(tmp_path))
    assert "use memory.max_gib=" in str(caught.value)
    model = Transformer(CONFIG)
    each = sum(p[0].numel() * 4 for n, p in model.named_parameters() if n.startswith("layers.1.moe.experts"))
    rest = sum(p.numel() * 4 for n, p in model.named_parameters() if ".moe.experts." not in n)
    return (rest + 4 * each + forward_bytes(CONFIG, 0, 0, torch.float32, "cpu", in_turn=True) + 4096) / GIB


def test_a_store_that_was_not_finished_is_never_taken_for_one(path, tmp_path, monkeypatch):
    import orchestrator.cold_weights as cold_weights

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cold_weights, "write_store", fails)
        with pytest.raises(Exception, match="No space left on device; make room there"):
            load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path)).model


KILLED = """
import sys
import orchestrator.cold_weights as cold_weights

write = cold_weights.write_store

def told(*given, **how):
    write(*given, **how)
    print("written", flush=True)
    sys.stdin.read()

cold_weights.write_store = told
cold_weights.load_within(sys.argv[1], max_gib=1, tokenizer="byte", cache_dir=sys.argv[2])
"""


def test_what_a_killed_process_left_of_a_store_is_removed_and_what_is_being_written_is_not(path, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", KILLED, path, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        (unfinished,) = tmp_path.iterdir()
        load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path))
        assert unfinished.is_dir() and len(list(tmp_path.iterdir())) == 2
    finally:
        other.terminate()
        other.communicate(timeout=30)
    assert unfinished.is_dir()
    load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path))
    assert not unfinished.exists() and len(list(tmp_path.iterdir())) == 1


def test_a_store_whose_directory_goes_as_it_is_made_gets_another(path, tmp_path, monkeypatch):
    """Another process finds it before it is locked, and takes it for one that was left."""
    open_, gone = os.open, []

    def late(folder, *given, **how):
        if not gone:
            gone.append(folder)
            shutil.rmtree(folder)
        return open_(folder, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", late)
        assert load_within(path, max_gib=1, tokenizer="byte", cache_dir=str(tmp_path)).model
    assert gone[0].parent == tmp_path and len(list(tmp_path.iterdir())) == 1


def test_experts_that_four_bits_cannot_hold_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, moe_inter_dim=20)
    export(tmp_path / "hf", config, Transformer(config).state_dict())
    with pytest.raises(BadRequest, match="weights=int4: .* a multiple of 8 inputs, not 20; use weights=fp8"):
        load_within(str(tmp_path / "hf"), max_gib=1, form="int4", tokenizer="byte", cache_dir=str(tmp_path))


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read(path, monkeypatch):
    monkeypatch.setattr("orchestrator.inference.free_bytes", lambda device: 1000)
    with pytest.raises(BadRequest, match=r"GiB in fp32 and 0.0 of keys, .* are free here; .* add memory.max_gib="):
        load_for_inference(path, tokenizer="byte")
    monkeypatch.setattr("orchestrator.inference.free_bytes", lambda device: GIB)
    with pytest.raises(BadRequest, match="what a forward holds, but 1.0 are free here; .* fewer or shorter sequences"):
        load_for_inference(path, tokenizer="byte", cache_tokens=10**8)


def test_what_a_gpu_reads_at_once_must_fit_into_it(path, monkeypatch):
    """Sixteen times a CPU's chunk of a prompt."""
    asked, tokens = dict(tokenizer="byte", cache_tokens=20_000), CONFIG.vocab_size * CONFIG.dim
    room = 4 * sum(p.numel() for p in Transformer(CONFIG).parameters()) + cache_bytes(CONFIG, 20_000, torch.float32)
    room += forward_bytes(CONFIG, 20_000, 0, torch.float32, "cpu") + 4 * tokens
    monkeypatch.setattr("orchestrator.inference.free_bytes", lambda device: room)
    assert load_for_inference(path, **asked).model
    with pytest.raises(BadRequest, match="are free here"):
        load_for_inference(path, device="cuda", **asked)


def test_tasks_have_room_for_the_keys_and_values_of_an_answer(path, monkeypatch):
    loaded, asked = load_for_inference(path, tokenizer="byte"), []
    monkeypatch.setitem(sys.modules, "orchestrator.evaluate_tasks", SimpleNamespace(
        evaluate_tasks=lambda *given, **how: {"results": {}}, table=str))
    monkeypatch.setattr("orchestrator.inference.load", lambda *given, **how: asked.append(how) or loaded)
    evaluate.run([path, "tokenizer=byte", "tasks=mine", "task_dir=.", "memory.max_gib=1"])
    assert asked[0]["cache_tokens"] == CONFIG.max_seq_len + 1
    kept = cache_bytes(CONFIG, 65, torch.float32)
    assert kept > 0 and forward_bytes(CONFIG, 65, 10_000, torch.float32, "cpu") + kept == forward_bytes(
        CONFIG, 0, 10_000, torch.float32, "cpu"), "what is scored has that room"


def test_a_limit_above_what_is_free_is_refused_unless_the_model_takes_less(path, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.cold_weights.free_bytes", lambda device: GIB)
    assert load_within(path, max_gib=5, tokenizer="byte", cache_dir=str(tmp_path)).model
    monkeypatch.setattr("orchestrator.cold_weights.free_bytes", lambda device: 1000)
    with pytest.raises(BadRequest, match="memory.max_gib=5: only 0.00 GiB are free here"):
        load_within(path, max_gib=5, tokenizer="byte", cache_dir=str(tmp_path))


@pytest.mark.parametrize("words, message", [
    (["weights=int4"], "weights=int4: is of experts that stay on disk"),
    (["memory.max_gib=1", "weights=int5"], "weights=int5: must be one of fp32"),
    (["memory.max_gib=inf"], "memory.max_gib=inf: must be a number between"),
    (["memory.max_gib=x"], "memory.max_gib=x: must be a number"), (["memory.max=1"], "did you mean memory.max_gib")])
def test_bad_words_are_refused(path, words, message):
    for verb, asked in ((generate_verb.run, ["prompt=x", "max_tokens=8"]), (serve.run, ["port=0"]),
                        (evaluate.run, ["text=README.md"])):
        with pytest.raises(BadRequest, match=message):
            verb([path, "tokenizer=byte", *asked, *words])


def test_the_verb_runs_within_a_limit(path, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for verb, words in ((generate_verb.run, ["prompt=def", "max_tokens=8"]), (evaluate.run, ["text=LICENSE"])):
        assert verb([path, "tokenizer=byte", *words]) == 0
        whole = capsys.readouterr().out
        assert verb([path, "tokenizer=byte", *words, "memory.max_gib=0.5"]) == 0
        assert capsys.readouterr().out == whole and list((tmp_path / ".cache/sparing/experts").iterdir())


def test_a_server_runs_within_a_limit_and_says_what_the_whole_model_says(path, tmp_path, monkeypatch, capsys):
    uvicorn, testclient = pytest.importorskip("uvicorn"), pytest.importorskip("starlette.testclient")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    answers = []

    def ask(server, sockets):
        socket.create_connection(sockets[0].getsockname(), timeout=5).close()
        client = testclient.TestClient(server.config.app)
        body = {"model": "hf", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        answers.append(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    monkeypatch.setattr(uvicorn.Server, "run", ask)
    words = [path, "tokenizer=byte", "port=0", "slots=2", "context=40"]
    assert serve.run(words) == serve.run([*words, "memory.max_gib=0.015", "weights=fp32"]) == 0
    assert answers[0] == answers[1] != ""
    with pytest.raises(BadRequest, match="memory.max_gib=0.015: must be at least .* keys and values"):
        serve.run([*words, "memory.max_gib=0.015", "slots=1000"])
