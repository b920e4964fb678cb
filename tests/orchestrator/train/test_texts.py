"""Files into documents: formats, places, and what is no text."""

import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.cluster.preflight import check_data
from orchestrator.config import Config, TrainConfig
from orchestrator.errors import BadRequest
from orchestrator.train import storage, texts, tokens
from orchestrator.train.progress import Progress
from tests.orchestrator.train.corpora import config_for, documents_of, make_texts, prepare


def test_the_same_texts_in_three_formats_make_the_same_documents(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = make_texts()
    (folder / "all.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n\n" for text in texts))
    parquet.write_table(pyarrow.table({"body": texts, "n": range(len(texts))}), folder / "all.parquet")
    plain = prepare(config_for(folder))
    for pattern in ("all.jsonl", "all.parquet"):
        other = prepare(config_for(folder, pattern, text_key="body"))
        assert other.baselines["bigram"] == plain.baselines["bigram"]
        for split in tokens.SPLITS:
            assert sorted(documents_of(other.sources[0][split])) == sorted(documents_of(plain.sources[0][split]))


BAD_FILES = {
    "nothing matches": ("no*.txt", "", r"matches no file; give"),
    "only empty files": ("empty.txt", "", r"has too little text"),
    "a torn line": ("torn.jsonl", '{"text": "a"}\n{"text": ', r"torn\.jsonl:2: is not JSON"),
    "no such field": ("field.jsonl", '{"body": "a"}\n', r"field\.jsonl:1: has no text under data\.text_key=text.*body"),
    "no text in it": ("none.jsonl", '{"text": null, "body": "a"}\n',
                      r"none\.jsonl:1: holds None under data\.text_key=text, which is no text; name .*'body'"),
    "no object": ("list.jsonl", "[1]\n", r"list\.jsonl:1: has no text"),
    "no Parquet": ("bad.parquet", "PAR1 but no", r"bad\.parquet: is not readable Parquet"),
    "a folder": ("", "", r"is a folder; name its files, as in '.*\*\*/\*\.txt'"),
    "what is no text": ("a.txt.gz", "\x1f\x8b\x08\0", r"a\.txt\.gz: is no text, it holds zero bytes; unpack what"),
    "another encoding": ("utf16.txt", "a\0b\0", r"utf16\.txt: is no text"),
    "too short": ("short.txt", "ab", r"train\.seq_len=16: the train split of .* has only"),
}


@pytest.mark.parametrize("name, content", [
    ("a.txt", b"one"), ("a.jsonl", b'{"text": "one"}'), ("b.jsonl", b'\n{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}')])
