"""The gradient of the rows' entropies: for upstream gradients h_n, -h_n p_c (log p_c + H_n) times dz_c/dx_c.

No kernel has it. PyTorch's operators add it to the gradient of the loss, for a chunk of rows at a time, so that what they hold on
the way is small beside the logits.
"""

import math

import torch
from torch import Tensor

from fusedloss.plan import Inputs, Options, counted_rows
from fusedloss.shards import transformed

# Logits of a chunk, of which the operators hold a few copies. On the CPU they stay in the caches: 2**22 took 1.5 times as long.
CPU_CHUNK, CHUNK = 2**18, 2**22


def add_gradient(
    dlogits: Tensor,
    dentropy: Tensor,  # (n_rows,)
    inputs: Inputs,  # as the kernels take them
    options: Options,
    whole_rows: tuple[Tensor, ...] = (),  # of rows of which the logits are a shard: maximum, log d and entropy, (n_rows,) each
) -> None:
    """dlogits += the gradient, which is 0 of ignored rows."""
    logits = inputs.logits
    counted = torch.ones_like(dentropy, dtype=torch.bool)
    if not inputs.has_probabilities():
        counted = counted_rows(options.ignore_index, inputs.target, inputs.target_b)
    rows = (logits.shape[0], 1, *logits.shape[2:])
    chunks = (_chunks(values, logits) for values in (logits, dlogits))
    of_rows = (_chunks(values.reshape(rows), logits) for values in (dentropy, counted, *whole_rows))
    for x, dx, h, is_counted, *whole in zip(*chunks, *of_rows, strict=True):
        z, derivative = transformed(x, options)
        if whole:
            largest, log_d, entropy = whole
            log_p = (z - largest) - log_d
        else:
            log_p = z.log_softmax(1)
        p = log_p.exp()
        log_p = log_p.masked_fill(p == 0, 0)
        if not whole:
            entropy = -(p * log_p).sum(1, keepdim=True)
        dx -= torch.where(is_counted & (h != 0), h * p * (log_p + entropy) * derivative, 0)


def _chunks(values: Tensor, logits: Tensor) -> list[Tensor]:
    """Values (N, C or 1), (N, C or 1, S) or (N, C or 1, H, W), cut where logits of so many rows would be cut."""
    chunk = CPU_CHUNK if logits.device.type == "cpu" else CHUNK
    n_rows = max(1, chunk // max(1, logits.shape[1]))
    if logits.dim() == 2:
        return list(values.split(n_rows))
    n_inner, n_line = max(1, math.prod(logits.shape[2:])), max(1, math.prod(logits.shape[3:]))
    lines = max(1, n_rows // n_line)
    return [part for examples in values.split(max(1, n_rows // n_inner)) for part in examples.split(lines, 2)]
