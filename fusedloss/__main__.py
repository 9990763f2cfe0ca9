"""`python -m fusedloss`: versions, devices, and which backend serves each; the report to paste into an issue."""

import os
import platform

import torch

from fusedloss import __version__, backends
from fusedloss.backends import cpu


def report() -> str:
    """Versions, devices, backends, and why one is missing."""
    lines = [
        f"fusedloss {__version__}, torch {torch.__version__}, triton {_triton()}, Python {platform.python_version()}",
        f"machine   {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        f"backend   {backends.requested} (FUSEDLOSS_BACKEND or `with fusedloss.backend(...)` asks for another)",
    ]
    if cpu.LIBRARY is None:
        lines.append(f"cpu       reference path: {cpu.MISSING}")
    else:
        pool = "PyTorch's OpenMP threads" if cpu.LIBRARY.gomp_parallel else "threads of its own, no OpenMP runtime found"
        lines.append(f"cpu       compiled kernel, {cpu.LIBRARY.isa}, {pool}: {cpu.LIBRARY.path}")
    if not torch.cuda.is_available():
        lines.append("gpu       none that this torch can use")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        served = "Triton kernels" if _triton() != "missing" else "no backend: Triton is missing"
        lines.append(f"gpu {index}     {torch.cuda.get_device_name(index)}: {served}")
    return "\n".join(lines)


def _triton() -> str:
    try:
        from triton import __version__ as version  # not its distribution's, which has another name beside PyTorch for ROCm
    except ImportError:
        return "missing"
    return str(version)


if __name__ == "__main__":
    print(report())
