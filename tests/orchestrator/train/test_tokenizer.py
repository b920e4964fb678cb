"""Hugging Face tokenizers as models come with them: what ends a text, what a file keeps of its last use, streams."""

import json

import numpy as np
import pytest

from orchestrator.errors import BadRequest
from orchestrator.train.tokenizer import BYTE_EOS, bytes_as_files, load_tokenizer, same_ids

tokenizers = pytest.importorskip("tokenizers")
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def byte_level(*special: str):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["some words of which some are said twice"] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(special), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made


@pytest.fixture
def sentencepiece(tmp_path):
    """As Llama's and Mixtral's: words begin with a blank's mark, which decoding strips once, and bytes stand in."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ("\u2581", *"Helloworld"):
        vocabulary.setdefault(piece, len(vocabulary))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    made.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", {"eos_token": "<stop>"}), ("tokenizer_config.json", {"eos_token": {"content": "<stop>"}}),
    ("generation_config.json", {"eos_token_id": [1, 0]}), ("config.json", {"eos_token_id": 1}), (None, None)])
def test_the_token_that_ends_a_text_is_that_of_the_files_beside_or_known_by_name(tmp_path, file, content):
    byte_level("<x>", "<stop>" if file else DEEPSEEK_END).save(str(tmp_path / "tokenizer.json"))
    if file:
        (tmp_path / file).write_text(json.dumps(content))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert found.eos == 1 and found.has_eos and found.vocab_size == 258 + 22


def test_without_one_an_id_of_our_own_ends_a_text(tmp_path):
    byte_level("<x>").save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert not found.has_eos and found.eos == 280 and found.vocab_size == 281


def test_truncation_and_padding_that_a_file_was_saved_with_mean_nothing(tmp_path):
    made = byte_level("</s>")
    made.save(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=32)
    made.save(str(tmp_path / "used.json"))
    plain, used = (load_tokenizer(str(tmp_path / name)) for name in ("tokenizer.json", "used.json"))
    assert same_ids(plain, used) and len(plain.encode("some words of some length")) > 4


def test_a_word_after_the_prompt_keeps_the_blank_before_it(sentencepiece):
    prompt, whole = (sentencepiece.encode(text).tolist() for text in ("Hello", "Hello world"))
    read = sentencepiece.stream(prompt)
    assert "".join(read(token) for token in whole[len(prompt):]) == " world"
    alone = sentencepiece.stream()
    assert "".join(alone(token) for token in whole) == "Hello world"


def test_bytes_that_are_no_text_do_not_end_a_stream(sentencepiece):
    draw = np.random.default_rng(0)
    for _ in range(50):
        read = sentencepiece.stream()
        for token in draw.integers(0, sentencepiece.vocab_size, 200).tolist():
            assert isinstance(read(token), str)
        said = "".join(read(token) for token in sentencepiece.encode("Hello world").tolist())
        assert said.endswith("Hello world")


def test_half_of_a_surrogate_pair_is_the_error_that_bytes_raise(sentencepiece):
    for tokenizer in (sentencepiece, load_tokenizer("byte")):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("\udcff")


def test_bytes_in_hugging_faces_form_are_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, text in bytes_as_files().items():
        (tmp_path / name).write_text(text)
    ours, theirs = load_tokenizer("byte"), load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert theirs.eos == BYTE_EOS and theirs.vocab_size == 257 and same_ids(ours, theirs)
    text = "".join(map(chr, np.random.default_rng(0).integers(0, 0xD800, 500))) + "\r\n\t\0 \U0001f600  end"
    assert theirs.encode(text).tolist() == list(text.encode())
    read = theirs.stream()
    assert "".join(map(read, text.encode())) == text
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == BYTE_EOS
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == list(text.encode())


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"version": "caf\xe9"}')
    with pytest.raises(BadRequest, match="tokenizer.json: cannot be read .*; give a Hugging Face tokenizer.json"):
        load_tokenizer(str(path))
