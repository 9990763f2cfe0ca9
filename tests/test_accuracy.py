"""benchmarks/accuracy.py: its 50 digits agree with float64 where that is exact, and its page says what the kernels reach."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact import exact_loss_and_gradient

from benchmarks import accuracy
from fusedloss.backends import cpu

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", [case for case in accuracy.cases() if case.logits.numel() <= 16_000], ids=lambda case: case.name)
def test_fifty_digits(case: accuracy.Case) -> None:
    """mpmath against the formulas in float64: two ways to the same numbers."""
    dloss = torch.ones((), dtype=torch.float64)
    float64 = exact_loss_and_gradient(
        case.logits,
        case.target.double() if case.target.is_floating_point() else case.target,
        None,
        **case.options,
        dloss=dloss,
        resolution=0.0,
    )
    loss, high, _ = accuracy.exact(case, torch.float64)
    assert float(loss) == pytest.approx(float64.loss.item(), rel=1e-12)
    largest = float64.gradient.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(high), float64.gradient, rtol=1e-12, atol=1e-15 * largest)


@pytest.mark.skipif(cpu.LIBRARY is None, reason="no C++ kernel")
def test_a_case_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a page without rows, in the place of one with all."""
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "128 x 11"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "no case '128 x 11'" in capsys.readouterr().err


def test_the_page(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "a sure row: [40, 0]", "--output", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    line = re.search(r"\| fp32 \|(.*)\|", file.read_text())
    assert line is not None
    exact, torchs, kernel, reference, triton, *_ = (float(cell) for cell in line.group(1).split("|"))
    assert exact == pytest.approx(math.exp(-40), rel=1e-2)
    assert torchs == reference == 1.0  # 0 for 4.25e-18
    assert max(kernel, triton) < 1e-7
