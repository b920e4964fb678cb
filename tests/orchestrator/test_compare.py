"""`sparing compare`: the variants it trains, what it refuses, and a whole small comparison."""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from model import count
from orchestrator import compare
from orchestrator.__main__ import main
from orchestrator.compare import curve_of, extrapolate, extrapolated, page, plan_at, run, variants
from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, Preempted
from orchestrator.plan.cost import model_flops
from orchestrator.plan.layout import check_run
from orchestrator.report_run import read_run


def test_the_twins_are_trained_with_the_parameters_they_are_named_for():
    config = compose_config(["experiment=tiny"])
    models = {name: compose_config(["experiment=tiny", *words]).model for name, words in variants(config).items()}
    own = count.parameters(config.model)
    step = 1.5 * config.model.dim * config.model.n_layers * 8
    assert models["moe"] == config.model
    assert abs(count.parameters(models["equal_total"]).total - own.total) <= step
    assert abs(count.parameters(models["equal_active"]).total - count.active(own, config.model).total) <= step
    assert all(models[name].n_routed_experts == 0 for name in ("equal_total", "equal_active"))
    for words in variants(config).values():  # also of a run whose tokens go by node
        check_run(compose_config(["experiment=tiny", "layout.ep_per_node=1", *words]))


@pytest.mark.parametrize("words, said", [
    (["out=/proc/c"], "out=/proc/c: is no folder that may be written; name another"),
    (["out="], "out=: is no folder that may be written; name another"),
    (["seeds=0,0"], "seeds=0,0"), (["seeds=x"], "seeds=x"), (["run.dir=x"], "run.dir=x"),
    (["model.n_routed_experts=0", "model.n_activated_experts=0"], "has no experts")])
def test_bad_input_is_refused_before_anything_is_trained(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest, match=said):
        run(words)
    assert not list(tmp_path.iterdir())


def test_another_size_is_one_plan_times_the_measured_multiplier():
    at = "model=deepseek_v2_lite hardware=h100 gpus=8 tokens=1e11 layout.pp=1 layout.ep=8"
    request, data = plan_at(at)
    ratio = {"low": 1.1, "median": 1.5, "high": 2.0, "seeds": 2}
    measured = {"variants": {"moe": {"curves": {"flops": [[(1e12, 5.0), (1e15, 3.0)]]}}},
                "multiplier": {"equal_active": {"flops": ratio}, "equal_total": {}}}
    far = extrapolate(at, request, data, measured)
    assert far["usd"] == data["bill"]["steady"]["usd"]
    dense = far["dense"]["median"]
    assert dense["flops"] == pytest.approx(1.5 * far["flops"])
    high = far["dense"]["high"]
    assert high["usd"] * high["mfu"] == pytest.approx(dense["usd"] * dense["mfu"] * 2 / 1.5)
    said = "\n".join(extrapolated(far))
    assert "EXTRAPOLATED" in said and "by the FLOPs of equal_active: $" in said and ", 2 seeds)" in said
    measured["multiplier"]["equal_active"]["flops"] = ratio | {"seeds": 1}
    assert " (1 seed, no range), EXTRAPOLATED" in extrapolated(extrapolate(at, request, data, measured))[1]
    never_met = measured | {"multiplier": {"equal_active": {}, "equal_total": {}}}
    assert "no multiplier was measured" in extrapolated(extrapolate(at, request, data, never_met))[1]
    with pytest.raises(BadRequest, match="llama_3_1_8b has no experts to compare"):
        plan_at("model=llama_3_1_8b hardware=h100 gpus=8 tokens=1e11 layout.pp=1")


def test_a_models_name_is_text_on_the_page():
    curve = [(1.0, 5.0), (2.0, 4.0)]
    text = page({"model": "<b>&mine", "multiplier": {},
                 "variants": {"moe": {"curves": {cost: [curve] for cost in compare.COSTS}}}})
    assert "&lt;b&gt;&amp;mine and its dense twins" in text and "<b>&mine" not in text
    assert '<meta name="viewport"' in text


