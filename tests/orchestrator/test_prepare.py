"""`sparing prepare` leaves what a run of the same words finds."""

from orchestrator import prepare
from orchestrator.__main__ import main
from orchestrator.compose import compose_config
from orchestrator.train import data, tokens
from tests.harness import write_corpus


def test_a_run_finds_its_corpus_tokenised(tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path, 12)
    words = ["data=text", f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache", "train.seq_len=64"]
    assert prepare.run(words) == 0
    said = capsys.readouterr().out
    monkeypatch.setattr(tokens, "_build", None)  # would be called
    config = compose_config(words)
    corpus = data.prepare(config.data, model=config.model, seq_len=64, n_extra=1)
    assert f"train      {corpus.sources[0]['train'].num_tokens:,} tokens" in said
    assert "\nepochs     " in said and " in train.steps=100\n" in said
    assert f"kept in    {corpus.sources[0]['train'].folder}" in said


def test_what_cannot_be_prepared_is_said(tmp_path, capsys):
    assert prepare.run(["data=random"]) == 0 and "nothing to prepare" in capsys.readouterr().out
    assert main(["prepare", "data=text", f"data.path={tmp_path}/*.txt"]) == 2
    assert "matches no file" in capsys.readouterr().err
