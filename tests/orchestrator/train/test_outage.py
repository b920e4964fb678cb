"""An object store that is slow, refuses, hangs, or tears writes and reads: moto's S3 behind a proxy that does so.

Saves ride out what passes; what does not pass costs a checkpoint, and the one before stands.
"""

import dataclasses
import http.client
import http.server
import socket
import struct
import threading
import time

import pytest
import torch

from model.config import ModelConfig
from orchestrator.config import Config, WandbMode
from orchestrator.errors import NotFit, PeerLost, Transient
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train import lineage, storage
from orchestrator.train.checkpoint import Saver
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank
from orchestrator.train.shards import Loader, Piece
from tests.cluster_harness import wait_until
from tests.orchestrator.train.team import newest_loadable


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the store, but for the next ones of `script`, each spent on one PUT or GET of a shard."""

    daemon_threads = True

    def __init__(self, store):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.script, self.seen, self.lock = store, [], [], threading.Lock()

    def next_fault(self, method, path):
        with self.lock:
            wanted = "GET" if "tear the body" in self.script[:1] else "PUT"
            if not self.script or ".safetensors" not in path or method != wanted:
                return None
            self.seen.append(self.script[0])
            return self.script.pop(0)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        fault = self.server.next_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "refuse":
            return self.reset()
        if fault == "tear":  # half of the upload arrives
            self.rfile.read(length // 2)
            return self.reset()
        body = self.rfile.read(length)
        if fault == "503":
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return self.reply(503, [("Content-Type", "application/xml")], text)
        if fault == "hang":
            time.sleep(2)
            return self.reset()
        if fault == "slow":
            time.sleep(0.5)
        onward = http.client.HTTPConnection(*self.server.store, timeout=120)
        onward.request(self.command, self.path, body=body, headers=dict(self.headers))
        answer = onward.getresponse()
        data, headers = answer.read(), answer.getheaders()
        onward.close()
        if fault == "lose the answer":
            return self.reset()
        self.reply(answer.status, headers, data, torn=fault == "tear the body")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def reply(self, status, headers, data, torn=False):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", len(data))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if torn else data)
        if torn:
            self.wfile.flush()
            self.reset()

    def reset(self):
        """End the connection by a reset, as a crashed load balancer does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(s3, monkeypatch, tmp_path):
    """A proxy in front of the store, a client that gives up no request soon, and a directory."""
    import os

    import s3fs

    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    server = Proxy((host, int(port)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    patience(monkeypatch, 60)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server.root = storage.join(s3, tmp_path.name)
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def patience(monkeypatch, seconds):
    """How long a new client waits for an answer."""
    import fsspec
    import s3fs

    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {
        "read_timeout": seconds, "connect_timeout": seconds, "retries": {"max_attempts": 0}}})
    s3fs.S3FileSystem.clear_instance_cache()


def content(step):
    return torch.arange(50_000, dtype=torch.float32) + step


def save(saver, step):
    tensor = content(step)
    saver.save(step, [Piece("model.weight", tuple(tensor.shape), 0, tensor)], {"step": step}, background=False)
    return saver.wait()


def saver_of(proxy, timeout_s=120.0):
    return Saver(proxy.root, rank=0, world_size=1, store=None, keep=0, fence="attempt", timeout_s=timeout_s)


@pytest.mark.parametrize("fault", ("slow", "503", "refuse", "hang", "tear", "lose the answer"))
def test_a_save_rides_out_what_passes(proxy, monkeypatch, fault):
    if fault == "hang":
        patience(monkeypatch, 1)
    saver = saver_of(proxy)
    proxy.script = [fault, fault]
    result = save(saver, 1)
    assert result.ok, result.error
    assert proxy.seen == ([fault] if fault == "slow" else [fault, fault]), "a slow answer is one, the others are not"
    loader = Loader(result.path)
    assert torch.equal(loader.read("model.weight"), content(1))
    loader.close()


def test_a_torn_download_is_asked_for_again(proxy):
    path = save(saver_of(proxy), 1).path
    proxy.script = ["tear the body"]
    loader = Loader(path)
    assert torch.equal(loader.read("model.weight"), content(1)) and proxy.seen == ["tear the body"]
    loader.close()


@pytest.mark.parametrize("fault", ("503", "refuse", "tear"))
def test_an_outage_costs_its_checkpoint_and_the_one_before_stands(proxy, fault):
    first = save(saver_of(proxy), 1)
    proxy.script = [fault] * 1000
    second = save(saver_of(proxy, timeout_s=1.0), 2)
    proxy.script = []
    assert first.ok and not second.ok and "storage did not answer" in second.error and "rank-00000" in second.error
    assert newest_loadable(proxy.root, lambda path, reason: None) == first.path
    third = save(saver_of(proxy), 3)
    assert third.ok and lineage.list_checkpoints(proxy.root) == [first.path, third.path]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").write_text("".join(f"line {i}: {i * i % 13}\n" for i in range(3000)))
    config = Config()
    config.model = ModelConfig(vocab_size=264, n_layers=2, dim=32, inter_dim=32, moe_inter_dim=16, n_mtp_layers=0)
    config.train = dataclasses.replace(config.train, steps=8, batch_size=2, seq_len=16, validate_every=0,
                                       validate_sequences=2)
    config.data.path, config.data.cache_dir = str(tmp_path / "text"), str(tmp_path / "cache")
    config.data.validation_fraction = 0.2
    config.run.dir, config.checkpoint.dir = str(tmp_path / "run"), str(tmp_path / "checkpoints")
    config.checkpoint.every, config.checkpoint.keep = 1, 0
    config.tracker.wandb, config.hardware.name, config.hardware.fp32_tflops = WandbMode.off, "cpu", 0.1
    (tmp_path / "run").mkdir()
    return config


