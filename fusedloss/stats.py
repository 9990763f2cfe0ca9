"""What `return_stats=True` gives besides the loss."""

from typing import NamedTuple

from torch import Tensor


class LossStats(NamedTuple):
    """Statistics of a call, made in the kernel's one launch; they stay on the logits' device.

    They carry no gradient but one: under `reduction="none"` that of `entropy`, for an entropy bonus beside the rows' losses. Its
    backward reads the logits once more, by PyTorch's operators, a chunk of rows at a time, and adds to the loss's gradient;
    `plan` does not count it. Where `entropy` enters no loss it costs nothing. `linear_cross_entropy` makes the logits again
    in the backward anyway, and holds a chunk's gradient of the entropies besides.

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
        entropy: -sum_c p_c log p_c of each row's probabilities, the softmax of its logits (after `logit_scale` and `softcap`).
    """

    lse: Tensor
    row_loss: Tensor
    n_counted: Tensor
    n_correct: Tensor
    worst: Tensor
    entropy: Tensor

    def of_rows(self, shape: tuple[int, ...]) -> "LossStats":
        """The same with rows of this shape."""
        lse, row_loss, n_counted, n_correct, worst, entropy = self
        # No _replace: torch 2.11's compiler returns no tuple that was made by it.
        return LossStats(lse.reshape(shape), row_loss.reshape(shape), n_counted, n_correct, worst, entropy.reshape(shape))
