"""The hard cases of the loss, ours and PyTorch's, against 50 digits. Prints a Markdown page, and writes it to runs/ACCURACY.md.

    make accuracy                              # takes minutes
    make accuracy ARGS=--update                # to benchmarks/ACCURACY.md instead

The exact values are mpmath's for the logits as they are in the dtype, so that an error is the computation's own:

    loss      |found - exact| / |exact|
    gradient  the same of the worst element, among those that the dtype can hold as normal numbers
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mpmath
import numpy
import torch
import torch.nn.functional as F
from files import write_atomically
from torch import Tensor

import fusedloss
from fusedloss.backends import cpu

PAGE = Path(__file__).parent / "ACCURACY.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TEXT = """# Accuracy

Written by `make accuracy`: relative errors of the mean loss, and of the worst element of its gradient, against 50 digits, on the
logits as the dtype has them. Right to the last place is {fp32} in fp32, {bf16} in bf16, {fp16} in fp16, {fp64} in fp64;
1.0e+00 is no digit at all, as of a 0 for something that is not 0; blank is what a backend does not cover or a dtype cannot
hold. cpu: the C++ kernel ({isa}). reference: PyTorch's operators as fusedloss calls them. triton: the GPU kernels under
Triton's interpreter, whose exp and log are numpy's, and which truncates to bf16 where a GPU rounds. torch {torch}.

{total} comparisons of a kernel with PyTorch, errors below half a unit in the last place counted as that: more than twice as
exact {better}, within a factor of 2 {alike}, less than half as exact {worse}:

{lines}
"""
Result = tuple[float, numpy.ndarray]  # loss, gradient in float64


@dataclass(frozen=True)
class Case:
    """One call; the logits are made in float64 and rounded to each dtype."""

    name: str
    logits: Tensor  # (N, C)
    target: Tensor  # (N,), or probabilities (N, C)
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(n_rows: int, n_cols: int) -> Tensor:
        return 2 * torch.randn(n_rows, n_cols, generator=generator, dtype=torch.float64)

    def classes(n_rows: int, n_cols: int) -> Tensor:
        return torch.randint(n_cols, (n_rows,), generator=generator)

    def row(*logits: float) -> Tensor:
        return torch.tensor([logits], dtype=torch.float64)

    first = torch.tensor([0])
    target = classes(64, 10)
    sure = normal(64, 10).scatter(1, target[:, None], 30.0)
    labels = (
        torch.zeros(16, 10)
        .scatter_(1, classes(16, 10)[:, None], 0.75)
        .scatter_add_(1, target[:16, None], torch.tensor(0.25).expand(16, 1))
    )
    return [
        Case("128 x 10, as in training", normal(128, 10), classes(128, 10)),
        Case("16 x 1000, label smoothing 0.1", normal(16, 1000), classes(16, 1000), {"label_smoothing": 0.1}),
        Case("a sure row: [40, 0]", row(40, 0), first),
        Case("a surer one: [80, 0, -2]", row(80, 0, -2), first),
        Case("64 sure rows", sure, target),
        Case("sure of the wrong class: [0, 40]", row(0, 40), first),
        Case("far apart: [-1e4, 1e4]", row(-1e4, 1e4), first),
        Case("improbable classes: [0, -50, -80]", row(0, -50, -80), first),
        Case("common offset 1e4", 1e4 + 8 * normal(16, 10).round(), classes(16, 10)),
        Case("mean over 40000 rows", normal(40_000, 4), classes(40_000, 4)),
        Case("50257 classes, label smoothing 0.1", normal(2, 50_257), classes(2, 50_257), {"label_smoothing": 0.1}),
        Case("128256 classes", normal(1, 128_256), classes(1, 128_256)),
        Case("two labels, 0.25 and 0.75", normal(16, 10), labels),
        Case("two labels, sure", 10 * normal(16, 10), labels),
    ]


def exact(case: Case, dtype: torch.dtype) -> tuple[mpmath.mpf, numpy.ndarray, numpy.ndarray]:
    """The mean and its gradient to 50 digits, the latter as the sum of two float64."""
    smoothing = mpmath.mpf(case.options.get("label_smoothing", 0.0))
    logits = case.logits.to(dtype).double()
    n_rows, n_cols = logits.shape
    total = mpmath.mpf(0)
    high, low = numpy.zeros(logits.shape), numpy.zeros(logits.shape)
    for i in range(n_rows):
        x = logits[i].tolist()
        top = max(x)
        e = [mpmath.exp(mpmath.mpf(value) - top) for value in x]
        d = mpmath.fsum(e)
        if case.target.dim() == 2:
            q = [mpmath.mpf(value) for value in case.target.to(dtype).double()[i].tolist()]
        else:
            q = [mpmath.mpf(0)] * n_cols
            q[int(case.target[i])] = mpmath.mpf(1)
        q = [(1 - smoothing) * value + smoothing / n_cols for value in q]
        q_sum = mpmath.fsum(q)
        total += q_sum * (top + mpmath.log(d)) - mpmath.fsum(a * b for a, b in zip(q, x, strict=True) if a)
        for c in range(n_cols):
            value = (q_sum * e[c] / d - q[c]) / n_rows
            high[i, c] = float(value)
            low[i, c] = float(value - high[i, c])
    return total / n_rows, high, low


def result(call: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> Result:
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    target = case.target.to(dtype) if case.target.is_floating_point() else case.target
    loss = call(logits, target, **case.options)
    loss.backward()
    assert logits.grad is not None
    return loss.double().item(), logits.grad.double().numpy()


def results(backend: str, chosen: list[Case]) -> dict[tuple[str, str], Result]:
    """Every case that the backend covers, in every dtype."""
    if backend == "PyTorch":
        return {(case.name, name): result(F.cross_entropy, case, dtype) for case in chosen for name, dtype in DTYPES.items()}
    with fusedloss.backend(backend):
        covered = [case for case in chosen if backend != "triton" or case.target.dim() == 1]
        return {
            (case.name, name): result(fusedloss.cross_entropy, case, dtype) for case in covered for name, dtype in DTYPES.items()
        }


def interpreted(names: list[str]) -> dict[tuple[str, str], Result]:
    """The Triton kernels' results, from a process of their own: TRITON_INTERPRET must be set before Triton is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.pt")
        command = [sys.executable, __file__, "--interpreted", str(file), *names]
        print("first, for minutes: the Triton kernels under the interpreter", file=sys.stderr)
        subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        return torch.load(file, weights_only=False)


