"""A text and a whole run on it; what is saved, and places to save it: a disk, a small one, memory, and S3 over HTTP (a
moto server here). What a session shares, no test changes."""

import subprocess
from pathlib import Path

import pytest
import torch

from orchestrator.train import storage
from tests.harness import write_corpus
from tests.orchestrator.train.corpora import make_texts
from tests.orchestrator.train.runs import make_config, run, train
from tests.orchestrator.train.team import EXPERTS, Team, pieces_of


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, 12)
    return folder


@pytest.fixture(scope="session")
def whole(ranks, text, tmp_path_factory):
    """An uninterrupted run of six steps on pp2 x ep2, which measures the machine's peak."""
    folder = tmp_path_factory.mktemp("whole")
    run(ranks, train, make_config(text, folder, "pp2_ep2", hardware__fp32_tflops=None))
    return folder


@pytest.fixture(scope="module")
def s3():
    server_module = pytest.importorskip("moto.server", reason="moto[s3] and flask are not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(f"bucket-{port}")
        yield f"s3://bucket-{port}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=("local", "memory", "s3"))
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return storage.join(request.getfixturevalue("s3"), tmp_path.name)


@pytest.fixture
def small_disk(tmp_path):
    """A mounted disk of 4 MiB."""
    place = tmp_path / "small_disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True, timeout=60,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted here: {error}")
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=60)


@pytest.fixture
def tensors():
    """Global tensors of a small MoE: uneven rows, a scalar, several types, experts one entry each."""
    generator = torch.Generator().manual_seed(0)
    found = {"model.tok_embeddings.weight": torch.randn(13, 8, generator=generator),
             "model.norm.weight": torch.randn(8, generator=generator).bfloat16(),
             "optim.step": torch.tensor(7.0),
             "model.counts": torch.arange(5)}
    for tree in ("model", "optim.exp_avg"):
        for block, count in EXPERTS.items():
            for expert in range(count):
                name = f"{tree}.{block}.moe.experts.{expert}"
                found[f"{name}.w13"] = torch.randn(6, 4, generator=generator)
                found[f"{name}.w2"] = torch.randn(4, 3, generator=generator)
    return found


@pytest.fixture
def save(root, tensors):
    """Save all of `tensors` at a step from some ranks; the result of rank 0."""
    return lambda step, world=4, **kwargs: Team(root, world, **kwargs).save(
        step, lambda rank, world: pieces_of(tensors, rank, world))


@pytest.fixture
def saved(tmp_path, tensors):
    """The path of a whole checkpoint of 4 ranks on disk."""
    result = Team(str(tmp_path)).save(3, lambda rank, world: pieces_of(tensors, rank, world))
    assert result.ok, result.error
    return result.path


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, text in enumerate(make_texts()):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    return tmp_path
