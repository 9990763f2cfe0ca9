"""The training script's files under attack: wanted by two runs, removed while in use, or nowhere to write to."""

import datetime
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training import files
from training_runs import (
    ROOT,
    SCRIPT,
    TINY,
    after_step,
    checkpoint,
    contents,
    main,
    one_line,
    run,
    signal_after,
    train,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert run("--width", 2, "--momentum", "0.9", "--ema-decay", "0.5", "--out", out) == 0
    return out


def resume(out: Path) -> int:
    return main("--resume", "--device", "cpu", "--out", out)


def arguments(out: Path, *more: str):
    return train.parse_arguments(["--out", str(out), *more])


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def disk_full(file):
        file.write(b"ne")
        raise RuntimeError("PytorchStreamWriter failed\nwriting file")  # torch.save's words for a full disk

    with pytest.raises(train.Failure, match=r"cannot write .*file: PytorchStreamWriter failed writing file"):
        files.write_atomically(path, disk_full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------- two runs, one folder


@pytest.mark.parametrize("options", [["--resume"], ["--overwrite"]])
def test_a_folder_in_use_is_refused_and_its_user_named(options, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with files.claimed_folder(arguments(out, "--resume")):
        before = contents(out)
        assert main("--data", "digits", "--device", "cpu", "--limit", 64, *options, "--out", out) == 2
        line = one_line(capsys.readouterr().err)
        year = datetime.date.today().year
        assert f"{out} is in use by process {os.getpid()} on {socket.gethostname()}, since {year}" in line
        assert contents(out) == before
    assert not (out / files.LOCK).exists()
    assert resume(out) == 0


def test_of_two_new_runs_at_once_one_trains(tmp_path, monkeypatch, capsys):
    """Both found the folder free."""
    claimed_folder = files.claimed_folder
    codes = []

    def other_is_faster(args):
        monkeypatch.setattr(train, "claimed_folder", claimed_folder)
        with after_step(1, lambda: None):
            codes.append(run("--width", 2, "--epochs", 1, "--out", tmp_path / "out"))
        return claimed_folder(args)

    monkeypatch.setattr(train, "claimed_folder", other_is_faster)
    assert run("--width", 2, "--epochs", 1, "--out", tmp_path / "out") == 2
    assert codes == [0]
    assert "holds the checkpoint of a run" in one_line(capsys.readouterr().err)


def test_the_lock_of_a_process_that_died_holds_nobody_up(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / files.LOCK).write_text("process 1 on elsewhere, since 1970")
    assert resume(out) == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*of):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.claimed_folder(arguments(tmp_path)) as out:
        assert out == tmp_path
    line = f"{tmp_path} cannot be locked (No locks available): see to it that no other run writes to it\n"
    assert capsys.readouterr().err == line
    assert contents(tmp_path) == {}


def test_a_lock_that_was_deleted_while_waiting_for_it_is_not_held(tmp_path, monkeypatch):
    """Its owner left between our opening it and our locking it; a third process would lock a new file."""
    path, flock, calls = tmp_path / files.LOCK, fcntl.flock, []

    def delete_first(*of):
        calls.append(of)
        if len(calls) == 1:
            path.unlink()
        return flock(*of)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with files.claimed_folder(arguments(tmp_path)):
        assert len(calls) == 2
        with pytest.raises(train.Failure, match="in use by process"), files.claimed_folder(arguments(tmp_path)):
            pass


# ----------------------------------------------------------------------------------------- the output folder


def test_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert run("--out", tmp_path / "file" / "out") == 2
    assert "cannot create the output folder" in one_line(capsys.readouterr().err)
    (tmp_path / "out" / f".{files.CHECKPOINT}.tmp").mkdir(parents=True)  # root may write everywhere, but not into a folder
    assert run("--out", tmp_path / "out") == 2
    assert "cannot write" in one_line(capsys.readouterr().err)
    (tmp_path / "long").mkdir()
    assert run("--out", tmp_path / "long" / ("x" * 300)) == 2
    assert "File name too long" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("runs", ["dangling link", "file"])
def test_runs_that_is_no_folder_is_not_called_full(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if runs == "file":
        Path("runs").write_bytes(b"")
    else:
        Path("runs").symlink_to("nowhere")
    assert run("--width", 2) == 2
    assert re.search("cannot create the output folder.*: runs: File exists", one_line(capsys.readouterr().err))


def test_without_out_each_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("001", "002"):
        assert run("--width", 2, "--epochs", 1) == 0
        assert {path.name for path in Path("runs", name).iterdir()} == {files.CHECKPOINT, files.CURVES, files.TENSORBOARD}


def test_overwrite_starts_afresh_and_keeps_no_curve(tmp_path):
    assert run("--width", 4, "--epochs", 1, "--out", tmp_path) == 0
    with signal_after(1, signal.SIGTERM):
        assert run("--width", 2, "--epochs", 1, "--overwrite", "--out", tmp_path) == 143
    assert checkpoint(tmp_path)["config"]["width"] == 2
    assert len(list((tmp_path / files.TENSORBOARD).iterdir())) == 1
    assert not (tmp_path / files.CURVES).exists()


@pytest.mark.parametrize("name", ["tensorboard", "."])
def test_a_folder_removed_while_running_is_one_line(name, tmp_path, capsys):
    """The epoch that was trained is saved first, where there is still a folder for it."""
    out = tmp_path / "out"
    with after_step(2, lambda: shutil.rmtree(out / name)):
        assert run("--width", 2, "--out", out) == 2
    line = one_line(capsys.readouterr().err)
    if name == ".":
        assert f"cannot write {out / files.CHECKPOINT}: No such file" in line
        return
    assert re.search(f"cannot write {out / files.TENSORBOARD}: .*No such file", line)
    assert checkpoint(out)["step"] == 4
    assert resume(out) == 0
    assert checkpoint(out)["step"] == 8


def test_a_file_in_tensorboards_place_is_one_line(tmp_path, capsys):
    (tmp_path / files.TENSORBOARD).write_bytes(b"")
    assert run("--width", 2, "--out", tmp_path) == 2
    assert f"cannot write {tmp_path / files.TENSORBOARD}" in one_line(capsys.readouterr().err)


# ----------------------------------------------------------------------------------------- the standard streams


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk():
    return open("/dev/full", "w")


@pytest.mark.parametrize("open_stdout", [closed_pipe, full_disk], ids=["closed", "full"])
def test_standard_output_that_fails_after_an_epoch(open_stdout, tmp_path, monkeypatch, capsys):
    """As in `| head -4`: one line, and the epoch that was trained is saved."""
    with open_stdout() as stdout:
        with after_step(4, lambda: monkeypatch.setattr(sys, "stdout", stdout)):
            assert run("--width", 2, "--out", tmp_path) == 2
        assert "cannot write to standard output" in one_line(capsys.readouterr().err)
        with pytest.raises(SystemExit, match="2"):
            train.console.leave(2)  # sends what could not be written nowhere
    assert checkpoint(tmp_path)["step"] == 4


def test_the_program_itself_exits_with_2_when_the_disk_of_its_output_is_full(tmp_path):
    """Python's own exit code is 120 when its last flush fails."""
    command = [sys.executable, SCRIPT, *TINY, "--width", "2", "--out", tmp_path]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 2
    assert "cannot write to standard output: No space left on device" in one_line(result.stderr)


def test_no_standard_streams_at_all(tmp_path, monkeypatch):
    """As after `>&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("--width", 2, "--epochs", 1, "--out", tmp_path / "out") == 0
    assert run("--width", 2, "--epochs", 1, "--out", tmp_path / "out") == 2


@pytest.mark.parametrize(
    ("name", "encoding", "shown"), [(b"\xff", "utf-8", rb"/\udcff/ holds"), ("é".encode(), "ascii", rb"/\xe9/ holds")]
)
def test_a_folder_whose_name_cannot_be_printed(name, encoding, shown, tmp_path, monkeypatch):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    with signal_after(5, signal.SIGINT):
        assert run("--width", 2, "--out", out) == 130
    assert resume(out) == 0
    assert shown in stdout.buffer.getvalue()
    assert {path.name for path in out.iterdir()} == {files.CHECKPOINT, files.CURVES, files.TENSORBOARD}
