"""Counts what PyTorch's own operators cost on a GPU, from the operators that a call dispatches: it needs no GPU.

Each operator reads its inputs and writes its outputs once. That is a lower bound: PyTorch's softmax reads a row that does not
fit shared memory two or three times.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operators that launch nothing: they allocate, or make a view (found from the schema, but one that autograd takes for none).
LAUNCH_NOTHING = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach, aten._unsafe_view
}  # fmt: skip
# The host waits for the device: .item() and bool(), torch.equal, torch.tensor(1.0, device="cuda").
WAIT = {aten._local_scalar_dense, aten.equal, aten.lift_fresh}
# Kernels inside one operator: equal compares, then asks whether all are; nll_loss_backward fills with zeros, then scatters.
KERNELS = {aten.equal: 2, aten.nll_loss_backward: 2, aten.nll_loss2d_backward: 2, aten._local_scalar_dense: 0, aten.lift_fresh: 0}
# Inputs of the logits' size of which one element per row is read.
GATHER = {aten.nll_loss_forward, aten.nll_loss_backward, aten.nll_loss2d_forward, aten.nll_loss2d_backward}


class TorchCost(TorchDispatchMode):
    """Inside, adds up kernel launches, waits of the host, and traffic of tensors with at least `n_elements` elements."""

    def __init__(self, n_elements: int) -> None:
        super().__init__()
        self.n_elements = n_elements
        self.launches = self.syncs = self.read_bytes = self.write_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":  # an operator of ours: what it calls counts
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        self.syncs += packet in WAIT
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if packet in LAUNCH_NOTHING or (is_view and packet not in WAIT):
            return result
        self.launches += KERNELS.get(packet, 1)
        self.write_bytes += self._traffic(result)
        if packet not in GATHER and not packet.__name__.startswith(("zeros", "ones", "full", "fill", "zero_", "new_")):
            self.read_bytes += self._traffic((args, kwargs))
        return result

    def _traffic(self, tensors: Any) -> int:
        large = {id(t): t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.numel() >= self.n_elements}
        # An expanded tensor is smaller in memory than it looks.
        return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in large.values())


def count(call: Callable[[], Tensor], n_elements: int) -> TorchCost:
    """The operators of `call` and of its backward."""
    with TorchCost(n_elements) as cost:
        call().backward()
    return cost
