"""The training script's options: every wrong one is one line, exit code 2, and creates nothing."""

import os
import re
import subprocess
import sys

import pytest
import torch
from training_runs import ROOT, SCRIPT, contents, main, one_line, run, train

BAD_OPTIONS = {
    "--epoch 3": "unrecognized arguments: --epoch 3",
    "--loss focal": "invalid choice: 'focal'",
    "--epochs 0": "0 is not a whole number from 1 to 1000000",
    "--epochs 2147483648": "2147483648 is not a whole number from 1 to 1000000",
    "--width 1000000": "1000000 is not a whole number from 1 to 1024",
    "--lr 1e39": "1e39 is not a number from 0 up that float32 holds",
    "--weight-decay 1e39": "1e39 is not a number from 0 up that float32 holds",
    "--scale=-1e39": "-1e39 is not a finite number that float32 holds",
    "--seed 4294967296": "4294967296 is not a whole number in",
    "--top-k 99999999999 --reduction topk": "99999999999 is not a number of rows",
    "--data-dir=": "the name of the folder is empty",
    "--lr nan": "nan is not a number from 0 up",
    "--label-smoothing 1.5": "1.5 is not a number in",
    "--top-k 3": "--top-k is for --reduction topk",
    "--reduction topk": "--top-k is for --reduction topk, and needed there",
    "--reduction topk --top-k 1.5": "1.5 is not a number of rows",
    "--reduction max --accumulate 2": "--accumulate does not go with --reduction max",
    "--accumulate 3": "--batch-size 16 cannot be cut into --accumulate 3 equal parts",
    "--batch-size 65": "--batch-size 65 is larger than the 64 training images",
    "--model tutorial --width 8": "--width is for --model resnet",
    "--amp fp16": "--amp fp16 needs a GPU, not cpu",
    "--device cuda:99": "--device cuda:99: there is no such GPU",
    "--device xpu": "--device xpu: choose auto, cpu, cuda",
    "--device nonsense": "--device nonsense: choose auto, cpu, cuda",
    "--resume --overwrite": "exclude each other",
    "--resume": "checkpoint.pt does not exist: there is nothing to resume",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line_and_create_nothing(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*options.split(), "--out", "out") == 2
    assert BAD_OPTIONS[options] in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_a_folder(capsys):
    assert run("--resume") == 2
    assert "--resume needs --out" in one_line(capsys.readouterr().err)


def test_the_program_itself_exits_with_2():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--nonsense"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "unrecognized arguments: --nonsense" in one_line(result.stderr)


def test_an_empty_name_is_not_the_current_folder(capsys):
    """As of --out "$FOLDER" where the variable is not set."""
    assert run("--out", "") == 2
    assert "argument --out: the name of the folder is empty" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("rows", [2**50, 2**62], ids=["cannot be allocated", "cannot be counted"])
def test_too_little_memory_is_one_line(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "build_model", lambda config: torch.empty(rows, 4))
    assert run("--out", tmp_path / "out") == 2
    assert "more memory than the machine has: lower --width, --batch-size or --epochs" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_half_an_environment_of_torchrun_is_one_line(missing, tmp_path, monkeypatch, capsys):
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name in environment.keys() - {missing}:
        monkeypatch.setenv(name, environment[name])
    assert run("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(rf"WORLD_SIZE is set, but not by torchrun: .*{missing}", error)


def test_help_tells_what_a_user_has_to_know(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for code in ("0 done", "1 the loss is not finite", "2 a wrong option", "129 the terminal", "130 Ctrl-C", "143 SIGTERM"):
        assert code in told
    assert re.search("--accumulate N cut the batch into N parts.* batch normalisation, which resnet has, takes", told)
    assert re.search("--epochs N .*with --resume: more than before", told)


def test_a_run_on_digits_says_so(tmp_path, capsys):
    assert run("--width", 2, "--epochs", 1, "--out", tmp_path) == 0
    assert capsys.readouterr().out.startswith("data    digits (scikit-learn's, not CIFAR-10), 64 images for training")
    assert "scikit-learn's digits where" in (ROOT / "Makefile").read_text()


def test_missing_dependency_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("--out", tmp_path / "out") == 2
    assert "pip install 'fusedloss[train]'" in one_line(capsys.readouterr().err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert run("--width", 4, "--out", out) == 0
    return out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds the checkpoint of a run: --resume goes on with it, --overwrite starts afresh"),
        (["--resume", "--model", "tutorial"], "is of a run with --model resnet, not tutorial"),
        (["--resume", "--epochs", "1"], "is of a run with --epochs 2, not 1; only more epochs are possible"),
        (["--resume", "--lr", "0.5"], "is of a run with --lr 0.1, not 0.5"),
        (["--overwrite", "--data", "cifar10", "--data-dir", "/dev/null"], "CIFAR-10 is not in /dev/null/"),
    ],
)
def test_a_checkpoint_is_not_overwritten_by_another_run(finished, options, message, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:1/")
    before = contents(finished)
    assert main("--data", "digits", "--device", "cpu", *options, "--out", finished) == 2
    assert message in one_line(capsys.readouterr().err)
    assert contents(finished) == before
