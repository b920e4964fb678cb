"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json."""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.errors import BadRequest, NotFit

BYTE_EOS = 256
DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""Of GPT-2 and Qwen, Llama and Mixtral, Gemma, Llama 3, DeepSeek."""
ABOUT = {"tokenizer_config.json": "eos_token", "generation_config.json": "eos_token_id", "config.json": "eos_token_id"}
"""Files beside a tokenizer.json, and what each calls the token that ends a text."""
TEMPLATE = "chat_template.jinja"
PRIMED = 64
"""Tokens of a prompt that a reader is told, so that it knows whether a word has begun."""
HELD = 4
"""Tokens that a reader holds back at most: a character has no more bytes."""
REPLACED = "\ufffd"
"""What stands for bytes that are no text, or not yet."""


@dataclass(frozen=True)
class Tokenizer:
    """`identity` changes with anything that would change the ids. `eos` ends a document; where the file names no such
    token (`has_eos`), it is one behind its last."""

    identity: str
    vocab_size: int
    eos: int
    encode: Callable[[str], np.ndarray]
    stream: Callable[..., Callable[[int | None], str]]
    """A new reader of one sequence, given the ids before it, if any: called with each id in turn, it returns the text
    that has become whole; called with None, the text that is left."""
    ends: frozenset[int]
    """What ends a text that a model says: `eos`, and others that its files name."""
    has_eos: bool = True
    begin: tuple[int, ...] = ()
    """What a model trained elsewhere read before each text; `encode` leaves it out."""
    specials: Mapping[str, int] = field(default_factory=dict)
    """Ids of the special tokens, which no reader tells, by their texts."""
    template: str = ""
    """Of a conversation, in Jinja; empty where the files have none."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Texts of tokens by what a template calls them: `bos_token`, ..."""


