"""What a call asks for (Options) and which path it takes (Plan): data, common to all backends."""

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Reduction = Literal["none", "sum", "mean", "max", "topk"]
Target = Tensor | tuple[Tensor, Tensor, float | Tensor]  # class indices or probabilities; two labels, the share of the first
ROW_REDUCTIONS = ("max", "topk")  # reductions that select rows by their loss


class Extras(NamedTuple):
    """The arguments beyond PyTorch's, as the caller gives them, and their defaults: their one definition.

    The scale comes first: all others are part of the key of a known call. NUMBERS lie between return_stats and out_dtype.
    """

    scale: float | Tensor = 1.0
    sample_weight: Tensor | None = None
    top_k: int | float | None = None
    return_stats: bool = False
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    focal_gamma: float = 0.0
    out_dtype: torch.dtype | None = None


EXTRAS = Extras()


class ExtraKeywords(TypedDict, total=False):
    """Extras for the type checker: without sample_weight, which modules do not have, and return_stats, which has overloads."""

    top_k: int | float | None
    scale: float | Tensor
    z_loss: float
    logit_scale: float
    softcap: float | None
    focal_gamma: float
    out_dtype: torch.dtype | None


NUMBERS = Extras._fields[4:-1]  # they change a row's loss; Options and the kernels have the same names for them


class Options(NamedTuple):
    """What the caller asked for, checked and normalised; the same for every backend.

    Here and below methods, not properties: torch.compile of torch 2.9 traces no property of a NamedTuple.
    """

    reduction: str = "mean"  # none, sum, mean, max, topk
    ignore_index: int = -100
    label_smoothing: float = 0.0  # in [0, 1]
    top_k: int = 0  # rows averaged by "topk"; 0: top_k_fraction tells
    top_k_fraction: float = 0.0  # of the counted rows, in (0, 1]
    scale: float = 1.0  # factor of the loss and its gradient
    z_loss: float = 0.0  # factor of the squared log-sum-exp, added to every row's loss
    logit_scale: float = 1.0  # factor of the logits
    softcap: float = 0.0  # bound of the logits, softcap * tanh(logits / softcap); 0: none
    focal_gamma: float = 0.0  # a row's loss is multiplied by (1 - p_t)^focal_gamma; 0: by nothing
    lam: float = 1.0  # share of the first of two labels; Inputs.lam takes its place
    return_stats: bool = False
    fuses_rows: bool = False  # for "none": the forward makes each row's gradient, too, for an upstream gradient of 1

    def fuses_gradient(self, dtype: torch.dtype) -> bool:
        """Whether the forward writes the gradient while it has the row at hand: the fused strategy, else recompute.

        "max" and "topk" know a row's coefficient only after the forward, and "none" in the backward: its gradient takes a pass
        more then, but the exponentials of few rows take longer. A gradient rounded to float16 before GradScaler's factor
        arrives underflows: p / N below 6e-8 would be 0.
        """
        return (self.reduction in ("sum", "mean") or self.fuses_rows) and dtype != torch.float16

    def differentiates_entropy(self) -> bool:
        """Whether one of the statistics has a gradient."""
        return self.return_stats and self.reduction == "none"

    def of_one_row(self) -> "Options":
        """The same for a single row, which is as well summed as left alone: a sum's gradient is made with the loss."""
        return self if self.reduction != "none" or self.return_stats else self._replace(reduction="sum")

    def kind(self) -> "Options":
        """The key of what is decided once for all calls alike: without the numbers that are others in every step."""
        return self if self.scale == 1 and self.lam == 1 else self._replace(scale=1.0, lam=1.0)

    def non_default_numbers(self, besides: tuple[str, ...] = ()) -> list[str]:
        """Names of the NUMBERS that differ from their default, but for those in `besides`, which the calling code supports."""
        return [name for name in NUMBERS if name not in besides and getattr(self, name) != getattr(DEFAULTS, name)]

    def has_extras(self) -> bool:
        """Whether a row takes more registers than PyTorch's own loss does."""
        return self.return_stats or len(self.non_default_numbers()) > 0


DEFAULTS = Options()


class Inputs(NamedTuple):
    """The tensors of a call: as the caller has them, or as the kernels do (rows.kernel_inputs)."""

    logits: Tensor  # (N, C, d1, ...); for the kernels (N, C) or (N, C, S)
    target: (
        Tensor  # class indices (N, d1, ...), or probabilities of the logits' shape; for the kernels (n_rows,), or as the logits
    )
    target_b: Tensor | None = None  # the second of two labels, like target
    lam: Tensor | None = None  # share of the first of two labels: (N, d1, ...); for the kernels (n_rows,)
    weight: Tensor | None = None  # (C,), a factor per class
    sample_weight: Tensor | None = None  # (N, d1, ...), a factor per row; for the kernels (n_rows,)
    scale: Tensor | None = None  # 0-d, on top of Options.scale

    def with_rows_flat(self) -> "Inputs":
        """The same, tensors of one value per row as (n_rows,). Probabilities have more than one, and flattening may copy them."""
        _, target, target_b, lam, _, sample_weight, _ = self
        return self._replace(
            target=target if self.has_probabilities() else target.reshape(-1),
            target_b=None if target_b is None else target_b.reshape(-1),
            lam=None if lam is None else lam.reshape(-1),
            sample_weight=None if sample_weight is None else sample_weight.reshape(-1),
        )

    def has_probabilities(self) -> bool:
        """Of tensors that were checked, but of no single row (C,): by the ranks, as the logits may be a shard of the classes."""
        return self.target.dim() == self.logits.dim()

    def as_one_row(self) -> "Inputs":
        """(C,) as (1, C)."""
        logits, target = self.logits, self.target
        soft = are_probabilities(target.shape, logits.shape, self.target_b is not None)
        rows = self.with_rows_flat()
        return rows._replace(logits=logits.unsqueeze(0), target=target.reshape(1, -1) if soft else target.reshape(1))


