"""The training script, interrupted: the same run after it goes on, and what every signal leaves behind."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from training import processes
from training_runs import (
    MODELS,
    ROOT,
    SCRIPT,
    TINY,
    assert_bitwise_equal,
    checkpoint,
    contents,
    main,
    one_line,
    run,
    signal_after,
    train,
)


@pytest.mark.parametrize("stop_at", [4, 7], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_resumed_run_is_bitwise_the_uninterrupted_one(device, model, stop_at, tmp_path, capsys):
    options = ["--device", device, *MODELS[model]]
    assert run(*options, "--out", tmp_path / "whole") == 0
    capsys.readouterr()
    with signal_after(stop_at, signal.SIGINT):
        assert run(*options, "--out", tmp_path / "parts") == 130
    assert f"stopped at step {stop_at} of 8" in one_line(capsys.readouterr().err)
    assert checkpoint(tmp_path / "parts")["step"] == stop_at
    assert run("--resume", "--device", device, "--out", tmp_path / "parts") == 0
    assert_bitwise_equal(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))


def test_resuming_a_finished_run_trains_nothing_and_reports_again(tmp_path, capsys):
    assert run("--width", 4, "--out", tmp_path) == 0
    before = checkpoint(tmp_path)
    assert run("--resume", "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("time per step") == 2
    assert_bitwise_equal(checkpoint(tmp_path), before)


def test_a_finished_run_goes_on_with_more_epochs(tmp_path, capsys):
    """The tutorial's rate does not depend on the number of epochs: the run is the longer one."""
    assert run(*MODELS["tutorial"], "--epochs", 3, "--out", tmp_path / "long") == 0
    assert run(*MODELS["tutorial"], "--epochs", 2, "--out", tmp_path / "short") == 0
    capsys.readouterr()
    assert run("--resume", "--epochs", 3, "--out", tmp_path / "short") == 0
    printed = capsys.readouterr().out
    assert "resumed at step 8" in printed
    assert re.findall(r"epoch +(\d+)/(\d+)", printed) == [("3", "3")]
    assert_bitwise_equal(checkpoint(tmp_path / "short"), checkpoint(tmp_path / "long"))


def test_the_rate_goes_on_as_in_the_longer_run(tmp_path):
    assert run("--width", 2, "--epochs", 1, "--out", tmp_path) == 0
    assert run("--resume", "--epochs", 3, "--out", tmp_path) == 0
    saved = checkpoint(tmp_path)
    config = train.Config(**saved["config"])
    expected = [train.learning_rate(config, step, 4) for step in (7, 11)]
    assert [entry["learning_rate"] for entry in saved["history"][1:]] == expected
    assert config.epochs == 3


# ------------------------------------------------------------------------------------- signals


def test_ctrl_c_from_a_terminal_saves_and_exits_with_130(tmp_path):
    command = [sys.executable, str(SCRIPT), *TINY, "--epochs", "100000", "--width", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"stopped at step \d+ of 400000 and saved; go on with: .*--resume", one_line(err))
    saved = checkpoint(tmp_path)
    assert saved["step"] >= 8
    assert all(torch.isfinite(weight).all() for weight in saved["model"].values())
    assert [path.name for path in tmp_path.glob(".*")] == []  # no temporary file stays


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGHUP, signal.SIGHUP], 129),  # from the kernel and from the shell, when a terminal is closed
        ([signal.SIGINT, signal.SIGTERM], 130),  # from the terminal and from torchrun
        ([signal.SIGTERM, signal.SIGHUP], 143),  # from systemd
    ],
)
def test_signals_that_save(numbers, code, tmp_path, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signal_after(3, *numbers):
        assert run("--width", 2, "--out", tmp_path) == code
    assert "stopped at step 3 of 8 and saved" in one_line(capsys.readouterr().err)
    assert checkpoint(tmp_path)["step"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_ctrl_c_does_not_wait(tmp_path, capsys):
    with signal_after(3, signal.SIGINT, signal.SIGINT):
        assert run("--width", 2, "--out", tmp_path) == 130
    assert "checkpoints are as they were" in one_line(capsys.readouterr().err)
    assert checkpoint(tmp_path)["step"] == 0


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signal_after(3, signal.SIGHUP):
            assert run("--width", 2, "--epochs", 1, "--out", tmp_path) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_printed_command_goes_on_as_the_run_began(tmp_path, monkeypatch, capsys):
    """Same folders, whatever their names, same device, as many processes."""
    out, data_dir = tmp_path / "it's a $(run); really", tmp_path / "my data"
    with signal_after(2, signal.SIGINT):
        assert run("--width", 2, "--out", out, "--data-dir", data_dir) == 130
    command = shlex.split(capsys.readouterr().err.split("go on with: ")[1])
    expected = ["--resume", "--out", str(out), "--data-dir", str(data_dir), "--device", "cpu"]
    assert command == [sys.executable, sys.argv[0], *expected]
    assert main(*command[2:]) == 0
    assert checkpoint(out)["step"] == 8

    monkeypatch.setattr(processes, "n_ranks", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    args = train.parse_arguments(["--out", str(out)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [sys.executable, *launcher, sys.argv[0], "--resume", "--out", str(out)]
    assert train.command_to_resume(args, out) == shlex.join(command)


# ------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    assert run("--model", "tutorial", "--lr", "1e30", "--out", tmp_path) == 1
    assert re.search(r"the loss is (nan|inf) in epoch 1: try a lower --lr than 1e\+30", one_line(capsys.readouterr().err))
    assert checkpoint(tmp_path)["step"] == 0


@pytest.mark.parametrize("limit", [16, 64], ids=["in the last step", "before Ctrl-C"])
def test_weights_that_are_not_finite_replace_no_checkpoint(limit, tmp_path, capsys):
    """The only loss that was computed is finite: that of the weights before the step."""
    with signal_after(1, signal.SIGINT):  # which the last step does not heed
        assert run("--width", 2, "--epochs", 1, "--limit", limit, "--lr", "1e38", "--scale", "1e10", "--out", tmp_path) == 1
    assert "weights are not finite in epoch 1: try a lower --lr than 1e+38, or a smaller --scale" in one_line(
        capsys.readouterr().err
    )
    assert checkpoint(tmp_path)["step"] == 0


def test_a_test_loss_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys):
    evaluate, calls = train.evaluate, []

    def evaluate_to_nan(*arguments):
        calls.append(1)
        return evaluate(*arguments) if len(calls) == 1 else (float("nan"), 0.1)

    monkeypatch.setattr(train, "evaluate", evaluate_to_nan)
    assert run("--width", 2, "--out", tmp_path) == 1
    assert "the test loss is nan in epoch 2: try a lower --lr than 0.1" in one_line(capsys.readouterr().err)
    assert checkpoint(tmp_path)["step"] == 4
    before = contents(tmp_path)
    assert main("--resume", "--epochs", 1, "--device", "cpu", "--out", tmp_path) == 2
    assert "--epochs 2, not 1; only more epochs are possible" in one_line(capsys.readouterr().err)
    assert contents(tmp_path) == before
