"""The README's code runs, block by block; its numbers are those of the files they come from; its links and names exist."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _block(word: str) -> str:
    (block,) = (block for block in BLOCKS if word in block)
    return block


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", "-", block[:40]) for block in BLOCKS])
def test_every_block_of_the_readme_runs_by_itself(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names.keys() & {"logits", "hidden"}


def test_the_readmes_plans(capsys: pytest.CaptureFixture[str]) -> None:
    exec(_block("fusedloss.plan("), {})
    assert re.search(r"^triton: .*programs", capsys.readouterr().out, re.DOTALL | re.MULTILINE)


def test_the_readmes_accumulation_is_the_mean_over_all() -> None:
    names: dict[str, object] = {}
    exec(_block("micro_batches"), names)
    micro_batches = names["micro_batches"]
    assert isinstance(micro_batches, list)
    logits = torch.cat([logits.detach() for logits, _ in micro_batches]).requires_grad_()
    torch.nn.functional.cross_entropy(logits, torch.cat([target for _, target in micro_batches])).backward()
    torch.testing.assert_close(torch.cat([part.grad for part, _ in micro_batches]), logits.grad)


def _table(first_header: str) -> list[list[str]]:
    """The rows of the README's table whose header starts so."""
    lines = README[README.index(f"| {first_header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readmes_defaults_are_those_of_the_function() -> None:
    parameters = inspect.signature(fusedloss.cross_entropy).parameters
    named = {name.strip("`"): default.strip("`") for name, default, _ in _table("argument")}
    assert named == {
        name: repr(parameter.default).replace("'", '"')
        for name, parameter in parameters.items()
        if name not in ("input", "target", "size_average", "reduce")  # the last two are deprecated
    }


def test_the_readmes_counts_are_those_of_the_report() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from kernel_pages import BEST_PEERS

    marks = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())["marks"]
    rows = _table("logits | instructions: ours")
    assert [row[0] for row in rows] == list(marks)
    for name, instructions, best_instructions, passes, best_passes, best in rows:
        ours, peer = marks[name]["ours"], BEST_PEERS[name]
        assert (instructions, passes) == (f"{ours['instructions']:.1f}", f"{ours['passes']:.2f}")
        assert (best, best_instructions, best_passes) == (peer[0], str(peer[1]), str(peer[2]))


def test_the_readmes_worst_cases_are_those_of_the_experiments() -> None:
    """Rows of EXPERIMENTS.md: noise, loss, rate, accuracy, worst class, percentile, largest loss."""
    lines = (ROOT / "benchmarks" / "EXPERIMENTS.md").read_text().splitlines()
    measured = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ % \| ", line)]
    cells = {(row[0], row[1]): (row[6].split(" ±")[0], row[4].split(" ±")[0] + " %") for row in measured}
    for name, *found in _table("minimised"):
        assert tuple(found) == cells["0 %", name] + cells["10 %", name]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_documents_name_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    named = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named += re.findall(r"`((?:tests|benchmarks|fusedloss|kernels)/[\w/*.]+)`", text)
    if name == "CONTRIBUTING.md":
        named += [
            f"tests/{test}" for test in re.findall(r"`(\w+\.py)`", text) if (test.startswith("test_") or test == "conftest.py")
        ]
    missing = [path for path in named if not list(ROOT.glob(path))]
    assert not missing


def test_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in DOCUMENTS:
        assert set(re.findall(r"(?:`|    )make ([\w-]+)", (ROOT / name).read_text())) <= targets


def test_public_names_are_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in set(fusedloss.__all__) - {"__version__"}:
        assert name in readme
        assert getattr(fusedloss, name).__doc__


def test_the_readmes_times_are_those_that_were_written() -> None:
    written = (ROOT / "benchmarks" / "results" / "bench_cpu.md").read_text()
    machine = written.splitlines()[0]
    assert f"({machine})" in README.replace("\n", " ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if line.startswith("| ")]
    assert _table("logits | eager") == [[row[0], *row[2:7]] for row in cells[1:]]


def test_imports_go_down_the_layout() -> None:
    """CONTRIBUTING lists every file of fusedloss/, and each one imports from files behind it only."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    layout = text[text.index("    fusedloss/   ") : text.index("    tests/  benchmarks/")]
    place = {name: at.start() for name in _modules() if (at := re.search(rf"(?<![\w.]){name}(\.py|/)", layout)) is not None}
    assert _modules().keys() - place.keys() == {"__init__", "__main__", "_version"}
    imported = {(name, other) for name in place for path in _modules()[name] for other in _imports(path) - {name, "kernels"}}
    assert not [(name, other) for name, other in imported if place[other] < place[name]]


def _modules() -> dict[str, list[Path]]:
    """The files of each module of fusedloss, of a folder all."""
    folder = ROOT / "fusedloss"
    files = {path.stem: [path] for path in folder.glob("*.py")}
    return {**files, **{path.name: sorted(path.rglob("*.py")) for path in folder.iterdir() if (path / "__init__.py").exists()}}


def _imports(path: Path) -> set[str]:
    """The modules of fusedloss that are imported at the head of a file."""
    found = set()
    for line in ast.parse(path.read_text()).body:
        if isinstance(line, ast.ImportFrom) and line.module is not None and line.module.split(".")[0] == "fusedloss":
            found |= {line.module.split(".")[1]} if "." in line.module else {name.name for name in line.names}
    return found
