"""Which implementation serves a call: the caller's request, from FUSEDLOSS_BACKEND or `with backend(...)`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from fusedloss import environment

Name = Literal["auto", "triton", "cpu", "reference"]


def _checked(name: str) -> str:
    if name not in get_args(Name):
        raise ValueError(f"backend must be one of {', '.join(get_args(Name))}, but got {name!r}")
    return name


_OUTSIDE = environment.choice("FUSEDLOSS_BACKEND", get_args(Name))  # of all blocks
_blocks: dict[object, str] = {}  # that were entered and not left, in this order; those of two threads may overlap

requested = _OUTSIDE  # by the latest block; read as backends.requested: it changes


@contextmanager
def backend(name: Name) -> Iterator[None]:
    """Forces one implementation for the calls inside the `with` block, in every thread of the process.

    Args:
        name: "triton" launches the Triton kernels whatever device the tensors are on, "cpu" is the compiled C++ kernel,
            "reference" is the composition of PyTorch operators in `fusedloss.reference`, "auto" chooses by device. A request
            that cannot be served raises; it never falls back.

    Raises:
        ValueError: `name` is none of these.
    """
    global requested
    block = object()
    _blocks[block] = requested = _checked(name)
    try:
        yield
    finally:
        del _blocks[block]
        requested = next(reversed(_blocks.values()), _OUTSIDE)
