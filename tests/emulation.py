"""An emulated GPU, for the tests whose launches run there. Without the emulator beside the checkout they are skipped."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fusedloss

SHARED = Path(__file__).parents[2] / "shared"
if not (SHARED / "ptxsim").is_dir():
    pytest.skip("../shared/ptxsim is not there", allow_module_level=True)
sys.path.insert(0, str(SHARED))
ptxsim = pytest.importorskip("ptxsim")

RESIDENT = 64  # programs at once. Slices of a row wait for each other: fewer than a row has would be a GPU that cannot run them


@contextmanager
def emulated(**options: Any) -> Iterator[Any]:
    """Launches inside run on an emulated sm_90; afterwards, fails on any race or read of what nobody wrote."""
    options = {"resident": RESIDENT, **options}
    with ptxsim.emulated_gpu("sm_90", global_race=True, **options) as gpu, fusedloss.backend("triton"):
        yield gpu
    assert gpu.launches
    for launch in gpu.launches:
        assert (launch.shared_races, launch.global_races, launch.uninit_shared_reads) == (0, 0, 0), launch


def launched(gpu: Any) -> dict[str, Any]:
    return {launch.kernel: launch for launch in gpu.launches}