def load_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """`byte`: ids are bytes, 256 ends a document. Else a Hugging Face tokenizer.json; what begins and ends a text is
    said by the files beside it, or known by name. `key` is what an error names."""
    if name == "byte":
        return Tokenizer("byte", 257, BYTE_EOS, lambda text: np.frombuffer(text.encode(), dtype=np.uint8), _bytes_read,
                         frozenset([BYTE_EOS]))
    name = os.path.expanduser(name)
    if not os.path.isfile(name):
        raise BadRequest(f"{key}={name}: no such file; give a tokenizer.json, or byte")
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise NotFit(f"{key}={name}: needs the package tokenizers; pip install 'tokenizers>=0.22'") from None
    try:
        text = Path(name).read_text(encoding="utf-8")
        loaded = HFTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BadRequest(f"{key}={name}: cannot be read ({error}); give a Hugging Face tokenizer.json") from None
    loaded.no_truncation()  # which a file keeps from the last call of whoever saved it
    loaded.no_padding()
    about = {file: _read_object(Path(name).with_name(file)) for file in ABOUT}
    named = [id for file, called in ABOUT.items() for id in _ids(about[file].get(called), loaded)]
    known = (id for end in DOCUMENT_ENDS if (id := loaded.token_to_id(end)) is not None)
    eos, vocab_size = next(iter(named), next(known, None)), loaded.get_vocab_size()
    has_eos = eos is not None
    if not has_eos:
        eos, vocab_size = vocab_size, vocab_size + 1
    specials = {one.content: id for id, one in loaded.get_added_tokens_decoder().items() if one.special}
    silent = {eos, *specials.values()}

    def encode(text: str) -> np.ndarray:
        text.encode()  # as `byte` does, with the same error where the text is none
        return np.asarray(loaded.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def tells(token: int) -> bool:
        return token not in silent and loaded.id_to_token(token) is not None

    config = about["tokenizer_config.json"]
    names = {key: said for key, value in config.items() if key.endswith("_token") and isinstance(
        said := _said(value), str)}
    return Tokenizer(hashlib.sha256(f"{text} {eos}".encode()).hexdigest(), vocab_size, eos, encode,
                     lambda before=(): _Reader(loaded.decode, tells, before), frozenset([eos, *named]), has_eos,
                     begin=_begin(loaded, config), specials=specials, names=names,
                     template=_template(Path(name).with_name(TEMPLATE), config))


def begun(tokenizer: Tokenizer, text: str, begin: Sequence[int]) -> list[int]:
    """A text's ids behind `begin`, which is not said twice."""
    ids = tokenizer.encode(text).tolist()
    return ids if ids[: len(begin)] == list(begin) else [*begin, *ids]


def _read_object(file: Path) -> dict:
    """Empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(token: object) -> object:
    """Hugging Face's files give a token as its text, as an object with that, or as an id."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(tokens: object, loaded) -> list[int]:
    """Of a token or of several, those that there are."""
    found = map(_said, tokens if isinstance(tokens, list) else [tokens])
    found = [loaded.token_to_id(one) if isinstance(one, str) else one for one in found]
    return [one for one in found if type(one) is int and one in range(1 << 32) and loaded.id_to_token(one) is not None]


def _begin(loaded, config: dict) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text or, as DeepSeek's leaves that to the library, what it is told to."""
    found = loaded.encode("a")
    if 0 in found.special_tokens_mask and (begin := found.ids[: found.special_tokens_mask.index(0)]):
        return tuple(begin)
    return tuple(_ids(config.get("bos_token"), loaded)) if config.get("add_bos_token") is True else ()


def _template(file: Path, config: dict) -> str:
    """A file of its own counts before tokenizer_config.json, which may name several."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else ""


class _Reader:
    """One sequence's text. A token's may depend on those before it, for a blank or a character's first bytes, and on
    those after it, for its last: what is decoded each time are the tokens told last and those `held` since."""

    def __init__(self, decode: Callable[[list[int]], str], tells: Callable[[int], bool], before: Sequence[int]):
        self.decode, self.tells = decode, tells
        primed = [token for token in before[-PRIMED:] if tells(token)]
        whole = next((n for n in range(HELD) if not decode(primed[n:]).startswith(REPLACED)), 0)
        self.ids, self.held, self.told = primed[whole:], 0, decode(primed[whole:])

    def __call__(self, token: int | None) -> str:
        if token is not None:
            if not self.tells(token):
                return ""
            self.ids.append(token)
            self.held += 1
        text = self.decode(self.ids)
        is_cut = token is not None and text.endswith(REPLACED)
        if (is_cut or text == self.told) and self.held <= HELD:
            return ""
        new = text[: len(text) - is_cut]  # what a token ends with may yet become a character
        new = new[len(os.path.commonprefix([self.told, new])) :]
        self.ids, self.held = self.ids[len(self.ids) - self.held :], 0
        told = self.decode(self.ids)
        self.told = told[: len(told) - (is_cut and told.endswith(REPLACED))]
        return new


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers say the same of a text with a bit of everything, and end it alike."""
    probe = "def f(x):\n    return 'The quick brown fox' + str(x * 2048)  # h\u00e9llo \u6f22\u5b57 \U0001f600"
    return one.eos == other.eos and one.encode(probe).tolist() == other.encode(probe).tolist()


def bytes_as_files() -> dict[str, str]:
    """The tokenizer `byte` in Hugging Face's form: file names and their texts."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes: these for themselves
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    end = {"id": BYTE_EOS, "content": DOCUMENT_ENDS[0], "special": True, "normalized": False, "single_word": False,
           "lstrip": False, "rstrip": False}
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
             "pre_tokenizer": by_byte, "post_processor": None, "decoder": by_byte, "model": model}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": DOCUMENT_ENDS[0],
             "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False), "tokenizer_config.json": json.dumps(about),
            "generation_config.json": json.dumps({"eos_token_id": BYTE_EOS})}


def _bytes_read(before: Sequence[int] = ()) -> Callable[[int | None], str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(token: int | None) -> str:
        if token is None:
            return decoder.decode(b"", final=True)
        return decoder.decode(bytes([token])) if token < BYTE_EOS else ""

    return read
