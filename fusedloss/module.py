"""CrossEntropyLoss: torch.nn.CrossEntropyLoss with our function inside."""

from typing import Any

from torch import Tensor, nn

from fusedloss.functional import cross_entropy
from fusedloss.plan import EXTRAS

_OWN_EXTRAS = {name: default for name, default in EXTRAS._asdict().items() if name != "sample_weight"}  # which comes with a call


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
        z_loss, logit_scale, softcap, return_stats: as for `fusedloss.cross_entropy`.
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
        top_k: int | float | None = EXTRAS.top_k,
        scale: float | Tensor = EXTRAS.scale,
        z_loss: float = EXTRAS.z_loss,
        logit_scale: float = EXTRAS.logit_scale,
        softcap: float | None = EXTRAS.softcap,
        return_stats: bool = EXTRAS.return_stats,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.top_k = top_k
        self.scale = scale
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.return_stats = return_stats

    def forward(
        self,
        input: Tensor,
        target: Tensor | tuple[Tensor, Tensor, float | Tensor],
        *,
        scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Any:
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
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            return_stats=self.return_stats,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A module pickled or copied from nn.CrossEntropyLoss lacks the extras."""
        super().__setstate__(state)
        for name, default in _OWN_EXTRAS.items():
            self.__dict__.setdefault(name, default)
