"""What the tests compile on a GPU: the sample of their grids that runs there, and the count of kernel variants."""

import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
from covering import covering

GRID = [{"a": str(a), "b": str(b), "c": str(c)} for a, b, c in product(range(4), range(3), range(5))]


def test_every_value_is_kept() -> None:
    kept = [GRID[place] for place in covering(GRID, strength=1)]
    assert len(kept) == 5
    assert {value for case in kept for value in case.items()} == {value for case in GRID for value in case.items()}


def test_every_two_values_meet() -> None:
    grid = [case for case in GRID if case["a"] != case["b"]]  # what does not meet in the grid cannot
    kept = [grid[place] for place in covering(grid, strength=2)]
    assert len(kept) < len(grid) / 2
    pairs, all_pairs = ({pair for case in cases for pair in combinations(case.items(), 2)} for cases in (kept, grid))
    assert pairs == all_pairs


def test_a_test_of_one_parameter_keeps_all() -> None:
    assert covering([{"a": value} for value in "xyz"], strength=2) == [0, 1, 2]
    assert covering([{"a": "x"}], strength=1) == [0]


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "tests/test_reductions.py", *options]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_shards_have_all_tests_between_them() -> None:
    first, second = collected("--shard=0/2"), collected("--shard=1/2")
    assert abs(len(first) - len(second)) <= 1
    assert sorted(first + second) == sorted(collected())


def counted(*files: str) -> tuple[int, str]:
    """The last line's number, and all that was printed."""
    command = [sys.executable, "-W", "ignore", "tests/variants.py", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r" *(\d+)  kernel variants", done.stdout.splitlines()[-1])
    assert found is not None, done.stdout
    return int(found[1]), done.stdout


def test_the_variants_of_a_file_are_counted() -> None:
    n, printed = counted("tests/test_reductions.py")
    by_kernel = [int(number) for number in re.findall(r"^ +(\d+)  \w+_kernel$", printed, re.MULTILINE)]
    assert n == sum(by_kernel) > 10
    assert f"{n:5}  first in test_reductions.py" in printed


@pytest.mark.sweep  # a minute
def test_the_gpu_tests_compile_fewer_than_900_variants() -> None:
    assert 500 < counted()[0] < 900
