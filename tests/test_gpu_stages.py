"""The stages of benchmarks/gpu.py: how a command is run, stopped and watched, and what becomes of what it answered."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import launches
from gpu_stub import LAUNCHED, NCU, PYTEST, finished, smoke_records, stub_run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_pages
import gpu_run
import gpu_smoke
import gpu_stages
import gpu_traffic
import gpu_training

import fusedloss
from fusedloss.backends.triton.launching import kernels

PYTHON = [sys.executable, "-c"]


def nothing(_: list[Any]) -> None:
    pass


# -------------------------------------------------------------------------------------------------- running a command


def test_records_come_while_the_command_runs() -> None:
    seen = []
    script = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); from gpu_run import emit\n"
        "emit({'n': 1}); time.sleep(1); emit({'n': 2}); print('done')"
    )
    finished = gpu_run.run([*PYTHON, script], 30, None, lambda records: seen.append(len(records)))
    assert finished.records == [{"n": 1}, {"n": 2}]
    assert (finished.status, finished.output, finished.hung) == (0, "done\n", False)
    assert seen[0] == 1


def test_what_a_stopped_command_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compute-sanitizer, which leaves Python on the GPU."""
    monkeypatch.setattr(gpu_run, "SECONDS_TO_END", 0.2)
    pid_file = str(tmp_path / "pid")
    child = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({pid_file!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    finished = gpu_run.run([*PYTHON, script], 2)
    assert finished.status is None
    assert finished.seconds < 10
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_command_that_falls_silent_has_hung() -> None:
    script = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); from gpu_run import emit\n"
        "emit({'case': 'a', 'outcome': 'started'}); time.sleep(60)"
    )
    finished = gpu_run.run([*PYTHON, script], 30, 1.0)
    assert finished.hung
    assert finished.status is None
    assert finished.seconds < 15


# ------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("answer", "verdict", "n_right", "failures"),
    [
        (finished(records=smoke_records(*["right"] * 16)), "passed", 16, []),
        (
            finished("", 1, smoke_records("right", "AssertionError: x", "right")),
            "failed",
            2,
            ["many programs: AssertionError: x"],
        ),
        (finished("", None, smoke_records("right", ""), hung=True), "failed", 1, ["many programs: hung for 20 s"]),
        (finished("fault", -11, smoke_records("right", "")), "failed", 1, ["many programs: ended the process: fault"]),
        (finished("", None, smoke_records("right", "")), "stopped", 1, []),  # out of time is no hang
        (finished("no module", 1), "failed", 0, []),
    ],
)
def test_smoke(monkeypatch: pytest.MonkeyPatch, answer: Any, verdict: str, n_right: int, failures: list[str]) -> None:
    stub_run(monkeypatch, [answer])
    found = gpu_stages.smoke(40, nothing)
    assert (found["verdict"], found["failures"]) == (verdict, failures)
    assert found["outcome"].startswith(f"{n_right} of 16 cases right")


SUMMARY = """SKIPPED [4] tests/test_gpu.py:195: fewer than two GPUs
FAILED tests/test_gpu.py::test_b - AssertionError: FAILED
ERROR tests/test_torch_suite.py - ModuleNotFoundError: No module named 'expecttest'
"""


def test_pytests_lines_are_counted() -> None:
    found = gpu_stages.counted(finished(PYTEST + SUMMARY, 1))
    assert found["outcome"] == "1 passed, 1 failed, 1 errors, 1 skipped"
    assert found["verdict"] == "failed"
    assert found["failures"][0] == "tests/test_gpu.py::test_b - AssertionError: FAILED"
    assert len(found["failures"]) == 2
    assert found["left_out"] == ["4 x fewer than two GPUs"]


def test_a_stage_that_was_stopped_says_what_it_did() -> None:
    passing = PYTEST.replace("FAILED", "PASSED")
    found = gpu_stages.counted(finished(passing, None))
    assert (found["verdict"], found["outcome"]) == ("stopped", "2 passed, 1 skipped; stopped after 12 s")
    found = gpu_stages.counted(finished(PYTEST, None))
    assert (found["verdict"], found["failures"]) == ("failed", ["tests/test_gpu.py::test_b"])


SHARDS = """
def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1")

def pytest_collection_modifyitems(config, items):
    first, step = map(int, config.getoption("--shard").split("/"))
    items[:] = items[first::step]
"""


@pytest.mark.parametrize("parallel", [False, True])
def test_one_file_that_cannot_be_imported_is_not_the_end_of_the_others(tmp_path: Path, parallel: bool) -> None:
    (tmp_path / "conftest.py").write_text(SHARDS)
    (tmp_path / "test_a.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "test_b.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_b():\n    pass\n\n\n@pytest.mark.gpu\ndef test_c():\n    pass"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\naddopts = -q -ra")
    found = gpu_stages.pytest_stage(str(tmp_path))(60, nothing)
    assert found["verdict"] == "failed"
    assert found["outcome"] == "2 passed, 1 errors"
    assert len(found["failures"]) == 1
    assert "test_a.py" in found["failures"][0]


