"""What cannot be gone on from is refused, and what is complete is said, before anything is started."""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from model.config import RopeScaling
from orchestrator.__main__ import main
from orchestrator.cluster import preflight, session
from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest
from orchestrator.train import lineage, manifest, storage
from orchestrator.train.progress import Progress
from orchestrator.train.run_dir import claim_run_dir
from tests.harness import write_corpus

SMALL = ["model=tiny", "model.dim=32", "model.inter_dim=32", "model.moe_inter_dim=16", "train.seq_len=16",
         "train.batch_size=2", "train.steps=8", "train.validate_sequences=2", "checkpoint.every=4", "tracker=off",
         "hardware.fp32_tflops=0.1", "cluster.threads_per_rank=1"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Whoever would start Ray fails the test."""
    @contextlib.contextmanager
    def never(*_):
        raise AssertionError("Ray was started")
        yield

    monkeypatch.setattr(session, "ray_session", never)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, 12)
    return folder


def words(text: Path, run_dir: Path) -> list[str]:
    return [*SMALL, f"data.path={text}/*.txt", f"data.cache_dir={text}/cache", f"run.dir={run_dir}"]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """A complete run of eight steps, of one rank as under torchrun."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "tests")
        assert main(["train", *words(text, folder)]) == 0
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it to do something to."""
    shutil.copytree(whole, tmp_path / "run")
    path, config = tmp_path / "run", tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(whole), str(path)))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("steps", [5, 8])
def test_a_complete_run_that_is_asked_for_no_further_step_says_so_and_costs_nothing(run, capsys, steps):
    before = files(run)
    assert main(["train", f"run.dir={run}", "resume=auto", f"train.steps={steps}"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == (f"run.dir={run}: the run is complete at step 8, and train.steps={steps} changes "
                                   "nothing; a larger number goes on")
    assert "completed: 8 steps" in out and not err and files(run) == before


def test_a_complete_run_goes_on_to_a_larger_step(run):
    with pytest.raises(AssertionError, match="Ray was started"):
        main(["train", f"run.dir={run}", "resume=auto", "train.steps=9"])


def test_a_run_whose_last_save_failed_is_not_complete(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["checkpoint"]["error"] = "no room"
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(AssertionError, match="Ray was started"):
        main(["train", f"run.dir={run}", "resume=auto", "train.steps=8"])


def test_a_run_that_a_budget_ended_beyond_the_steps_that_are_asked_for_is_not_started(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "budget"}))
    assert main(["train", f"run.dir={run}", "resume=auto", "train.steps=5"]) == 2
    assert "train.steps=5: resume=auto is at step 8, and no step would be left; use 9 or" in capsys.readouterr().err


def test_under_torchrun_the_same_is_said_and_the_run_passes_through(run, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    assert main(["train", f"run.dir={run}", "resume=auto", "train.steps=5"]) == 0
    assert "the run is complete at step 8, and train.steps=5 changes nothing" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["attempts"] == 2


REFUSED = {
    "another model": (["model.dim=48"], "a checkpoint of another model: model.dim=32 there, 48 here; use the same"),
    "another length": (["train.seq_len=32"], "train.seq_len=32: the checkpoint .* was written with 16, .*; use train"),
    "another seed": (["seed=5"], "seed=5: the checkpoint .* was written with 0, .*; use seed=0"),
    "another kind of data": (["data=random"], "data.kind=random: the checkpoint .* was written with text, .*; use da"),
    "another batch": (["train.batch_size=4"], "train.batch_size=4: the checkpoint .* was written with 2, .*; use tr"),
}


@pytest.mark.parametrize("torchrun", [False, True], ids=["driver", "torchrun"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_ranks_would_refuse_is_refused_before_anything_starts(run, text, tmp_path, capsys, monkeypatch, name,
                                                                       torchrun):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
        monkeypatch.setattr("orchestrator.train.loop.run_rank", lambda *_, **__: pytest.fail("the rank was started"))
    changes, message = REFUSED[name]
    new = tmp_path / "new"
    before = files(run)
    for request in ([f"run.dir={run}", "resume=auto"], [*words(text, new), f"resume={run}"]):
        capsys.readouterr()
        assert main(["train", *request, *changes]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        assert re.search(message, err), err
    assert files(run) == before and not new.exists()


def test_data_that_the_checkpoint_was_not_trained_on_is_refused_before_anything_is_placed(run, tmp_path):
    """On a cluster, where the ranks are the first to see it, the run's config stays as it was."""
    write_corpus(tmp_path, 10)
    asked = [f"run.dir={run}", "resume=auto", "train.steps=9"]
    config = compose_config([*asked, f"data.path={tmp_path}/*.txt"])
    with pytest.raises(BadRequest, match=rf"data.path=.*there, {tmp_path}/\*\.txt here; restore the data, or st"):
        preflight.check_data(config, Progress(print), here=True)
    preflight.check_data(compose_config(asked), Progress(print), here=True)
    with pytest.raises(BadRequest, match="was trained on: the files have changed since; restore"):
        lineage.check_data(compose_config(asked), "other tokens")
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(BadRequest), claim_run_dir(config):
        assert (run / "config.yaml").read_bytes() != before
        raise BadRequest("the ranks refuse")
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("steps", [5, 8])
def test_another_run_that_has_no_step_left_to_go_on_with_is_refused(run, text, tmp_path, capsys, steps):
    """It would end at once, without a checkpoint of its own."""
    assert main(["train", *words(text, tmp_path / "new"), f"resume={run}", f"train.steps={steps}"]) == 2
    assert capsys.readouterr().err == (f"error: train.steps={steps}: resume={run} is at step 8, and no step would be "
                                       "left; use 9 or more\n")


def test_a_checkpoint_older_than_a_key_of_the_model_has_its_default(run):
    path = lineage.newest_under(str(run))
    config, state = compose_config(SMALL), manifest.read_manifest(path).state
    del state["config"]["model"]["rope_scaling"]
    lineage.check_same(config, path, state)
    config.model.rope_scaling = RopeScaling.llama3
    with pytest.raises(BadRequest, match="model.rope_scaling=yarn there, llama3 here"):
        lineage.check_same(config, path, state)


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_starts(run, text, tmp_path, capsys):
    for there in (tmp_path / "nothing", text):
        assert main(["train", *words(text, tmp_path / "new"), f"resume={there}"]) == 2
        out, err = capsys.readouterr()
        assert not out and err == (f"error: resume={there}: no whole checkpoint there; name a checkpoint, or a run "
                                   "that has one\n")
    newest = Path(lineage.newest_under(str(run)))
    newest.joinpath("manifest.json").write_text("{}")
    assert main(["train", *words(text, tmp_path / "new"), f"resume={newest}"]) == 17
    assert f"{newest}/manifest.json" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_left_to_the_ranks(run):
    Path(lineage.newest_under(str(run)), "manifest.json").write_text("{}")
    with pytest.raises(AssertionError, match="Ray was started"):
        main(["train", f"run.dir={run}", "resume=auto", "train.steps=5"])


def test_on_a_cluster_a_place_that_the_driver_cannot_see_is_left_to_the_ranks(run, text, tmp_path, monkeypatch):
    config = compose_config([*words(text, tmp_path / "new"), f"resume={tmp_path / 'elsewhere'}"])
    progress = Progress(lambda line: pytest.fail(line))
    assert lineage.look_back(config, progress, here=False) is None
    with pytest.raises(BadRequest, match="no whole checkpoint there"):
        lineage.look_back(config, progress, here=True)
    seen = dataclasses.replace(config, resume=str(run), seed=5)
    with pytest.raises(BadRequest, match="seed=5"):
        lineage.look_back(seen, progress, here=False)

    def denied(*_, **__):
        raise storage.StorageDenied("no key")

    monkeypatch.setattr(manifest.storage, "exists", denied)
    assert lineage.look_back(seen, progress, here=False) is None
    with pytest.raises(storage.StorageDenied):
        lineage.look_back(seen, progress, here=True)


def test_resuming_where_nothing_is_says_that_a_new_run_begins(text, tmp_path):
    said = []
    config = compose_config([*words(text, tmp_path / "new"), "resume=auto"])
    assert lineage.look_back(config, Progress(said.append), here=True) is None
    assert said == [f"notice: nothing to resume in {tmp_path}/new: a new run"]
    with pytest.raises(BadRequest, match=r"resume=auto: goes on with the run in run\.dir, and none is named; use run"):
        lineage.look_back(compose_config([*SMALL, "resume=auto"]), Progress(pytest.fail), here=True)


@pytest.mark.parametrize("content", ["{", "[]", None], ids=["damaged", "no object", "gone"])
def test_a_run_goes_on_behind_a_damaged_summary_and_its_bill_too(run, capsys, monkeypatch, content):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "run_ended"
    events[-1]["charged_s"] += 1000  # as if its release had taken long
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "summary.json").write_text(content or "")
    if content is None:
        (run / "summary.json").unlink()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    assert main(["train", f"run.dir={run}", "resume=auto", "train.steps=9"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 9
    assert summary["measured"]["charged_s"] > events[-1]["charged_s"], "what is charged never goes back"
