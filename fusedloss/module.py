"""CrossEntropyLoss: torch.nn.CrossEntropyLoss with our function inside."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar, Unpack  # as typing has them from Python 3.13 on; torch requires the package

from fusedloss.functional import cross_entropy
from fusedloss.plan import EXTRAS, ExtraKeywords, Reduction, Target
from fusedloss.serving import serve
from fusedloss.stats import LossStats

_OWN_EXTRAS = {name: default for name, default in EXTRAS._asdict().items() if name != "sample_weight"}  # which comes with a call

Result = TypeVar("Result", default=Tensor)


class CrossEntropyLoss(nn.CrossEntropyLoss, Generic[Result]):
    r"""Softmax cross-entropy between logits and targets, reduced over the batch in the same kernel.

    Takes all that `torch.nn.CrossEntropyLoss` takes, in the same order, with the same meaning, attributes and state_dict. A row's
    loss is, with z_n = softcap * tanh(logit_scale * x_n / softcap) (without softcap: logit_scale * x_n),

        sample_weight_n * ( (1 - p_n)**focal_gamma * PyTorch's loss of z_n with weight and label_smoothing
                            + z_loss * logsumexp(z_n)**2 )

    with p_n = softmax(z_n)[target_n], and a call returns scale times their reduction. `fusedloss.cross_entropy` has
    shapes, dtypes and errors in full.

    Args:
        weight: (C,), a factor per class, in the logits' dtype; a buffer.
        size_average: deprecated, overrides reduction as in PyTorch.
        ignore_index: rows with this class index are ignored.
        reduce: deprecated, overrides reduction as in PyTorch.
        reduction: "none", one loss per row; "sum"; "mean", over the rows that count; "max", the largest loss; "topk", the average
            of the top_k largest.
        label_smoothing: eps in [0, 1]: (1 - eps) of the loss plus eps times the average over all classes.
        top_k: for reduction "topk" only: an int (rows), or a float in (0, 1], a fraction of the counted rows.
        scale: factor of the loss and of its gradient: a number, or a 0-d floating point tensor, which is read on its device
            without synchronisation, and moved and converted with the module by `.to()`; it is no part of the state_dict.
        z_loss: factor of the squared log-sum-exp.
        logit_scale: factor of the logits, a number.
        softcap: positive bound of the logits, after logit_scale.
        focal_gamma: exponent of the focal loss, at least 0; for class indices without label_smoothing.
        return_stats: calls return (loss, `fusedloss.LossStats`).
        out_dtype: dtype of the loss; None: PyTorch's. torch.float32: as it was accumulated.

    A call takes input and target, and by keyword `sample_weight`, a factor per row, and `scale`, which takes the place of the
    constructor's.
    """

    if TYPE_CHECKING:  # TorchScript reads a class's annotations, and knows none of these
        reduction: Reduction
        __call__: Callable[..., Result]

    # fmt: off
    @overload
    def __init__(
        self: "CrossEntropyLoss[Tensor]", weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
        label_smoothing: float = 0.0, *, return_stats: Literal[False] = False, **extras: Unpack[ExtraKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "CrossEntropyLoss[tuple[Tensor, LossStats]]", weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
        label_smoothing: float = 0.0, *, return_stats: Literal[True], **extras: Unpack[ExtraKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "CrossEntropyLoss[Tensor | tuple[Tensor, LossStats]]", weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
        label_smoothing: float = 0.0, *, return_stats: bool, **extras: Unpack[ExtraKeywords],
    ) -> None: ...
    # fmt: on
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        top_k: int | float | None = EXTRAS.top_k,
        scale: float | Tensor = EXTRAS.scale,
        z_loss: float = EXTRAS.z_loss,
        logit_scale: float = EXTRAS.logit_scale,
        softcap: float | None = EXTRAS.softcap,
        focal_gamma: float = EXTRAS.focal_gamma,
        return_stats: bool = EXTRAS.return_stats,
        out_dtype: torch.dtype | None = EXTRAS.out_dtype,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.top_k = top_k
        self.scale = scale
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.focal_gamma = focal_gamma
        self.return_stats = return_stats
        self.out_dtype = out_dtype

    def forward(
        self,
        input: Tensor,
        target: Target,
        *,
        scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Any:
        """Returns the loss of `input` against `target`; `scale` here takes the place of the constructor's."""
        own = vars(self)  # the attributes one by one would take 2 % of the step of ten logits
        # fmt: off
        try:
            arguments = (
                self.ignore_index, None, None, self.reduction, self.label_smoothing, sample_weight,
                own["top_k"], own["return_stats"], own["z_loss"], own["logit_scale"], own["softcap"], own["focal_gamma"],
                own["out_dtype"],
            )
        except KeyError:  # one is a property of a subclass
            extras = (getattr(self, name) for name in EXTRAS._fields[2:])
            arguments = (self.ignore_index, None, None, self.reduction, self.label_smoothing, sample_weight, *extras)
        # fmt: on
        return serve(cross_entropy, input, target, self.weight, self.scale if scale is None else scale, arguments)

    def extra_repr(self) -> str:
        """The extras that are set; PyTorch's loss shows none of its own options."""
        extras = {"reduction": self.reduction} if self.reduction in ("max", "topk") else {}
        extras |= {name: getattr(self, name) for name in _OWN_EXTRAS}
        return ", ".join(
            f"{name}={value!r}" for name, value in extras.items() if isinstance(value, Tensor) or value != _OWN_EXTRAS.get(name)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CrossEntropyLoss[Result]":
        super()._apply(fn, recurse)
        apply_to_scale(self, fn)
        return self

    def __prepare_scriptable__(self) -> nn.CrossEntropyLoss:
        """What torch.jit.script compiles in place of this module: PyTorch's own, for it sees no kernel."""
        asked = [name for name, default in _OWN_EXTRAS.items() if getattr(self, name) != default]
        if asked or self.reduction not in ("none", "sum", "mean"):
            raise NotImplementedError(
                f"torch.jit.script compiles PyTorch's loss only, which has no {', '.join(asked) or self.reduction}"
            )
        loss = nn.CrossEntropyLoss(
            self.weight, ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=self.label_smoothing
        )
        return loss.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A module pickled or copied from nn.CrossEntropyLoss lacks the extras."""
        super().__setstate__(state)
        for name, default in _OWN_EXTRAS.items():
            self.__dict__.setdefault(name, default)


def apply_to_scale(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """A scale that is a tensor follows the buffers, as .to() moves them. It is none: a buffer cannot become a number."""
    scale = vars(module).get("scale")
    if isinstance(scale, Tensor):  # else a number, or a parameter
        with torch.no_grad():
            module.scale = fn(scale)
