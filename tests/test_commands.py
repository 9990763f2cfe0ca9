"""What the commands print and write: `make test`'s three parts, and which tests they leave out; `make bench` on a CPU."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import parts
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_cpu

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are installed take seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def _parts(folder: Path, **sources: str) -> tuple[parts.Part, ...]:
    """Parts of one file each, without this project's options."""
    for name, source in sources.items():
        (folder / f"test_{name}.py").write_text(source)
    options = ("-q", "-ra", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}")
    return tuple(parts.Part(name, (*options, str(folder / f"test_{name}.py"))) for name in sources)


def test_the_closing_line_adds_up_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    good = "import pytest\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): pytest.skip('no reason')\n"
    monkeypatch.setattr(parts, "PARTS", _parts(tmp_path, first=good, second=good, third=good))
    assert parts.main([]) == 0
    output = capfd.readouterr().out
    assert output.splitlines()[-1] == "6 passed, 0 failed, 3 skipped"
    for name in ("first", "second", "third"):
        assert f"{name:11s} | ..s" in output
    assert parts.main(["--part", "second", "-k", "test_a"]) == 0
    output = capfd.readouterr().out
    assert output.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"
    assert "first" not in output
    assert parts.main(["--part", "first", "-k", "nothing"]) == parts.NOTHING_TO_RUN


def test_a_failure_an_error_and_a_dead_part_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = (
        "import pytest\n@pytest.fixture\ndef f(): 1 / 0\ndef test_a(f): pass\ndef test_b(): assert False\ndef test_c(): pass\n"
    )
    dying = "import os\ndef test_a(): os._exit(7)\n"
    monkeypatch.setattr(parts, "PARTS", _parts(tmp_path, failing=failing, dying=dying, broken="1 / 0\n"))
    assert parts.main([]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 4 failed, 0 skipped"
    assert "dying       | FAILED dying: it ended with status 7" in lines
    assert any(line.startswith("failing     | FAILED ") and "test_b" in line for line in lines[-8:])


def test_ci_prints_the_closing_line_last() -> None:
    """make would print a line of its own after it, of a failure."""
    *_, check, setup, last = (ROOT / ".ci" / "run").read_text().splitlines()
    assert (check, setup.split("#")[0].strip(), last) == ("make check", "make setup", "exec .venv/bin/python tests/parts.py")
    recipes = (ROOT / "Makefile").read_text()
    assert "\ntest: $(READY)\n\t$(PY) tests/parts.py $(ARGS)\n" in recipes


def test_what_cannot_run_here_is_left_out_in_one_line() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
        "tests/test_sweep.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    for reason in ("need a GPU", "need TRITON_INTERPRET=1 before triton is imported", "part of the whole sweep: make test-all"):
        assert output.count(f"tests left out: {reason}") == 1
    assert "SKIPPED" not in output
    assert " deselected" in output.splitlines()[-1]


def test_make_bench_prints_row_by_row_and_writes_a_table_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    printed = []

    def measure(case: bench_cpu.Case, seconds: float) -> dict[str, float]:
        printed.append(capsys.readouterr().out)
        return real(case, 0.01)

    real = bench_cpu.measure
    monkeypatch.setitem(bench_cpu.CALLS, "compile", F.cross_entropy)
    cases = [bench_cpu.Case(torch.float32, (7, 5)), bench_cpu.Case(torch.bfloat16, (6, 11), 0.1)]
    monkeypatch.setattr(bench_cpu, "QUICK", cases)
    monkeypatch.setattr(bench_cpu, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", "--quick", "--threads=1", f"--out={tmp_path}"])
    bench_cpu.main()
    assert bench_cpu.HEADER in printed[0]
    assert printed[1].startswith("| float32 7 x 5 | ")
    text = (tmp_path / "bench_cpu.md").read_text()
    header, _, first, second = text[text.index("| logits") :].splitlines()[:4]
    assert first == printed[1].strip()
    assert second.startswith("| bfloat16 6 x 11, smoothing | ")
    assert first.count("|") == second.count("|") == header.count("|")
    # Every column is explained, and the machine is named.
    for name in header.strip("| ").split(" | "):
        assert re.search(rf"^- .*\b{name}\b.*:", bench_cpu.COLUMNS, re.MULTILINE), name
    assert bench_cpu.COLUMNS in text
    assert text.startswith(bench_cpu.machine())
    assert (tmp_path / "bench_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench_cpu.md", "bench_cpu.png"]


@pytest.mark.parametrize("script", ["accuracy", "kernel_report"])
def test_tracked_pages_are_written_only_when_asked_to(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    tracked = tmp_path / "tracked"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "FOLDER" if script == "kernel_report" else "PAGE", tracked)
    if script == "kernel_report":
        monkeypatch.setattr(module, "collect", lambda *_: {"cases": []})
        monkeypatch.setattr(module, "write", lambda data, folder: f"page of {folder}")
        monkeypatch.setattr(module.emulated, "emulator", lambda: None)
    else:
        monkeypatch.setattr(module, "page", lambda cases: "the page")
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    module.main()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--update"])
    if script == "accuracy":
        module.main()
        assert tracked.read_text() == "the page\n"
        return
    with pytest.raises(SystemExit) as stopped:  # without the emulator its columns would be lost
        module.main()
    assert stopped.value.code == 2
    assert "nothing was written" in capsys.readouterr().out
    monkeypatch.setattr(module.emulated, "emulator", lambda: object())
    module.main()
    assert (tracked / "results" / "kernels.json").exists()


def test_pytest_benchmark_saves_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's benchmarks run, one group for each case and phase; those of a GPU are left out in one line."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    chosen = "float32-128x10 and not compile or bench_gpu and CIFAR and eager"
    options = ["benchmarks", "--benchmark-only", f"--benchmark-storage={tmp_path}", "-p", "no:cacheprovider", "-k", chosen]
    program = "import pytest; print('=', *[pytest.main([*{0}, option]) for option in {1}])"  # imports torch's compiler once
    program = program.format(options, ["--benchmark-save=before", "--benchmark-compare"])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "= 0 0", output
    assert output.count("they need a GPU, and torch.cuda sees no GPU") == 2
    assert len(re.findall("^6 passed, ", output, re.MULTILINE)) == 2
    for phase in ("forward", "backward", "both"):
        for tests in (2, 4):  # and of the earlier run, beside which they stand
            assert f"benchmark 'float32 128 x 10, {phase}': {tests} tests" in output


SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")
