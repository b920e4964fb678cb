"""Tokens and their order: built once, checked, the same under every layout."""

import errno
import fcntl
import gzip
import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from model.config import ModelConfig
from orchestrator.config import Config, DataConfig, DataKind, TrainConfig
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, PeerLost
from orchestrator.plan.layout import batch_size_at, check_run
from orchestrator.train import data, tokens
from orchestrator.train.control import Control
from tests.orchestrator.train.corpora import config_for, documents_of, make_texts, prepare

ROOT = Path(__file__).parents[3]


def test_a_step_sees_the_same_samples_under_every_data_parallel_degree(folder):
    corpus = prepare(config_for(folder))

    def step(index: int, dp: int, seed: int = 3) -> np.ndarray:
        share = 8 // dp
        firsts = range(index * 8, index * 8 + 8, share)
        return np.concatenate([data.batch(corpus, seed=seed, first_sample=first, num=share, seq_len=16, n_extra=2)
                               for first in firsts])

    for index in (7, 0, 2):
        assert step(index, 1).shape == (8, 18)
        for dp in (2, 4, 8):
            assert (step(index, dp) == step(index, 1)).all()
    assert (step(7, 1, seed=4) != step(7, 1)).any()


def test_each_epoch_is_another_permutation():
    order = data.sample_order((101,), (1.0,), 5)
    epochs = [[int(order[i][1]) for i in range(e * 101, (e + 1) * 101)] for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(101))


@pytest.fixture
def mixed(tmp_path) -> DataConfig:
    """Two sources, of digits and of capitals, the second a tenth of the first, of which 3 sequences in 4 shall be."""
    chance = random.Random(0)
    for name, letters, number in (("digits", "0123456789", 40), ("capitals", "ABCDEFGH", 4)):
        (tmp_path / name).mkdir()
        for i in range(number):
            (tmp_path / name / f"{i}.txt").write_text("".join(chance.choices(letters, k=300)))
    return config_for(tmp_path, path=f"{tmp_path}/digits/*.txt, {tmp_path}/capitals/*.txt", weights=[1, 3])