def test_bytes_of_dram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/{name}")
    others = [{"case": case, "shape": [1, 1], "floor": 1} for case in gpu_traffic.CASES if case != "Llama 2"]
    all_rows = NCU + "".join(line.replace("Llama 2", other["case"]) for other in others for line in NCU.splitlines(True)[2:])
    answers = [finished(all_rows, 0, LAUNCHED + others), finished(NCU, 0, LAUNCHED + others), finished("ERR_NVGPUCTRPERM", 1)]
    commands = stub_run(monkeypatch, answers)
    found = gpu_stages.traffic(40, nothing)
    assert "--clock-control=none" in commands[0]
    assert found["records"][0] == {**LAUNCHED[0], "read": 1524.0, "written": 1024.0, "launches": 2}
    assert (found["verdict"], found["outcome"]) == ("passed", "5 of 5 launches counted")
    some = gpu_stages.traffic(40, nothing)
    assert (some["verdict"], some["outcome"]) == ("failed", "1 of 5 launches counted")
    page = gpu_pages.traffic({"stages": {"traffic": found}})
    assert "| Llama 2, 8192 x 32000 | 2 | 0 | 0 | 1.019 | yes |" in page
    assert gpu_stages.traffic(40, nothing)["verdict"] == "left out"
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda _: None)
    assert gpu_stages.traffic(40, nothing)["outcome"] == "ncu is not installed"


def test_memcheck_of_eight_cases_that_are_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gpu_smoke.SANITIZED) == 8
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/{name}")
    invalid = "========= Invalid __global__ read of size 4 bytes\n=========     at kernel\n========= ERROR SUMMARY: 1 error"
    warm, clean = finished(records=smoke_records("right")), finished("========= ERROR SUMMARY: 0 errors")
    commands = stub_run(monkeypatch, [warm, clean, warm, finished(invalid, 1), warm, finished("", None)])
    memcheck = gpu_stages.sanitizer("memcheck")
    assert memcheck(50, nothing)["verdict"] == "passed"
    assert commands[0][0] == sys.executable
    assert commands[1][:3] == ["/compute-sanitizer", "--tool", "memcheck"]
    found = memcheck(50, nothing)
    assert (found["verdict"], found["failures"]) == ("failed", ["Invalid __global__ read of size 4 bytes"])
    assert memcheck(50, nothing)["verdict"] == "stopped"


def test_training_with_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "TRAINING_PACKAGES", ())
    line = "epoch 8/8  test loss 0.1 accuracy  {}%  3.5 ms/step"
    answers = [finished(line.format(99.44)), finished(line.format(99.17)), finished(line.format(99)), finished(line.format(90))]
    commands = stub_run(monkeypatch, [*answers, finished("", 0), finished("", None)])
    found = gpu_stages.training(40, nothing)
    assert (found["verdict"], found["outcome"]) == (
        "passed",
        "99.44% right, 3.5 ms a step with fused, 99.17% right, 3.5 ms a step with torch; on scikit-learn's digits",
    )
    assert [command[command.index("--loss") + 1] for command in commands] == ["fused", "torch"]
    assert "train_cifar10.py" in commands[0][1]
    assert gpu_stages.training(40, nothing)["failures"] == ["the accuracies differ by 9.00%"]
    silent = gpu_stages.training(40, nothing)
    assert (silent["verdict"], silent["failures"]) == ("failed", ["fused: nothing was printed"])
    assert gpu_stages.training(40, nothing)["verdict"] == "stopped"


def test_training_on_made_images_where_packages_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_stages, "TRAINING_PACKAGES", ("a_package_that_is_not_there", "torch"))
    commands = []
    outcomes = []

    def here(command: list[str], *_: Any) -> gpu_run.Finished:
        commands.append(command)
        options = [*command[2:], "--epochs", "1", "--images", "64"]  # the last one counts
        options[options.index("cuda")] = "cpu"
        status = gpu_training.main(options)
        outcomes.append(capsys.readouterr().out)
        return finished(outcomes[-1], status)

    monkeypatch.setattr(gpu_training, "TEST_IMAGES", 32)
    monkeypatch.setattr(gpu_stages, "run", here)
    found = gpu_stages.training(40, nothing)
    assert found["verdict"] == "passed", found
    assert found["outcome"].endswith("; on made images, as the digits need a_package_that_is_not_there")
    assert [Path(command[1]).name for command in commands] == ["gpu_training.py"] * 2
    assert found["output"] == "".join(outcomes)


def test_smoke_cases_are_right_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case for case in gpu_smoke.CASES if case not in ("slices", "long rows")]
    assert gpu_smoke.main(cases, "cpu") == 0
    assert capsys.readouterr().out.count('"right"') == len(cases)
    monstrous = dict(gpu_smoke.CASES, wrong=((3, 10), torch.float32, {"dloss": float("nan"), "softcap": -1.0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_smoke, "CASES", monstrous)
        assert gpu_smoke.main(["wrong"], "cpu") == 1
    assert "ValueError" in capsys.readouterr().out


def test_options_of_ncu_name_both_metrics() -> None:
    metrics = next(option for option in gpu_traffic.OPTIONS if option.startswith("--metrics="))
    assert gpu_traffic.READ in metrics
    assert gpu_traffic.WRITTEN in metrics


@pytest.mark.parametrize("cases", [gpu_smoke.CASES, gpu_smoke.SANITIZED], ids=["smoke", "memcheck"])
def test_every_kernel_is_among_the_cases(monkeypatch: pytest.MonkeyPatch, cases: Any) -> None:
    """Of one GPU or the other: finish_kernel is MI300's."""
    launched = set()
    for case in cases:
        logits, target, weight, options = gpu_smoke.problem(case, "cpu")
        options.pop("dloss", None)
        call = partial(fusedloss.cross_entropy, logits.requires_grad_(), target, weight, **options)
        for target in ("sm_90", "gfx942"):
            launched |= {launch.kernel for launch in launches(monkeypatch, target, call)}
    assert launched == set(kernels())
