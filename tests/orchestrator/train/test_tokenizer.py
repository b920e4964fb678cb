"""Hugging Face tokenizers as models come with them: what begins and ends a text, what a file keeps of its last use,
streams."""

import json

import numpy as np
import pytest

from orchestrator.errors import BadRequest
from orchestrator.inference import TextStream
from orchestrator.train.tokenizer import (
    BYTE_EOS,
    HELD,
    PRIMED,
    REPLACED,
    _Reader,
    begun,
    bytes_as_files,
    load_tokenizer,
    same_ids,
)

tokenizers = pytest.importorskip("tokenizers")
TEXT = "h\u00e9llo \u6f22\u5b57 \U0001f600\U0001f3fd, some words \u2026 \ufffd"
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def byte_level(*special: str):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["some words of which some are said twice"] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(special), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made


def sentencepiece_like():
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
    return made


@pytest.fixture
def sentencepiece(tmp_path):
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


def streamed(tokenizer, ids: list[int], before: list[int] = ()) -> str:
    read = tokenizer.stream(before)
    return "".join(map(read, [*ids, None]))


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", {"eos_token": "<stop>"}), ("tokenizer_config.json", {"eos_token": {"content": "<stop>"}}),
    ("generation_config.json", {"eos_token_id": [1, 0]}), ("config.json", {"eos_token_id": 1}), (None, None)])
def test_the_token_that_ends_a_text_is_that_of_the_files_beside_or_known_by_name(tmp_path, file, content):
    byte_level("<x>", "<stop>" if file else DEEPSEEK_END).save(str(tmp_path / "tokenizer.json"))
    if file:
        (tmp_path / file).write_text(json.dumps(content))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert found.eos == 1 and found.has_eos and found.vocab_size == 258 + 22


def test_all_that_the_files_name_ends_an_answer_and_the_first_of_it_a_document(tmp_path):
    byte_level("<end>", "<turn>", "<call>", "<x>").save(str(tmp_path / "tokenizer.json"))
    for file, content in (("tokenizer_config.json", {"eos_token": "<turn>"}), ("config.json", {"eos_token_id": 2}),
                          ("generation_config.json", {"eos_token_id": [1, 0, 999]})):
        (tmp_path / file).write_text(json.dumps(content))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (found.eos, found.ends) == (1, {0, 1, 2})
    for end in found.ends:
        stream = TextStream(found)
        assert "".join(map(stream.push, [*found.encode("some").tolist(), end, 50])) == "some" and stream.stopped


def test_a_stop_text_that_is_a_special_tokens_stops_at_the_token(tmp_path):
    byte_level("</s>", "<turn>", "<x>").save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (found.ends, found.specials) == ({0}, {"</s>": 0, "<turn>": 1, "<x>": 2})
    for token, is_stop in (1, True), (2, False):
        stream = TextStream(found, ["<turn>", "me w"])
        said = [stream.push(one) for one in [*found.encode("some").tolist(), token, *found.encode(" more").tolist()]]
        assert "".join(said) == ("some" if is_stop else "some more") and stream.stopped is is_stop


@pytest.mark.parametrize("ahead, behind, config, expected", [
    ("<s>", "", {}, [0]), ("<s>", " </s>", {}, [0]), ("<x> <s>", "", {}, [2, 0]), ("", " </s>", {}, []),
    ("", "", {}, []),
    ("", "", {"add_bos_token": True, "bos_token": {"content": "<s>"}}, [0]),
    ("", "", {"add_bos_token": False, "bos_token": "<s>"}, []), ("", "", {"add_bos_token": True}, [])])
def test_what_is_put_before_a_text_is_that_of_the_tokenizer_or_what_its_config_says_to_add(tmp_path, ahead, behind,
                                                                                           config, expected):
    made = byte_level("<s>", "</s>", "<x>")
    if ahead or behind:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{ahead} $A{behind}".strip(), special_tokens=[("<s>", 0), ("</s>", 1), ("<x>", 2)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found, text = load_tokenizer(str(tmp_path / "tokenizer.json")), "some words"
    assert list(found.begin) == expected and not set(found.encode(text)) & {0, 1, 2}, "but in training nothing is"
    ids = begun(found, text, found.begin)
    if not config:
        assert ids == made.encode(text).ids[: len(ids)]
    assert begun(found, "".join(map(made.id_to_token, expected)) + text, found.begin) == ids, "nor is it put twice"
    assert streamed(found, found.encode(text).tolist(), found.begin) == text


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


