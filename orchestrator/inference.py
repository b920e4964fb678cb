"""From a path to a model that decodes, and from its tokens to text: what generate, evaluate and serve stand on.

    loaded = load_for_inference("runs/mine")
    decoder = Decoder(loaded.model, slots=1, capacity=loaded.window)

A path is a run directory or a directory of checkpoints (the newest counts), a checkpoint, or a Hugging Face directory.
`open_weights` is the seam for those who place weights themselves: shape and tensors, none of them read yet.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model import count, hf
from model.attention import mask_elements
from model.config import Attention, ModelConfig
from model.decode import CHUNK_TOKENS, chunk_tokens
from model.score import BATCH_TOKENS, head_elements
from model.transformer import Transformer
from orchestrator.config import from_dict
from orchestrator.errors import BadRequest
from orchestrator.train import storage
from orchestrator.train.export import StateDict
from orchestrator.train.lineage import TOKENIZER, newest_under, tokenizer_of
from orchestrator.train.memory import free_bytes
from orchestrator.train.shards import Loader
from orchestrator.train.tokenizer import Tokenizer, load_tokenizer

ANSWER_TOKENS = 1 << 14
"""Whose keys and values an evaluation keeps at once, where the memory is not limited."""


@dataclass(frozen=True)
class Weights:
    """What `path` holds: `tensors` by the model's names, each read when it is reached."""

    path: str
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: str
    """`byte`, or the path of a tokenizer.json; as it was in training, or beside a Hugging Face model."""
    trained_len: int
    """Tokens of a training sequence, where that is known."""
    is_foreign: bool = False
    """Trained elsewhere."""


@dataclass(frozen=True)
class Loaded:
    """A whole model in memory, in eval mode, with its tokenizer. `window`: the most tokens a sequence may have;
    `trained_len`: how many its training sequences had, where that is known."""

    path: str
    model: Transformer
    tokenizer: Tokenizer
    trained_len: int
    batch_tokens: int = BATCH_TOKENS
    """Of texts that are scored, read in one forward."""
    cache_tokens: int = ANSWER_TOKENS
    """Of answers that are evaluated, with their contexts, kept at once; of one, where that has more."""

    @property
    def window(self) -> int:
        return self.model.config.max_seq_len


@contextlib.contextmanager
def open_weights(path: str) -> Iterator[Weights]:
    """The weights under `path`; BadRequest where there are none."""
    if storage.local_path(path) and os.path.isfile(os.path.join(path, "config.json")):
        with plain_errors():
            config, tensors = hf.load(path)
        beside = os.path.join(path, TOKENIZER)
        yield Weights(path, config, tensors, beside if os.path.isfile(beside) else "", config.max_seq_len, True)
        return
    checkpoint = newest_under(path)
    if checkpoint is None:
        raise BadRequest(f"{path}: no whole checkpoint there; name a run directory, a checkpoint in it, or a Hugging "
                         "Face directory")
    with contextlib.closing(Loader(checkpoint)) as loader:
        with plain_errors():
            config = from_dict(ModelConfig, loader.state["config"]["model"])
            tokenizer, foreign = tokenizer_of(checkpoint, loader.state), bool(loader.state.get("weights_only"))
        # An imported checkpoint's config says nothing of its training.
        seq_len = config.max_seq_len if foreign else loader.state["config"]["train"]["seq_len"]
        yield Weights(checkpoint, config, StateDict(loader, config), tokenizer, seq_len, foreign)


def look(path: str, *, tokenizer: str = "") -> tuple[Weights, Tokenizer]:
    """What `path` holds, without its tensors, and its tokenizer: to check a request before weights are read."""
    with open_weights(path) as weights, plain_errors():
        return replace(weights, tensors={}), read_tokenizer(weights, tokenizer)


def beyond_training(trained_len: int, tokens: int) -> str:
    """The notice that sequences of so many tokens deserve; none where training had such."""
    if tokens <= trained_len:
        return ""
    return (f"notice: sequences may reach {tokens:,} tokens, those of training had {trained_len:,}; text beyond that "
            "length is often poor")


def load_for_inference(path: str, *, tokenizer: str = "", dtype: torch.dtype = torch.float32,
                       device: torch.device | str = "cpu", cache_tokens: int = 0, at_once: int = 0) -> Loaded:
    """Read a model into memory. `tokenizer` overrides the one that the weights name; `cache_tokens`: whose keys and
    values there must be room for, too; `at_once`: tokens that one forward reads, where more than a prompt's chunk."""
    with open_weights(path) as weights, plain_errors():
        text = read_tokenizer(weights, tokenizer)
        _check_room(weights, dtype, device, cache_tokens, at_once)
        with torch.device("meta"):
            model = Transformer(weights.config)
        return finish_loading(weights, model, weights.tensors.items(), text, device=device, dtype=dtype)


def uses_gpu(memory: dict[str, float | str] | None) -> bool:
    """Whether `load` puts a model on a GPU: experts on disk are computed by the CPU."""
    return torch.cuda.is_available() and memory is None


def load(path: str, memory: dict[str, float | str] | None, *, dtype: torch.dtype | None = None, **how) -> Loaded:
    """Onto the GPU where there is one, into the machine's memory or, by what `memory_limit` read, with experts on disk;
    `how` as `load_for_inference` takes it. dtype: by default bf16 on a GPU, fp32 elsewhere."""
    if memory is not None:
        from orchestrator.cold_weights import load_within

        return load_within(path, **memory, dtype=dtype or torch.float32, **how)
    gpu = uses_gpu(memory)
    return load_for_inference(path, device="cuda" if gpu else "cpu",
                              dtype=dtype or (torch.bfloat16 if gpu else torch.float32), **how)