def test_columns_of_the_largest_models_stay_apart():
    found = {"parameters": 671_026_419_200, "active_parameters": 37_551_562_752,
             "loss": {"low": 2.0, "median": 2.0, "high": 2.0, "seeds": 1}}
    said = compare.lines({"variants": {"moe": found}, "multiplier": {}})
    assert said[1].split()[:4] == ["moe", "671,026,419,200", "37,551,562,752", "2.0000"]
    assert said[0].index("active") + len("active") == said[1].index("37,551,562,752") + len("37,551,562,752")


@pytest.mark.parametrize("code", compare.STOPPED)
def test_a_run_that_is_interrupted_has_time_for_its_checkpoint(code, tmp_path, monkeypatch):
    """The child is slow to end after Ctrl-C, which the whole terminal hears."""
    waited = []

    class Run(subprocess.Popen):
        def wait(self, timeout=None):
            waited.append(timeout)
            if len(waited) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    end = f"sys.exit({code})" if code > 0 else "signal.signal(2, signal.SIG_DFL); signal.raise_signal(2)"
    program = f"import signal, time, sys; time.sleep(1); open('{tmp_path}/saved', 'w'); {end}"
    monkeypatch.setattr(compare.subprocess, "Popen", lambda words: Run([sys.executable, "-c", program]))
    with pytest.raises(Preempted, match=f"was stopped; the same command with out={tmp_path}/c goes on from there"):
        run(["model=tiny", f"out={tmp_path}/c", "tracker=off"])
    assert (tmp_path / "saved").exists()


def _train_as_one_rank(words: list[str]) -> int:
    """What torchrun would do, in a process that has imported torch already."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0",
                      TORCHELASTIC_RUN_ID="test")
    return main(["train", *words])


@pytest.fixture
def process():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_a_small_comparison_reports_what_its_runs_measured_and_goes_on_where_it_stopped(tmp_path, monkeypatch, process,
                                                                                         capsys):
    trained = []

    def train(words: list[str]) -> int:
        trained.append(words)
        return process.submit(_train_as_one_rank, words).result(240)

    monkeypatch.setattr(compare, "_train", train)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 400)
    words = ["data=text", f"data.path={tmp_path}/text.txt", f"data.cache_dir={tmp_path}/cache", "train.steps=2",
             "train.batch_size=2", "train.seq_len=64", "train.validate_sequences=2"]
    assert run([*words, "seeds=3", f"out={tmp_path}/c", "tracker=off"]) == 0
    said, shown = capsys.readouterr().out, (tmp_path / "c/compare.html").read_text()
    assert "(1 seed, no range): no verdict" in said and "give more, as in seeds=0,1,2" in said
    assert "cheaper" not in said and "(1 seed, no range)" in shown
    result = json.loads((tmp_path / "c/compare.json").read_text())
    moe = read_run(f"{tmp_path}/c/moe-seed3")
    assert result["variants"]["moe"]["loss"]["median"] == moe.summary["loss"]["validation"]
    flops = [x for x, _ in curve_of(moe, compose_config(words).model, 64, "flops")]
    assert flops == [model_flops(compose_config(words).model, steps * 2 * 64, 64) for steps in (1, 2)]
    assert set(result["multiplier"]) == {"equal_active", "equal_total"} and len(trained) == 3
    assert "<svg" in shown
    assert run([*words, "seeds=3", f"out={tmp_path}/c", "tracker=off"]) == 0 and len(trained) == 3
    file = tmp_path / "c/moe-seed3/summary.json"  # as of a run that was preempted
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "preempted"}))
    assert run([*words, "seeds=3", f"out={tmp_path}/c", "tracker=off"]) == 0 and len(trained) == 4
    assert json.loads(file.read_text())["status"] == "completed"
    with pytest.raises(BadRequest, match=r"holds moe-seed3 of another command: train\.seq_len=64 there, 32 here; give"):
        run([*words, "seeds=4,3", f"out={tmp_path}/c", "train.seq_len=32", "tracker=off"])
    assert len(trained) == 4
    with pytest.raises(BadRequest, match="moe-seed3: is a run's own directory; name a new folder"):
        run([*words, f"out={tmp_path}/c/moe-seed3"])