@pytest.mark.parametrize("build", [lambda: byte_level("</s>"), sentencepiece_like])
@pytest.mark.parametrize("prompt", ["", "Hello", "tail \ufffd", "\u6f22" * 40, "</s>"], ids=ascii)
def test_a_stream_says_what_decoding_all_of_it_says(tmp_path, build, prompt):
    """Wherever it ends; but where bytes stand in, half a character has decoding take back whole ones before it."""
    made = build()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    before, said = tokenizer.encode(prompt).tolist(), made.decode(tokenizer.encode(prompt).tolist())
    for text in TEXT, TEXT[:-1], " " + TEXT, "":
        ids = tokenizer.encode(prompt + text).tolist()[len(before) :]
        for cut in range(len(ids) + 1):
            expected = made.decode(before + ids[:cut])
            if build is not sentencepiece_like or cut == len(ids) or not expected.endswith(REPLACED):
                assert said + streamed(tokenizer, ids[:cut], before) == expected


def test_a_stream_of_any_tokens_says_what_decoding_all_of_them_says(tmp_path):
    """Where bytes are tokens of their own, those that begin no character: one that is whole is told, and decoding would
    take it back where a byte that is no text comes next to it."""
    draw = np.random.default_rng(0)
    for name, made in ("a.json", byte_level("</s>")), ("b.json", sentencepiece_like()):
        made.save(str(tmp_path / name))
        tokenizer = load_tokenizer(str(tmp_path / name))
        kinds = [i for i in range(tokenizer.vocab_size) if i != tokenizer.eos and (
            name == "a.json" or i not in range(3, 3 + 256) or 0x80 <= i - 3 < 0xC0)]
        for _ in range(200):
            ids = draw.choice(kinds, 40).tolist()
            assert streamed(tokenizer, ids) == made.decode(ids)


def test_a_character_that_the_prompt_cuts_is_told_once_it_is_whole_and_the_prompts_end_never(tmp_path):
    byte_level("</s>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    *before, last = tokenizer.encode("abc \u6f22").tolist()
    assert streamed(tokenizer, [last, *tokenizer.encode(" next")], before) == "\u6f22 next"
    assert streamed(tokenizer, tokenizer.encode(" next").tolist(), before) == " next"


def test_what_an_answer_ends_with_is_told_though_it_is_cut(tmp_path):
    byte_level("</s>").save(str(tmp_path / "tokenizer.json"))
    for tokenizer in load_tokenizer(str(tmp_path / "tokenizer.json")), load_tokenizer("byte"):
        ids = tokenizer.encode("abc \u6f22").tolist()[:-1]
        for end in [], [tokenizer.eos]:
            stream = TextStream(tokenizer, ["c x"])
            assert "".join(map(stream.push, [*ids, *end])) + stream.finish() == "abc \ufffd"
        stream = TextStream(tokenizer, ["\ufffd"])
        assert "".join(map(stream.push, ids)) + stream.finish() == "abc " and stream.stopped


@pytest.mark.parametrize("ids", [[0xA2] * 2000, [*"\u6f22".encode()] * 700, [0xF0] * 2000], ids=["no", "all", "half"])
def test_what_is_no_text_is_told_in_time_and_costs_no_more_than_text(ids):
    """Per token, decoded are what was told last and what is held back, at most; to begin with the prompt's end."""
    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return bytes(ids).decode("utf-8", "replace")

    decoded, said = [], ""
    read = _Reader(decode, lambda token: True, ids)
    for number, token in enumerate(ids):
        said += read(token)
        assert len(said) >= len(bytes(ids[: max(0, number - HELD)]).decode("utf-8", "replace")) - 1
    assert said + read(None) == bytes(ids).decode("utf-8", "replace")
    assert max(decoded) <= PRIMED + HELD + 1 and sum(decoded) <= len(ids) * 2 * (HELD + 1) + 20 * PRIMED


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
