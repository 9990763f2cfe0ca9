"""CrossEntropyLoss: torch.nn.CrossEntropyLoss with our function inside."""

from typing import Any

from torch import Tensor, nn

from fusedloss.functional import cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Softmax cross-entropy between logits and targets, reduced over the batch in the same kernel.

    Takes all that `torch.nn.CrossEntropyLoss` takes, in the same order, with the same meaning, attributes, repr and
    state_dict; see `fusedloss.cross_entropy` for the formulas, shapes, dtypes and errors.

    Args:
        weight: (C,), a factor per class; see `torch.nn.CrossEntropyLoss`.
        size_average: deprecated, as in PyTorch.
        ignore_index: class index whose rows count for nothing.
        reduce: deprecated, as in PyTorch.
        reduction: "none", "sum", "mean", "max" or "topk".
        label_smoothing: in [0, 1].
        top_k: only for "topk": an int, or a fraction of the counted rows as a float.
        scale: factor of the loss and its gradient: a number or a 0-d tensor, which may live on the GPU.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        top_k: int | float | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.top_k = top_k
        self.scale = scale

    def forward(self, input: Tensor, target: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
        """Returns the loss of `input` against `target`; `scale` here takes the place of the constructor's."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            top_k=self.top_k,
            scale=self.scale if scale is None else scale,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A module pickled or copied from nn.CrossEntropyLoss lacks the extras."""
        super().__setstate__(state)
        self.__dict__.setdefault("top_k", None)
        self.__dict__.setdefault("scale", 1.0)