def counted_rows(ignore_index: int, target: Tensor, target_b: Tensor | None = None) -> Tensor:
    """Which class indices, or pairs of them, are not ignored, as bool. Compared as int64: -100 is 156 to bytes, and 300 is 44."""
    counted = target.long() != ignore_index
    return counted if target_b is None else counted & (target_b.long() != ignore_index)


def are_probabilities(target: torch.Size, logits: torch.Size, two_labels: bool) -> bool:
    """PyTorch's rule, whatever the dtypes: class probabilities have the shape of the logits. Ranks first: a compiler may not know
    the sizes."""
    return not two_labels and len(target) == len(logits) and target == logits


class Block(NamedTuple):
    """Rows and columns that a program reads at a time, in kernels that hold no rows of logits."""

    rows: int
    cols: int


class ClassShard(NamedTuple):
    """Where a row's classes lie in several places: the logits hold first_class, first_class + 1, ..."""

    first_class: int
    n_classes: int  # of the whole row


@dataclass(frozen=True)
class Cut:
    """One launch: how the work is cut among programs."""

    kernel: str  # name of the @triton.jit function
    n_programs: int
    num_warps: int
    shape: Any  # TileShape or RowShape of kernels/groups.py, or a Block: what a program holds
    max_registers: int | None = None  # per thread, None: as many as the compiler likes

    @property
    def n_slices(self) -> int:
        """Programs that share a row."""
        return getattr(self.shape, "n_slices", 1)

    @property
    def meets(self) -> bool:
        """Programs wait until each has summed the weights of its rows."""
        return getattr(self.shape, "meets", False)


@dataclass(frozen=True)
class Plan:
    """Which path a call takes, why, and what it will cost.

    Attributes:
        backend: "triton", "cpu", "torch" (PyTorch's own function), "reference" (PyTorch's operators) or "sharded" (the kernels,
            on the shards of a DTensor).
        reason: why this backend, in words.
        strategy: "forward only", "fused", "recompute", or "autograd" where PyTorch's operators serve the call.
        forward, backward: the launches that touch the logits or their gradient; None where no GPU kernel is launched.
        kernels: what is launched, in order, forward and backward together; none where no kernel serves the call.
        copies_logits: the logits are copied once because no pair of strides describes their rows.
        read_bytes, write_bytes: predicted traffic of the logits and their gradient, forward and backward together, for an
            upstream gradient of 1. For another, a fused gradient is read and written once more; `scale` costs nothing.
        threads: of the CPU kernel.
        keeps_logits: the loss refers to the logits until its backward, besides the gradient that its forward made.
    """

    backend: str
    reason: str
    strategy: str = "autograd"
    forward: Cut | None = None
    backward: Cut | None = None
    copies_logits: bool = False
    read_bytes: int | None = None
    write_bytes: int | None = None
    kernels: tuple[str, ...] = ()
    threads: int | None = None
    keeps_logits: bool = False

    @property
    def launches(self) -> int:
        """Predicted kernel launches, forward and backward together."""
        return len(self.kernels)

    def holds(self) -> str:
        """What of the logits' size a loss keeps until its backward. PyTorch's keeps their log-softmax."""
        return {
            "forward only": "nothing",
            "fused": "the gradient and the logits" if self.keeps_logits else "the gradient",
            "recompute": "the logits",
            "autograd": "what PyTorch's operators save",
        }[self.strategy]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}", f"  strategy  {self.strategy}", f"  holds     {self.holds()}"]
        for name, cut in (("forward", self.forward), ("backward", self.backward)):
            if cut is not None:
                size = f"{cut.shape.rows} x {cut.shape.cols}"
                lines.append(f"  {name:9s} {cut.kernel}, {cut.n_programs} programs of {size}, {cut.num_warps} warps")
        if self.copies_logits:
            lines.append("  copy      the logits are copied: their spatial dimensions do not collapse into one stride")
        if self.read_bytes is not None and self.write_bytes is not None:
            lines.append(f"  traffic   {self.read_bytes:,} bytes read, {self.write_bytes:,} bytes written")
            if self.strategy == "fused":
                again = f"{self.write_bytes:,}"
                lines.append(
                    f"  upstream  gradient other than 1: {again} bytes read and {again} written more, which scale= does not"
                )
        if self.kernels:
            counted = ((name, len(list(group))) for name, group in groupby(self.kernels))
            named = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counted)
            lines.append(f"  launches  {self.launches}: {named}")
        if self.threads is not None:
            lines.append(f"  threads   {self.threads}")
        return "\n".join(lines)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels sum logits of `dtype` in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spatial_dims_collapse(logits: torch.Tensor) -> bool:
    """Whether the dims after (N, C) can be viewed as one, so that the kernels read (N, C, d1, ...) where it lies."""
    sizes, strides = logits.shape[2:], logits.stride()[2:]
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))
