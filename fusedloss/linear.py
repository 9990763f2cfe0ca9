"""linear_cross_entropy(): torch.nn.functional.linear_cross_entropy's signature, with the extras but focal_gamma."""

from typing import Any

import torch
from torch import Tensor

from fusedloss.linear_serving import serve
from fusedloss.plan import EXTRAS, Reduction, Target


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    top_k: int | float | None = EXTRAS.top_k,
    scale: float | Tensor = EXTRAS.scale,
    sample_weight: Tensor | None = EXTRAS.sample_weight,
    z_loss: float = EXTRAS.z_loss,
    logit_scale: float = EXTRAS.logit_scale,
    softcap: float | None = EXTRAS.softcap,
    return_stats: bool = EXTRAS.return_stats,
    out_dtype: torch.dtype | None = EXTRAS.out_dtype,
    chunk_rows: int | None = None,
    compact: bool = False,
) -> Any:  # Tensor, or (Tensor, LossStats) with return_stats
    r"""The cross-entropy of a linear layer's outputs, input @ linear_weight.T + linear_bias, which are never stored.

    The signature is that of `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13), and the value that of
    `fusedloss.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`. The rows are taken in chunks: the logits
    of a chunk are made, and their gradient in the same memory, before those of the next. "sum" and "mean" make the gradients of
    the layer in the forward, with the three matmuls that training needs anyway; the other reductions compute the logits once more
    in the backward, "max" and "topk" only those of the selected rows. So does float16, of which a gradient would underflow if it
    were rounded before GradScaler's factor comes with the backward: four matmuls. Ignored rows cost none on a CPU, nor on a GPU
    with `compact`.

    Args:
        input: (F,), (N, F) or (N, d1, ..., F), what the last layer is applied to.
        linear_weight: (C, F); or (C, d1, ..., F) with an input (N, F), which takes PyTorch's layer and stores the logits.
        target: class indices of input's shape without F; class probabilities, with C in the place of F; or two labels and the
            share of the first, (target_a, target_b, lam), as in `cross_entropy`.
        linear_bias: (C,), or linear_weight's shape without F.
        weight, reduction, label_smoothing: as for `cross_entropy`.
        ignore_index: rows with this class index are ignored; None: -100. Not for class probabilities.
        options: a `torch.nn.LinearCrossEntropyOptions`: its batch_chunk_size is chunk_rows; with acc_policy "accurate", or an
            acc_dtype of float32, the gradient of a bfloat16 or float16 linear_weight is summed in float32, as it always is
            over more than 2 chunks.
        top_k, scale, sample_weight, z_loss, logit_scale, softcap, return_stats, out_dtype: as for `cross_entropy`, a row
            being one of input. With reduction "none" the statistics' `entropy` has a gradient here, too: no matmul more, but in
            the backward the memory of one more chunk.
        chunk_rows: rows of a chunk; None: as many as have 64 MiB of logits, but 256 at least (on a GPU 250 MB and 2048). Where a
            CPU makes only losses, None is up to 2048, or as many as have 1 MB of logits, and 32 MB of their logits exist at a
            time: a block of classes.
        compact: on a GPU, too, rows that are ignored, or that "max" and "topk" do not select, are left out of the matmuls; the
            host waits for their number, twice for those two. On a CPU they always are.

    Returns:
        The loss in out_dtype, by default in input's (float32 under autocast, for which the layer's operands are cast as F.linear
        casts them): 0-d, or input's shape without F for reduction "none". With return_stats (loss, stats).

    Raises:
        RuntimeError: shapes or dtypes do not fit; linear_weight has no elements; ignore_index with class probabilities.
        ValueError: chunk_rows below 1, or another than options.batch_chunk_size.
        What `cross_entropy` raises.

    References:
        Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy: the same loss without stored logits); Hsu et al. 2024,
        arXiv:2410.10989 (Liger: gradients of the layer made in the forward, a chunk of rows at a time).
    """
    return serve(
        linear_cross_entropy,
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options,
        top_k=top_k,
        scale=scale,
        sample_weight=sample_weight,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        return_stats=return_stats,
        out_dtype=out_dtype,
        chunk_rows=chunk_rows,
        compact=compact,
    )