def train(config):
    return run_rank(config, RankInfo(), control=Control(), placed_at=time.time())


def rows(config, name):
    import json
    from pathlib import Path

    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


class Broken:
    """storage.write_chunks while the disk is full: at these calls (from 1)."""

    def __init__(self, monkeypatch, calls):
        self.calls, self.count, self.write = calls, 0, storage.write_chunks
        monkeypatch.setattr(storage, "write_chunks", self)

    def __call__(self, path, chunks, **kwargs):
        self.count += 1
        if self.count in self.calls:
            raise storage.StorageFull(f"{path}: no space left (scripted)")
        return self.write(path, chunks, **kwargs)


def test_failed_saves_are_events_and_a_metric_and_the_run_goes_on(config, monkeypatch):
    Broken(monkeypatch, calls={2, 3, 4, 6})
    result = train(config)
    assert result["status"] == "completed" and result["checkpoint"]["error"] is None
    failed = [event for event in rows(config, "events.jsonl") if event["kind"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [2, 3, 4, 6] and "no space left" in failed[0]["cause"]
    assert rows(config, "metrics.jsonl")[-1]["checkpoint/failed_total"] == 4
    assert [lineage.step_of(path) for path in lineage.list_checkpoints(config.checkpoint.dir)] == [1, 5, 7, 8]


@pytest.mark.parametrize("heals", (False, True), ids=("for good", "until the last try"))
def test_too_many_failures_in_a_row_end_the_run_with_one_more_try(config, monkeypatch, heals):
    config.checkpoint.max_failures, config.train.steps = 3, 50
    Broken(monkeypatch, calls={2, 3, 4} if heals else range(2, 1000))
    if heals:
        result = train(config)
        assert result["status"] == "preempted" and result["checkpoint"]["step"] == result["steps"] < 50
        return
    with pytest.raises(NotFit, match="checkpoint.dir=.*[3-5] saves in a row failed.*no space left"):
        train(config)
    paths = lineage.list_checkpoints(config.checkpoint.dir)
    assert [lineage.step_of(path) for path in paths] == [1] and len(rows(config, "metrics.jsonl")) < 50


def test_training_does_not_wait_for_a_save_that_hangs(config, monkeypatch):
    """The next save waits instead, until the store answers; the run ends with its last checkpoint."""
    monkeypatch.setattr("orchestrator.train.loop.PATIENCE_S", 0.0)
    write, reached = storage.write_chunks, threading.Event()

    def hanging(path, chunks, **kwargs):
        if "step-00000001" in path:
            assert reached.wait(240)
        return write(path, chunks, **kwargs)

    monkeypatch.setattr(storage, "write_chunks", hanging)
    control = Control()
    update = control.update

    def watched(**fields):
        update(**fields)
        if fields.get("step") == 6:
            reached.set()

    control.update = watched
    config.train.steps = 12
    result = run_rank(config, RankInfo(), control=control, placed_at=time.time())
    steps = [lineage.step_of(path) for path in lineage.list_checkpoints(config.checkpoint.dir)]
    assert result["status"] == "completed" and 1 in steps and not {2, 3, 4, 5, 6} & set(steps) and steps[-1] == 12
    waits = [event for event in rows(config, "events.jsonl") if event["kind"] == "checkpoint_waits"]
    assert 2 in [event["step"] for event in waits]


def test_a_rank_whose_group_is_given_up_does_not_wait_for_its_save(config, monkeypatch):
    """It would wait until the save's deadline for what a lost rank was to write, and be given up with it."""
    control, go_on, signs, written = Control(), threading.Event(), [], []
    config.checkpoint.every = 0
    update = control.update
    control.update = lambda **fields: (signs.append(fields), update(**fields))

    def hanging(path, chunks, **kwargs):
        before = len(signs)
        wait_until(lambda: len(signs) > before + 2, 120, "who waits gives no sign of life")
        control.must_leave = True
        written.append(go_on.wait(120))

    monkeypatch.setattr(storage, "write_chunks", hanging)
    with pytest.raises(PeerLost):
        run_rank(config, RankInfo(), control=control, placed_at=time.time())
    assert control.must_leave and not written
    go_on.set()


def test_storage_that_is_away_at_a_resume_is_no_damage(config, monkeypatch):
    """The newest checkpoint is not passed over, nor is the run told to start anew: it is to be tried again."""
    train(config)

    def away(path, **_):
        raise storage.StorageUnavailable(f"{path}: does not answer (scripted)")

    monkeypatch.setattr("orchestrator.train.resume.Loader", away)
    config.resume, config.train.steps = "auto", config.train.steps + 1
    with pytest.raises(Transient, match="does not answer"):
        train(config)