def finish_loading(weights: Weights, model: Transformer, items: Iterable[tuple[str, Tensor]], text: Tokenizer, *,
                   device: torch.device | str, dtype: torch.dtype) -> Loaded:
    """Put tensors into a model on the meta device, which must want no others."""
    tensors = {name: tensor.to(device, _kept(name, dtype)) for name, tensor in items}
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:  # counts of training, which no checkpoint holds
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, missing
    return Loaded(weights.path, model.eval().requires_grad_(False), text, weights.trained_len)


def _check_room(weights: Weights, dtype: torch.dtype, device: torch.device | str, cache_tokens: int,
                at_once: int) -> None:
    """Refuse what would end in the kernel's killer."""
    needed = sum(shape.numel() for shape in hf.tensor_shapes(weights.config).values()) * dtype.itemsize
    cache = cache_bytes(weights.config, cache_tokens, dtype)
    cache += forward_bytes(weights.config, cache_tokens, at_once, dtype, device)
    free = free_bytes(device)
    if free is None or needed + cache <= free:
        return
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))
    remedies = ["end other programs"]
    if cache > free / 4:
        remedies.append("let fewer or shorter sequences be decoded at once")
    if weights.config.n_routed_experts:
        remedies.append(f"let experts stay on disk: add memory.max_gib={free / 2**30 / 2:.2g}")
    raise BadRequest(f"{weights.path}: {needed / 2**30:.1f} GiB in {name} and {cache / 2**30:.1f} of keys, values "
                     f"and what a forward holds, "
                     f"but {free / 2**30:.1f} are free here; {', or '.join(remedies)}")


def cache_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of so many tokens in a `Decoder`, those of the MTP module that drafts included."""
    layers = config.n_layers + bool(config.n_mtp_layers)
    return int(tokens * count.kv_bytes(config, bytes_per_element=dtype.itemsize) * layers / config.n_layers)


def forward_bytes(config: ModelConfig, cache_tokens: int, at_once: int, dtype: torch.dtype,
                  device: torch.device | str, *, in_turn: bool = False) -> int:
    """Most that a forward takes beside weights and the keys and values of `cache_tokens`: of a prompt's chunk, with
    its mask and one layer's keys and values gathered, or of `at_once` tokens that are scored, which keep none and have
    their room; and logits. in_turn: experts compute one after the other."""
    device, longest = torch.device(device), min(cache_tokens, config.max_seq_len)
    chunk = min(chunk_tokens(device), max(cache_tokens, CHUNK_TOKENS))

    def body(tokens: int) -> int:
        return count.forward_bytes(config, tokens, bytes_per_element=dtype.itemsize, in_turn=in_turn)

    cache = cache_bytes(config, cache_tokens, dtype)
    rows = config.n_heads if config.attention is Attention.mla else 1
    # Booleans twice and fp32; a GPU's kernel may copy that once more to align it.
    mask = chunk * longest + 10 * max(mask_elements(device), rows * longest)
    logits = 12 * min(head_elements(device), max(chunk, at_once) * config.vocab_size)
    return max(body(chunk) + mask + cache // config.n_layers, body(at_once) - cache) + logits


def read_tokenizer(weights: Weights, override: str = "") -> Tokenizer:
    name = override or weights.tokenizer
    if not name:
        raise BadRequest(f"{weights.path}: has no tokenizer.json; add tokenizer=FILE, or tokenizer=byte for a model of "
                         "bytes")
    tokenizer = load_tokenizer(name, "tokenizer")
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise BadRequest(f"tokenizer={name}: has {tokenizer.vocab_size} tokens, the model {weights.config.vocab_size}; "
                         "give the one it was trained with")
    if weights.is_foreign and not tokenizer.has_eos:
        raise BadRequest(f"tokenizer={name}: does not say which token ends a text; put the model's "
                         "tokenizer_config.json beside it, or one that is {\"eos_token\": \"...\"}")
    # Training here puts nothing before a text, and knows no conversations.
    return tokenizer if weights.is_foreign else replace(tokenizer, begin=(), template="")


MAX_STOP = 256
"""Most characters of a stop string that may be asked for: each token's text is compared with its beginnings."""


class TextStream:
    """One sequence's tokens as text: whole characters only, and nothing that a stop string may yet swallow.

    `stopped` tells that a stop string or a token that ends a text came; the text ends before it. A special token is no
    text: where a stop string is one's, the token itself stops. before: the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self.read, self.stops = tokenizer.stream(before), list(stops)
        self.ends = tokenizer.ends.union(tokenizer.specials[stop] for stop in stops if stop in tokenizer.specials)
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if self.stopped:
            return ""
        if token in self.ends:
            text, self.stopped = self.finish(), True
            return text
        return self._certain(self.read(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._certain(self.read(None)) + self.held
        self.held = ""
        return text

    def _certain(self, text: str) -> str:
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, text, self.held = True, self.held[: min(found)], ""
            return text
        keep = max((n for stop in self.stops for n in range(1, min(len(stop), len(self.held) + 1))
                    if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(".expert_bias") else dtype


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise error if isinstance(error, BadRequest) else BadRequest(str(error)) from error
