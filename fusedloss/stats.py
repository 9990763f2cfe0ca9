"""What `return_stats=True` gives besides the loss."""

from typing import NamedTuple

from torch import Tensor


class LossStats(NamedTuple):
    """Statistics of a call, made in the kernel's one launch; they stay on the logits' device and carry no gradient.

    Rows are what `reduction="none"` has a loss for: (N,) for logits (N, C), (N, d1, ...) for (N, C, d1, ...), () for (C,).
    Per-row values are float32, float64 for float64 logits, and 0 for ignored rows.

    Attributes:
        lse: log-sum-exp of each row's logits (after `logit_scale` and `softcap`).
        row_loss: each row's loss (with `sample_weight` and `z_loss`, without `scale`).
        n_counted: 0-d int64, rows that are not ignored.
        n_correct: 0-d int64, counted rows whose target has the largest logit, alone or with others; of two labels, or of
            probabilities, one whose share is the largest.
        worst: 0-d int64, index into the flattened rows of the largest loss among the counted, the first of equal ones; a NaN is
            the largest. -1 where no row is counted.
    """

    lse: Tensor
    row_loss: Tensor
    n_counted: Tensor
    n_correct: Tensor
    worst: Tensor
