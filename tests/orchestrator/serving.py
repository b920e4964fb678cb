"""A small model behind `sparing serve`'s API, in threads of this process."""

import contextlib
import threading
from collections.abc import Iterator

import openai
import torch
import uvicorn

from model.config import ModelConfig
from model.transformer import Transformer
from orchestrator import serve_api
from orchestrator.inference import Loaded
from orchestrator.serve import _listen
from orchestrator.serve_api import build_app
from orchestrator.serve_engine import Engine, Sequence
from orchestrator.serve_request import Limits
from orchestrator.train.tokenizer import load_tokenizer
from tests.cluster_harness import wait_until

CAPACITY = 96
NAME = "small"


def small_model() -> Loaded:
    config = ModelConfig(name=NAME, dim=32, n_layers=2, n_heads=2, vocab_size=260, max_seq_len=CAPACITY)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Loaded("", model.eval().requires_grad_(False), load_tokenizer("byte"), CAPACITY)


class Server:
    """An engine and its HTTP server, in threads."""

    def __init__(self, loaded: Loaded, *, token: str | None = None, slots: int = 3, waiting: int = 8,
                 timeout_s: float = 60.0):
        self.engine = Engine(loaded, slots=slots, capacity=CAPACITY, max_waiting=waiting)
        app = build_app(self.engine, name=NAME, limits=Limits(64, timeout_s, max_bytes=4096), token=token,
                        usd_per_h=3.6)
        self.listener = _listen("127.0.0.1", 0)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        self.server = serve_api.Server(config, self.engine)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started, 30, "no server")

    def client(self, key: str = "none") -> openai.OpenAI:
        port = self.listener.getsockname()[1]
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """No step is taken before the event is set, or the block left."""
        go, step = threading.Event(), self.engine.batch.step
        self.engine.batch.step = lambda: (go.wait(), step())[1]
        try:
            yield go
        finally:
            go.set()
            self.engine.batch.step = step

    def running(self) -> Sequence:
        """The only sequence, once it runs."""
        wait_until(lambda: self.engine.load()["running"] == 1, 30, "it does not run")
        (sequence,) = self.engine.going.values()
        return sequence

    def close(self) -> None:
        self.server.should_exit = True
        self.engine.close()
        self.thread.join(20)
        self.listener.close()
