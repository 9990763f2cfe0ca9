"""Softmax cross-entropy and its batch reduction in one kernel: a drop-in for torch.nn.CrossEntropyLoss."""

from importlib.util import find_spec
from pathlib import Path

# An installed wheel holds fusedloss.kernels. In a checkout the folder is the top-level kernels/, found beside this package.
if find_spec("fusedloss.kernels") is None:
    __path__.append(str(Path(__file__).parent.parent))

from fusedloss import distributed
from fusedloss._version import __version__
from fusedloss.backends import backend
from fusedloss.explain import plan
from fusedloss.functional import cross_entropy
from fusedloss.linear import linear_cross_entropy
from fusedloss.linear_module import LinearCrossEntropyLoss
from fusedloss.module import CrossEntropyLoss
from fusedloss.overwriting import cross_entropy_overwriting_logits
from fusedloss.patch import patch_torch
from fusedloss.stats import LossStats
from fusedloss.warming import warmup

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LossStats",
    "__version__",
    "backend",
    "cross_entropy",
    "cross_entropy_overwriting_logits",
    "distributed",
    "linear_cross_entropy",
    "patch_torch",
    "plan",
    "warmup",
]
