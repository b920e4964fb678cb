"""Texts on disk, and what `data.prepare` makes of them."""

import random
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from orchestrator.config import DataConfig
from orchestrator.train import data
from orchestrator.train.tokenizer import BYTE_EOS

EOS = BYTE_EOS


def make_texts(number: int = 40) -> list[str]:
    words = random.Random(0)
    return ["".join(words.choice("abc de\n\u00e9") for _ in range(words.randrange(50, 400))) for _ in range(number)]


def config_for(folder: Path, pattern: str = "*.txt", **changes) -> DataConfig:
    return DataConfig(**{"path": f"{folder}/{pattern}", "cache_dir": str(folder / "cache"), "validation_fraction": 0.2}
                      | changes)


def prepare(config: DataConfig, seq_len: int = 16, model: ModelConfig | None = None) -> data.Corpus:
    return data.prepare(config, model=model or ModelConfig(), seq_len=seq_len, n_extra=2)


def documents_of(stream: data.TokenStream) -> list[str]:
    ids = stream.read(0, stream.num_tokens)
    assert ids[-1] == EOS
    parts = np.split(ids, np.flatnonzero(ids == EOS))[:-1]
    return [bytes(part[part != EOS].astype(np.uint8)).decode() for part in parts]
