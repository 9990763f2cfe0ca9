"""What reaches the driver: Triton's real launcher on a stub of libcuda. Needs a C compiler and no GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and a libcuda with it"),
]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs launch_check.py on the stub, in a process that has no other libcuda."""
    stub = tmp_path_factory.mktemp("stub")
    sources = [str(TESTS / "cuda_stub.c"), "-o", str(stub / "libcuda.so.1")]
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", *sources], check=True)
    (stub / "libcuda.so").symlink_to("libcuda.so.1")
    libraries = f"{stub}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", str(TESTS / "launch_check.py"), str(stub), *arguments]
        environment = {**os.environ, "TRITON_LIBCUDA_PATH": str(stub), "LD_LIBRARY_PATH": libraries}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_first_and_later_calls_launch_alike(check: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    from fusedloss.backends.triton.launching import kernels

    done = check()
    assert done.returncode == 0, done.stderr
    launched = {line.split()[1] for line in done.stdout.splitlines()}
    assert launched == set(kernels()), done.stdout


def test_arguments_that_change_places_are_noticed(check: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = check("--swap", "ragged rows")
    assert done.returncode == 1
    assert "AssertionError: scale_gradient_kernel, later call" in done.stderr or "fused_row_kernel, later call" in done.stderr