def test_the_mark_before_utf8_is_no_text(name, content, tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(mark + content)
        assert [*texts.documents(str(tmp_path / name), "text")] == ["one", "\ufefftwo"][: 1 + content.count(b"two")]


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_data_that_cannot_be_used_is_refused_by_name(tmp_path, name, content, message):
    if content or "." in name.replace("*.", ""):
        (tmp_path / name).write_text(content)
    with pytest.raises(BadRequest, match=message):
        prepare(config_for(tmp_path, name))


def test_bytes_that_are_not_utf8_are_read_and_every_run_on_them_is_told(folder):
    assert prepare(config_for(folder)).notice is None
    (folder / "050.txt").write_bytes("na\u00efve caf\u00e9 ".encode("latin-1") * 20)
    (folder / "060.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "plain"}\n')
    config = config_for(folder, path=f"{folder}/*.txt,{folder}/*.jsonl")
    corpus = prepare(config)
    assert corpus.notice == (f"warning: data.path={config.path}: 2 files are not UTF-8 ({folder}/050.txt, ...): stray "
                             "bytes are read as U+FFFD; convert to UTF-8 (iconv), or leave out")
    found = documents_of(corpus.sources[0]["train"]) + documents_of(corpus.sources[0]["validation"])
    assert "na\ufffdve caf\ufffd " * 20 in found and "caf\ufffd" in found and len(found) == 43
    said = []
    for _ in range(2):  # the second from the cache
        progress = Progress(said.append)
        check_data(Config(data=config, train=TrainConfig(seq_len=16)), progress, here=True)
        progress.show({"phase": "step", "notices": [corpus.notice]})
    assert [line for line in said if "warning" in line] == [corpus.notice] * 2
    assert "1 file is not UTF-8 (a)" in texts.not_utf8("file=a", 1, "a")


def test_a_column_that_is_not_there_or_no_text_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(BadRequest, match=r"has no column data\.text_key=text; its columns are \['body'\]"):
        prepare(config_for(tmp_path, "a.parquet"))
    parquet.write_table(pyarrow.table({"body": ["x"], "text": [5]}), tmp_path / "b.parquet")
    with pytest.raises(BadRequest, match=r"b\.parquet: holds 5 under data\.text_key=text, which is no text; name"):
        prepare(config_for(tmp_path, "b.parquet"))


def test_any_fsspec_place_and_several_globs_will_do(folder):
    storage.write_bytes(f"memory://{folder.name}/a.txt", b"in memory " * 20)
    corpus = prepare(config_for(folder, path=f"{folder}/00*.txt, memory://{folder.name}/*.txt"))
    found = documents_of(corpus.sources[0]["train"]) + documents_of(corpus.sources[0]["validation"])
    assert len(found) == 11 and "in memory " * 20 in found


def test_what_replaces_an_object_of_the_same_size_is_read(folder):
    url = f"memory://{folder.name}/a.txt"
    for content in (b"first  ", b"second "):
        storage.write_bytes(url, content * 40)
        corpus = prepare(config_for(folder, path=url))
        assert documents_of(corpus.sources[0]["train"])[0].startswith(content.decode())


def test_files_of_an_object_store_are_known_by_a_listing_and_not_asked_for_one_by_one(folder, monkeypatch):
    """Every rank of a run looks at them whenever it starts."""
    for i in range(30):
        storage.write_bytes(f"memory://{folder.name}/{i}.txt", f"text {i} ".encode() * 20)
    config, asked, info = config_for(folder, path=f"memory://{folder.name}/*.txt"), [], MemoryFileSystem.info
    built = tokens.build_index(config)
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *words, **named: asked.append(words) or info(*words, **named))
    assert tokens.build_index(config) == built and len(asked) < 5


def test_stdlib_is_the_source_of_this_python_without_its_tests():
    files = texts.find_files("stdlib")
    assert len(files) > 300 and any(file.endswith("/argparse.py") for file in files)
    assert not any("/test/" in file or "site-packages" in file for file in files)


def test_one_folder_of_the_library_is_a_corpus_too():
    found = texts.find_files("stdlib:encodings")
    assert set(found) < set(texts.find_files("stdlib")) and any(file.endswith("cp1252.py") for file in found)
    with pytest.raises(BadRequest, match="data.path=stdlib:nothing: the library has no folder of that name"):
        texts.find_files("stdlib:nothing")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\r"])
def test_json_lines_end_in_a_newline_and_nothing_else(tmp_path, end):
    text = f"one{end}text"
    lines = [json.dumps({"text": text}, ensure_ascii=end == "\r"), '{"text": "b"}']
    (tmp_path / "t.jsonl").write_bytes("\r\n".join(lines).encode())
    assert list(texts.documents(str(tmp_path / "t.jsonl"), "text")) == [text, "b"]


def test_tokenising_a_large_file_is_progress_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "TELL_CHARACTERS", 100)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x" * 60}) + "\n" for _ in range(20)))
    told, size = [], (tmp_path / "t.jsonl").stat().st_size
    list(tokens._read({str(tmp_path / "t.jsonl"): size}, "text", lambda done, total: told.append((done, total))))
    assert len(told) > 5 and [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (size, size)