def test_sources_are_mixed_by_their_weights_in_training_and_validation(mixed):
    corpus = prepare(mixed)
    sizes = [(source["train"].num_tokens - 2) // 16 for source in corpus.sources]
    assert corpus.weights == (0.25, 0.75) and sizes[0] > 5 * sizes[1]

    def is_capitals(rows: np.ndarray) -> np.ndarray:
        return (rows[:, :16].clip(max=127) >= ord("A")).sum(1) > 8

    rows = data.batch(corpus, seed=1, first_sample=0, num=4 * sizes[1], seq_len=16, n_extra=2)
    capitals = is_capitals(rows)
    assert capitals.sum() == 3 * sizes[1] and 10 <= capitals[: 4 * sizes[1] // 3].sum() <= 4 * sizes[1] // 3 - 5
    for epoch in range(3):  # each of a source's own
        seen = rows[capitals][epoch * sizes[1] : (epoch + 1) * sizes[1]]
        assert len(np.unique(seen, axis=0)) == sizes[1]
    one = np.concatenate([data.batch(corpus, seed=1, first_sample=i, num=1, seq_len=16, n_extra=2) for i in (7, 5)])
    assert (one == rows[[7, 5]]).all()
    held_out = data.validation_batch(corpus, range(8), 8, 16, 2)
    assert is_capitals(held_out).tolist() == [False] * 2 + [True] * 6
    assert (data.validation_batch(corpus, range(1, 5), 8, 16, 2) == held_out[1:5]).all()
    alone = [prepare(replace(mixed, path=mixed.path.split(", ")[part], weights=[])) for part in (0, 1)]
    for name, bits in corpus.baselines.items():
        assert min(each.baselines[name] for each in alone) < bits < max(each.baselines[name] for each in alone)
    assert len({corpus.digest, prepare(replace(mixed, weights=[1, 2])).digest, alone[0].digest}) == 3
    assert prepare(replace(mixed, weights=[2, 6])).digest == corpus.digest, "shares count"


def test_sources_that_are_mixed_are_tokenised_each_by_itself_once(mixed, monkeypatch):
    prepare(mixed)
    monkeypatch.setattr(tokens, "_build", None)  # would be called
    assert prepare(replace(mixed, weights=[5, 1])).weights == (5 / 6, 1 / 6)
    assert len(prepare(replace(mixed, path=mixed.path.split(", ")[0], weights=[])).sources) == 1


def test_a_comma_too_many_makes_no_source(mixed):
    """As without weights."""
    found = replace(mixed, path=f" ,{mixed.path.replace(',', ' ,,')},")
    check_run(replace(Config(), data=found))
    assert prepare(found).digest == prepare(mixed).digest


def test_a_source_that_is_too_small_is_named(mixed):
    with pytest.raises(BadRequest, match="the train split of data.path=.*capitals/.* has only 903 tokens"):
        prepare(mixed, seq_len=1000)


def test_concurrent_processes_build_the_shards_once(folder):
    program = ("import sys, json\nfrom orchestrator.config import DataConfig\nfrom orchestrator.train import tokens\n"
               "calls = []\nplace = tokens.build_index(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2], "
               "validation_fraction=0.2), lambda done, total: calls.append(done) if done else None)\n"
               "print(json.dumps([len(calls), str(place), len(tokens.read_index(place)['shards'])]))")
    processes = [subprocess.Popen([sys.executable, "-c", program, f"{folder}/*.txt", str(folder / "cache")], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True) for _ in range(4)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(calls > 0 for calls, _, _ in results) == [False, False, False, True]
    assert len({place for _, place, _ in results}) == 1
    assert not [path for path in (folder / "cache").iterdir() if path.name.startswith(".")]


def test_damage_is_found_and_named(folder):
    place = tokens.build_index(config_for(folder))
    shard, stream = place / "train-00000.bin", prepare(config_for(folder)).sources[0]["train"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for found in (stream, prepare(config_for(folder)).sources[0]["train"]):  # altered behind its back, and before
        with pytest.raises(NotTrustworthy, match=r"train-00000\.bin: its content is not what was written; delete"):
            found.read(45, 10)
    shard.write_bytes(whole[:-2])
    with pytest.raises(NotTrustworthy, match=r"train-00000\.bin: has \d+ bytes, the index says \d+; delete"):
        prepare(config_for(folder))
    shard.write_bytes(whole)
    assert len(stream.read(0, stream.num_tokens)) == stream.num_tokens
    sums = place / "train-00000.crc"
    checks = sums.read_bytes()
    sums.write_bytes(checks[:-4])
    with pytest.raises(NotTrustworthy, match=r"train-00000\.crc: has \d+ bytes, the index says \d+; delete"):
        tokens.read_index(place)
    sums.write_bytes(checks)
    index = place / "index.json"
    index.write_text(index.read_text().replace('"eos": 256', '"eos": 255'))
    with pytest.raises(NotTrustworthy, match=r"index\.json: is damaged; delete"):
        tokens.read_index(place)


def test_a_flipped_bit_anywhere_in_a_shard_is_found_by_what_reads_there_and_by_nothing_else(folder, monkeypatch):
    """Shards of several blocks, whose documents and reads go across their ends."""
    monkeypatch.setattr(tokens, "BLOCK_BYTES", 64)
    monkeypatch.setattr(data, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(data, "OPEN_SHARDS", 2)
    stream, chance = prepare(config_for(folder)).sources[0]["train"], random.Random(1)
    whole = stream.read(0, stream.num_tokens)
    assert len(stream.files) > 2 and min(len(stream.mapped(file)[1]) for file in stream.files) > 1
    starts = [0, *stream.ends]
    for _ in range(200):
        shard = chance.randrange(len(stream.files))
        file, size = stream.files[shard], 2 * stream.sizes[shard]
        byte, at = chance.randrange(size), chance.randrange(stream.num_tokens - 40)
        before = file.read_bytes()
        with open(file, "r+b") as altered:
            altered.seek(byte)
            altered.write(bytes([before[byte] ^ 1 << chance.randrange(8)]))
        first, last = (int(starts[shard]) + min(edge, size) // 2 for edge in (byte // 64 * 64, byte // 64 * 64 + 64))
        if at < last and at + 40 > first:
            with pytest.raises(NotTrustworthy, match=f"{file.name}: its content is not what was written"):
                stream.read(at, 40)
        else:
            assert (stream.read(at, 40) == whole[at : at + 40]).all()
        with pytest.raises(NotTrustworthy, match=file.name):
            stream.read(int(starts[shard]) + byte // 2, 1)
        file.write_bytes(before)


@pytest.mark.parametrize("number, fraction", [(1, 0.2), (2, 0.2), (3, 0.2), (40, 0.2), (3, 0.0), (3, 0.999)])
def test_the_splits_are_disjoint_and_whole_however_few_the_documents(tmp_path, number, fraction):
    texts = make_texts(number)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = prepare(config_for(tmp_path, validation_fraction=fraction), seq_len=4)
    train, held_out = (documents_of(corpus.sources[0][split]) for split in tokens.SPLITS)
    assert train and held_out
    if number == 1:
        assert train[0] + held_out[0] == texts[0] and len(held_out[0]) < len(train[0])
    else:
        assert sorted(train + held_out) == sorted(texts)


def test_the_baselines_are_what_an_independent_computation_says(folder):
    corpus = prepare(config_for(folder))
    train, held_out = ([text.encode() for text in documents_of(corpus.sources[0][split])] for split in tokens.SPLITS)
    pairs = Counter(pair for text in train for pair in zip([256, *text], text, strict=False))
    before = Counter(first for first, _ in pairs.elements())
    after = Counter(second for _, second in pairs.elements())
    size = sum(map(len, held_out))

    def bits(weight: float) -> float:
        total = 0.0
        for text in held_out:
            for first, second in zip([256, *text], text, strict=False):
                single = (after[second] + 1) / (sum(after.values()) + 256)
                total -= math.log2((pairs[first, second] + weight * single) / (before[first] + weight))
        return total / size

    assert corpus.baselines["bigram"] == pytest.approx(min(map(bits, (0.1, 1, 3, 10, 30, 100))), rel=1e-9)
    assert corpus.baselines["gzip"] == pytest.approx(8 * len(gzip.compress(b"".join(held_out), 9)) / size, rel=0.01)
    assert corpus.bytes_per_token == pytest.approx(size / (size + len(held_out)))


def test_the_ramp_grows_in_whole_starts_and_samples_add_up():
    train = TrainConfig(batch_size=64, batch_start=16, batch_ramp_steps=9)
    sizes = [batch_size_at(step, train) for step in range(12)]
    assert sizes == sorted(sizes) and sizes[0] == 16 and sizes[9:] == [64, 64, 64] and {s % 16 for s in sizes} == {0}
    for step in range(12):
        assert data.samples_before(step, train) == sum(sizes[:step])


def test_a_hugging_face_tokenizer_is_taken(folder):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(make_texts(), tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    path = str(folder / "tokenizer.json")
    made.save(path)
    corpus = prepare(config_for(folder, tokenizer=path), model=ModelConfig(vocab_size=304))
    stream = corpus.sources[0]["train"]
    ids = stream.read(0, stream.num_tokens)
    first = ids[: int(np.flatnonzero(ids == made.token_to_id("<|endoftext|>"))[0])]
    assert made.decode(first.tolist()) in make_texts() and corpus.bytes_per_token > 1
    with pytest.raises(BadRequest, match=r"model\.vocab_size=264: must hold the 300 tokens.*use model\.vocab_size=304"):
        prepare(config_for(folder, tokenizer=path))
    with pytest.raises(BadRequest, match=r"data\.tokenizer=.*nowhere: no such file"):
        prepare(config_for(folder, tokenizer=str(folder / "nowhere")))
    (folder / "broken.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"broken\.json: cannot be read"):
        prepare(config_for(folder, tokenizer=str(folder / "broken.json")))


def test_a_cache_that_cannot_be_is_named(folder):
    with pytest.raises(NotFit, match=r"000\.txt/x: cannot be made or written \(Not a directory\); choose another"):
        prepare(config_for(folder, cache_dir=str(folder / "000.txt" / "x")))


def test_only_a_change_builds_anew(folder):
    place = tokens.build_index(config_for(folder))
    assert place.stat().st_mode == place.parent.stat().st_mode, "who may read the cache may read what is in it"
    assert tokens.build_index(config_for(folder)) == place
    assert tokens.build_index(config_for(folder, validation_fraction=0.3)) != place
    (folder / "000.txt").write_text("something else")
    assert tokens.build_index(config_for(folder)) != place


def test_random_tokens_need_no_files_and_depend_on_seed_and_index_alone():
    corpus = prepare(DataConfig(kind=DataKind.random))
    rows = data.batch(corpus, seed=1, first_sample=4, num=4, seq_len=16, n_extra=2)
    assert (data.batch(corpus, seed=1, first_sample=6, num=1, seq_len=16, n_extra=2)[0] == rows[2]).all()
    assert rows.shape == (4, 18) and rows.max() < 264


def test_who_waits_for_anothers_tokens_says_so_and_can_leave(tmp_path):
    with open(tmp_path / "key.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        control = Control()
        control.must_leave = True
        with pytest.raises(PeerLost), tokens._locked(tmp_path, "key", on_wait=control.alive):
            pass


def test_tokens_are_waited_for_as_long_as_somebody_writes_them(tmp_path, monkeypatch):
    """A corpus may take days."""
    now, shard = [0.0], tmp_path / ".key-1" / "train-00000.bin"
    shard.parent.mkdir()
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))

    def wait() -> None:
        now[0] += 1000
        if now[0] < 100_000:
            shard.write_bytes(bytes(int(now[0])))

    with open(tmp_path / "key.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(NotFit, match="has written no tokens for 3600 s"), tokens._locked(tmp_path, "key", wait):
            pass
    assert 100_000 < now[0] < 110_000


def test_a_place_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(NotFit, match="data.cache_dir=.*takes no locks"), tokens._locked(tmp_path, "key", lambda: None):
        pass


def test_another_nodes_data_must_be_the_same(folder):
    store, config = dist.HashStore(), config_for(folder)
    ours, theirs = (data.Corpus(digest, 257, None, {}, None) for digest in "ab")
    data.compare_over_ranks(ours, config, 0, store, lambda: None)
    data.compare_over_ranks(ours, config, 1, store, lambda: None)
    with pytest.raises(BadRequest, match=r"data\.path=.*: the files of rank 2's node are not those of rank 0's; copy"):
        data.compare_over_ranks(theirs, config, 2, store, lambda: None)
