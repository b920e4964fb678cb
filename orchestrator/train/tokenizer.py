"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json."""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.errors import BadRequest, NotFit

BYTE_EOS = 256
DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""Of GPT-2 and Qwen, Llama and Mixtral, Gemma, Llama 3, DeepSeek."""
PRIMED = 64
"""Tokens of a prompt that a reader is told, so that it knows whether a word has begun."""


@dataclass(frozen=True)
class Tokenizer:
    """`identity` changes with anything that would change the ids. `eos` ends a document; where the file names no such
    token (`has_eos`), it is one behind its last."""

    identity: str
    vocab_size: int
    eos: int
    encode: Callable[[str], np.ndarray]
    stream: Callable[..., Callable[[int], str]]
    """A new reader of one sequence, given the ids before it, if any: called with each id in turn, it returns the text
    that has become whole."""
    has_eos: bool = True


def load_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """`byte`: ids are bytes, 256 ends a document. Else a Hugging Face tokenizer.json; what ends a document is said by
    the files beside it, or known by name. `key` is what an error names."""
    if name == "byte":
        return Tokenizer("byte", 257, BYTE_EOS, lambda text: np.frombuffer(text.encode(), dtype=np.uint8), _bytes_read)
    name = os.path.expanduser(name)
    if not os.path.isfile(name):
        raise BadRequest(f"{key}={name}: no such file; give a tokenizer.json, or byte")
    try:
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers.decoders import DecodeStream
    except ImportError:
        raise NotFit(f"{key}={name}: needs the package tokenizers; pip install 'tokenizers>=0.22'") from None
    try:
        text = Path(name).read_text(encoding="utf-8")
        loaded = HFTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BadRequest(f"{key}={name}: cannot be read ({error}); give a Hugging Face tokenizer.json") from None
    loaded.no_truncation()  # which a file keeps from the last call of whoever saved it
    loaded.no_padding()
    eos, vocab_size = _document_end(Path(name).parent, loaded), loaded.get_vocab_size()
    has_eos = eos is not None
    if not has_eos:
        eos, vocab_size = vocab_size, vocab_size + 1

    def read(before: Sequence[int] = ()) -> Callable[[int], str]:
        stream = DecodeStream(ids=list(before[-PRIMED:]), skip_special_tokens=True)

        def step(token: int) -> str:
            nonlocal stream
            if token == eos:
                return ""
            try:
                return stream.step(loaded, token) or ""
            except Exception:  # bytes that are no text, after which a reader goes on no more; bare, as the library is
                stream = DecodeStream(skip_special_tokens=True)
                return stream.step(loaded, token) or ""

        return step

    def encode(text: str) -> np.ndarray:
        text.encode()  # as `byte` does, with the same error where the text is none
        return np.asarray(loaded.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    return Tokenizer(hashlib.sha256(f"{text} {eos}".encode()).hexdigest(), vocab_size, eos, encode, read, has_eos)


def _document_end(folder: Path, loaded) -> int | None:
    """Hugging Face's files name it, as a text or an id, or several ids of which the first is the document's."""
    for file, key in (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos_token_id"),
                      ("config.json", "eos_token_id")):
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        found = found.get("content") if isinstance(found, dict) else found
        found = found[0] if isinstance(found, list) and found else found
        found = loaded.token_to_id(found) if isinstance(found, str) else found
        if type(found) is int and loaded.id_to_token(found) is not None:
            return found
    return next((found for name in DOCUMENT_ENDS if (found := loaded.token_to_id(name)) is not None), None)


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


def _bytes_read(before: Sequence[int] = ()) -> Callable[[int], str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: decoder.decode(bytes([token])) if token < BYTE_EOS else ""
