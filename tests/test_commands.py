"""What the commands print and write: `make test`'s three parts, and which tests they leave out."""

import os
import subprocess
import sys
from pathlib import Path

import parts
import pytest

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