def errors(
    found: Result | None, expected: tuple[mpmath.mpf, numpy.ndarray, numpy.ndarray], dtype: torch.dtype
) -> list[float | None]:
    """Relative errors of loss and gradient; None where the backend does not cover the case, or the dtype cannot hold it."""
    if found is None:
        return [None, None]
    loss, high, low = expected
    gradient = found[1]
    normal = numpy.abs(high) >= torch.finfo(dtype).smallest_normal
    if not normal.any():
        return [_loss_error(found[0], loss, dtype), None]
    worst = numpy.abs(((gradient - high) - low)[normal] / high[normal]).max()
    return [_loss_error(found[0], loss, dtype), float(worst)]


def _loss_error(found: float, expected: mpmath.mpf, dtype: torch.dtype) -> float | None:
    return None if expected < torch.finfo(dtype).smallest_normal else float(abs(mpmath.mpf(found) - expected) / expected)


def page(chosen: list[Case]) -> str:
    backends = ["PyTorch", *(["cpu"] if cpu.LIBRARY is not None else []), "reference"]
    found = {backend: results(backend, chosen) for backend in backends}
    found["triton"] = interpreted([case.name for case in chosen])
    rows, better, alike, worse = [], 0, 0, []
    for case in chosen:
        for name, dtype in DTYPES.items():
            expected = exact(case, dtype)
            cells = {backend: errors(part.get((case.name, name)), expected, dtype) for backend, part in found.items()}
            loss, gradient = zip(*cells.values(), strict=True)
            shown = mpmath.nstr(expected[0], 3)
            rows.append(
                f"| {case.name} | {name} | {shown} | {' | '.join(map(_cell, loss))} | {' | '.join(map(_cell, gradient))} |"
            )
            for kernel in set(cells) - {"PyTorch", "reference"}:
                for what, ours, theirs in zip(("loss", "gradient"), cells[kernel], cells["PyTorch"], strict=True):
                    if ours is None or theirs is None:
                        continue
                    # An error below half a unit of the last place is rounding of the result itself: nobody's merit.
                    ours, theirs = max(ours, torch.finfo(dtype).eps / 2), max(theirs, torch.finfo(dtype).eps / 2)
                    if ours > 2 * theirs:
                        worse.append(f"{case.name}, {name}, {kernel}, {what}: {ours / theirs:.1f} times")
                    better += theirs > 2 * ours
                    alike += ours <= 2 * theirs <= 4 * ours
    names = " | ".join(found)
    worse_lines = "\n".join(f"- {line}" for line in sorted(worse)) or "- none"
    text = TEXT.format(
        fp32=_cell(2**-24),
        bf16=_cell(2**-8),
        fp16=_cell(2**-11),
        fp64=_cell(2**-53),
        isa=cpu.ISA,
        torch=torch.__version__,
        total=better + alike + len(worse),
        better=better,
        alike=alike,
        worse=len(worse),
        lines=worse_lines,
    )
    header = [
        f"| | | | loss |{' |' * (len(found) - 1)} gradient |{' |' * (len(found) - 1)}",
        f"|---|---|---|{'---|' * 2 * len(found)}",
        f"| case | dtype | exact loss | {names} | {names} |",
    ]
    return "\n".join([text, *header, *rows])


def _cell(error: float | None) -> str:
    return "" if error is None else "0" if error == 0 else f"{error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases, by default all")
    parser.add_argument(
        "--interpreted", type=Path, help="save the Triton kernels' results here (of a process with TRITON_INTERPRET=1)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, default=Path("runs") / PAGE.name, help="the page to write")
    where.add_argument("--update", action="store_const", dest="output", const=PAGE, help=f"write {PAGE.name} beside this file")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if not arguments.cases or case.name in arguments.cases]
    if unknown := set(arguments.cases) - {case.name for case in chosen}:
        parser.error(f"no case {', '.join(map(repr, sorted(unknown)))}; there are: {'; '.join(case.name for case in cases())}")
    if arguments.interpreted:
        if not INTERPRETED:
            parser.error("--interpreted needs TRITON_INTERPRET=1")
        numpy.seterr(all="ignore")  # inf - inf in a masked lane: a GPU does not warn either
        torch.save(results("triton", chosen), arguments.interpreted)
        return
    text = page(chosen)
    print(text)
    write_atomically(arguments.output, text + "\n")
    print(f"written: {arguments.output}")


mpmath.mp.dps = 50

if __name__ == "__main__":
    main()
