"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json."""

import codecs
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.errors import BadRequest, NotFit

BYTE_EOS = 256


@dataclass(frozen=True)
class Tokenizer:
    """`identity` changes with anything that would change the ids. `eos` ends a document."""

    identity: str
    vocab_size: int
    eos: int
    encode: Callable[[str], np.ndarray]
    stream: Callable[[], Callable[[int], str]]
    """A new reader of one sequence: called with each id in turn, it returns the text that has become whole."""


def load_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """`byte`: ids are bytes, 256 ends a document. Else a Hugging Face tokenizer.json. `key` is what an error names."""
    if name == "byte":
        return Tokenizer("byte", 257, BYTE_EOS, lambda text: np.frombuffer(text.encode(), dtype=np.uint8), _bytes_read)
    if not os.path.isfile(name):
        raise BadRequest(f"{key}={name}: no such file; give a tokenizer.json, or byte")
    try:
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers.decoders import DecodeStream
    except ImportError:
        raise NotFit(f"{key}={name}: needs the package tokenizers; pip install 'tokenizers>=0.21'") from None
    text = Path(name).read_text(encoding="utf-8")
    try:
        loaded = HFTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BadRequest(f"{key}={name}: cannot be read ({error}); give a Hugging Face tokenizer.json") from None
    names = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
    eos = next((loaded.token_to_id(n) for n in names if loaded.token_to_id(n) is not None), None)
    vocab_size = loaded.get_vocab_size()
    if eos is None:
        eos, vocab_size = vocab_size, vocab_size + 1

    def read() -> Callable[[int], str]:
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: (stream.step(loaded, token) or "") if token != eos else ""

    return Tokenizer(hashlib.sha256(text.encode()).hexdigest(), vocab_size, eos,
                     lambda text: np.asarray(loaded.encode(text, add_special_tokens=False).ids, dtype=np.uint32), read)


def _bytes_read() -> Callable[[int], str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: decoder.decode(bytes([token])) if token < BYTE_EOS else ""
