"""How a command ends where the system refuses what it writes, nobody reads it, or Ctrl-C comes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import __main__ as command
from orchestrator.__main__ import main
from orchestrator.arguments import blamed, check_folder, check_writable, write_file
from orchestrator.errors import INTERRUPTED, UNREAD, BadRequest, Transient
from orchestrator.train import storage

ROOT = Path(__file__).parents[2]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_echo_of_a_signal_is_no_second_one(monkeypatch):
    from orchestrator.cluster import session

    with session.early_end():
        cause = session.stop_signals()
        for _ in range(2):  # as `timeout` sends it
            signal.raise_signal(signal.SIGTERM)
        assert cause() == "SIGTERM"
        monkeypatch.setattr(session, "ECHO_S", -1.0)
        with pytest.raises(Transient, match="ended at once by a second SIGTERM"):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("error, told", [
    (OSError(errno.ENOSPC, "", "/full/r/checkpoints/x"), ("run.dir=", "/full/r")),
    (OSError(errno.EACCES, "", "/full/hf/a"), ("", "/full/hf")), (OSError(errno.ENOSPC, "", "/full/rest"), None),
    (OSError(errno.ENOSPC, ""), ("", "/full/hf")), (OSError(errno.EACCES, ""), None)])
def test_what_the_system_refuses_is_laid_to_the_word_that_named_it(error, told, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 0 if path.startswith("/full") else 1 << 30)
    assert blamed(error, ["runs/a", "run.dir=/full/r", "/full/hf", "dtype=fp8", "text=/else/x", "a /b"]) == told


def test_a_file_or_disk_of_the_users_that_is_refused_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 0)
    monkeypatch.setitem(command.VERBS, "status", full)
    assert main(["status", f"run.dir={tmp_path}/r"]) == 3
    assert capsys.readouterr().err == (f"error: run.dir={tmp_path}/r: no space left (0 bytes free); make room, or "
                                       "choose another directory\n")
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1 << 30)
    assert main(["status", "x"]) == 3
    assert capsys.readouterr().err == "error: stdout: no space left; send it to another place\n"
    monkeypatch.setitem(command.VERBS, "status", lambda words: open("/nowhere/x"))
    with pytest.raises(FileNotFoundError):
        main(["status", "x"])


def test_a_plan_is_printed_before_the_file_that_a_full_disk_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", full)
    words = ["model=mini", "hardware=h100", "gpus=1", "tokens=1e8", "layout.recompute=none"]
    assert main(["plan", *words, f"html={tmp_path}/p.html", f"out={tmp_path}/p.json"]) == 3
    out, err = capsys.readouterr()
    assert "steady" in out and err.startswith(f"error: out={tmp_path}/p.json: no space left for ")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_pipe_takes_what_is_written_and_stays_one(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        write_file({"out": f"{tmp_path}/{name}"}, "out", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "file").read_text() == "text" and (tmp_path / "link").is_symlink()
    os.close(reader)


def test_what_cannot_be_made_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for check, path in ((check_writable, "/proc/x.json"), (check_writable, "/nowhere/x.json"),
                        (check_writable, tmp_path), (check_folder, tmp_path / "file"), (check_folder, "/proc/x")):
        with pytest.raises(BadRequest, match=f"out={path}: "):
            check({"out": str(path)}, "out")
    check_folder({"out": f"{tmp_path}/new/folder"}, "out")
    for check in (check_folder, check_writable):
        check({"out": "s3://bucket/x"}, "out")
        with pytest.raises(BadRequest, match="^out=: "):
            check({"out": ""}, "out")


PRINTING = (["train", "--help"], ["plan", "prices"], ["train", "--cfg", "job"])


def _started(words: list[str], stdout: int) -> subprocess.Popen:
    """As from a shell: what is printed to no terminal is kept until there is much of it."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-m", "orchestrator", *words], cwd=ROOT, env=env, text=True,
                            stdout=stdout, stderr=subprocess.PIPE)


def test_a_reader_that_has_gone_ends_every_verb_quietly_with_one_code():
    started = [_started(words, subprocess.PIPE) for words in PRINTING]
    for process in started:
        process.stdout.close()
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in started] == [("", UNREAD)] * 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_cannot_be_printed_for_want_of_room_is_one_line():
    with open("/dev/full", "w") as nowhere:
        started = [_started(words, nowhere.fileno()) for words in PRINTING]
    said = "error: stdout: no space left; send it to another place\n"
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in started] == [(said, 3)] * 3


IMPORTING = """
import signal

class Interrupted:
    def find_spec(name, path, target=None):
        if name == "orchestrator.arguments":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("as of a library that takes it for its own failure")

signal.signal(signal.SIGINT, signal.default_int_handler)
import sys
sys.meta_path.insert(0, Interrupted)
"""


def test_ctrl_c_in_an_import_ends_at_once_whatever_a_library_makes_of_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(IMPORTING)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-m", "orchestrator", "status", "x"], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def test_ctrl_c_elsewhere_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        command._interrupted(signal.SIGINT, sys._getframe())
