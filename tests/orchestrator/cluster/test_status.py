"""What `sparing status` says, from the files that a run keeps."""

import json
import time

import pytest

from orchestrator.__main__ import main
from orchestrator.cluster import status
from orchestrator.cluster.status import show_status


@pytest.mark.parametrize("released_at, said", [(5.0, "running, step 3 of 9"), (11.0, "completed, step 9 of 9")])
def test_a_run_that_has_ended_is_told_with_its_whole_bill_and_a_live_one_with_its_bill_so_far(
        tmp_path, capsys, released_at, said):
    rank = {"rank": 0, "node_rank": 0, "host": "node-0000", "pid": 7, "phase": "step", "step": 3, "steps": 9,
            "loss": 2.5, "tokens_per_s": 100.0, "usd_total": 0.5, "stages": [0, 3], "layers": [0, 1, 2, 7],
            "experts": [0, 2], "tokens_per_expert": {"1": [1000, 2000], "2": [1, 2]}, "heartbeat_at": 9.0}
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "status.json").write_text(json.dumps({"time": 10.0, "attempt": 1, "ranks": [rank]}))
    summary = {"status": "completed", "steps": 9, "released_at": released_at, "usd_total": 0.75, "tokens_per_s": 200.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    show_status(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    bill = "200 tokens/s, $0.750" if released_at > 10 else "100 tokens/s, $0.500 so far"
    assert said in lines[0] and lines[0].endswith(f"loss 2.5000, {bill}")
    process = ["7"] if released_at < 10 else []  # one that has ended has no process, and gives no sign
    assert lines[1].rstrip().endswith("tokens by expert (its layers, since its start)")
    assert lines[2].split()[: 7 + len(process)] == ["0", "0", "node-0000", *process, "0,", "3", "0-2,", "7"]
    assert ("s ago" in lines[2]) == (released_at < 10)
    assert lines[2].rstrip().endswith("0:1,001 1:2,002") and lines[2].isascii()


def test_a_run_that_waits_for_a_place_says_for_which_ranks_and_how_long(tmp_path, capsys):
    rank = {"rank": 0, "node_rank": 0, "host": "a", "pid": 7, "phase": "step", "step": 3, "steps": 9}
    (tmp_path / "config.yaml").write_text("")
    status = {"time": time.time(), "attempt": 1, "ranks": [rank], "waiting": "a place for rank 0 (died), 60 s at most"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    show_status(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": waiting, step 3 of 9, attempt 1")
    assert lines[1] == "waits for a place for rank 0 (died), 60 s at most"


def test_a_torchrun_run_that_goes_on_is_not_told_by_an_earlier_summary(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(status, "headline", lambda summary: ["completed: 9 steps"])
    for kind, said in (("run_ended", "completed: 9 steps"), ("attempt_claimed", "no ranks have been placed by Ray; ")):
        with open(tmp_path / "events.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind}) + "\n")
        show_status(str(tmp_path))
        assert capsys.readouterr().out.startswith(said)


def test_status_says_what_every_run_on_the_data_is_told(tmp_path, capsys):
    rank = {"rank": 0, "node_rank": 0, "host": "h", "pid": 7, "notices": ["warning: data.path=x: 1 file is not UTF-8"]}
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "status.json").write_text(json.dumps({"time": 10.0, "attempt": 1, "ranks": [rank]}))
    show_status(str(tmp_path))
    assert capsys.readouterr().out.splitlines()[1] == rank["notices"][0]


def test_a_run_that_starts_shows_its_ranks_and_whether_its_controller_lives(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    rank = {"rank": 0, "node_rank": 0, "host": "a", "pid": 7, "phase": "start"}
    (tmp_path / "status.json").write_text(json.dumps({"time": time.time() - 60, "attempt": 1, "ranks": [rank]}))
    show_status(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": starting, step 0 of ?, attempt 1") and lines[2].split()[:4] == ["0", "0", "a", "7"]
    assert lines[3].startswith("the controller has been silent for 60 s")


def test_status_of_a_failed_run_says_why_and_no_empty_table(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    rank = {"rank": 0, "node_rank": 0, "host": "a", "pid": 7, "phase": "start"}
    (tmp_path / "status.json").write_text(json.dumps({"time": 10.0, "attempt": 1, "ranks": [rank]}))
    summary = {"status": "failed", "steps": 6, "released_at": 11.0, "tokens_per_s": None, "usd_total": 0.01}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "events.jsonl").write_text('{"kind": "run_failed", "cause": "local rank 0: was to train on h100"}\n')
    show_status(str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: failed, step 6 of ?, attempt 1", "failed: local rank 0: was to train on h100"]


@pytest.mark.parametrize("name", ["summary.json", "status.json"])
@pytest.mark.parametrize("content", ["", '{"time": 1', "[]", b"\xff"])
def test_a_damaged_file_is_said_in_one_line(tmp_path, capsys, name, content):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["status", str(tmp_path)]) == 17
    out, err = capsys.readouterr()
    assert not out and err == (f"error: {tmp_path}/{name}: is damaged, no JSON object; `sparing report {tmp_path}` "
                               "sums up from the rows, and resume=auto goes on and writes it anew\n")
