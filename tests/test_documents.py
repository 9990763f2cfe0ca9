"""The README's code runs, and its links and names exist."""

import re
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_the_readmes_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In order, in one namespace, as a reader would."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() > 0
    assert re.search(r"^triton: .*programs", capsys.readouterr().out, re.DOTALL | re.MULTILINE)


def test_the_readmes_accumulation_is_the_mean_over_all() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    exec("\n".join(blocks[:2]), names)
    micro_batches = names["micro_batches"]
    assert isinstance(micro_batches, list)
    logits = torch.cat([logits.detach() for logits, _ in micro_batches]).requires_grad_()
    torch.nn.functional.cross_entropy(logits, torch.cat([target for _, target in micro_batches])).backward()
    torch.testing.assert_close(torch.cat([part.grad for part, _ in micro_batches]), logits.grad)


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
