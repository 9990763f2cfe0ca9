"""A call's tensors as the kernels take them: rows of logits (N, C) or (N, C, S), one value per row."""

from torch import Tensor

from fusedloss.plan import Inputs, spatial_dims_collapse
from fusedloss.plan_cpu import reads_planes


def kernel_inputs(inputs: Inputs, backend: str = "") -> Inputs:
    """The same as the kernels take them: logits (N, C) or (N, C, S), a view wherever strides allow; one value per row. The CPU's
    takes (N, C, H, W), too."""
    logits = inputs.logits
    if logits.dim() == 1:
        return inputs.as_one_row()
    if logits.dim() == 2:
        return inputs
    flat = inputs.with_rows_flat()
    soft = (inputs.target,) if inputs.has_probabilities() else ()
    if backend == "cpu" and reads_planes(logits, *soft):
        return flat
    return flat._replace(logits=rows_of(logits), target=rows_of(inputs.target) if soft else flat.target)


def expanded_to_rows(values: Tensor | None, logits: Tensor) -> Tensor | None:
    """One value per example as one per row, (N, d1, ...)."""
    if values is None:
        return None
    rows = logits.shape[:1] + logits.shape[2:]
    if 0 < values.dim() < len(rows):
        values = values.reshape(-1, *[1] * (len(rows) - 1))
    return values.expand(rows)


def rows_of(logits: Tensor) -> Tensor:
    """Logits or class probabilities (N, C, d1, ...) as (N, C) or (N, C, S); `Plan.copies_logits` tells where strides do not
    allow a view."""
    if logits.dim() > 3 and not spatial_dims_collapse(logits):
        logits = logits.contiguous()
    return logits.flatten(2) if logits.dim() > 3 else logits
