"""Random problems for the fuzz tests: everything `cross_entropy` takes, in combinations that nobody would think of."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

N_ROWS = [1, 2, 3, 7, 8, 17, 33, 0]
# Around the widths of vectors, of 16-byte groups and of blocks; 513 is the first that has a Triton program per row.
N_COLS = [1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 33, 64, 100, 127, 129, 257, 513, 1000, 1025]
SPATIAL: list[tuple[int, ...]] = [(), (), (), (1,), (5,), (33,), (2, 3), (3, 1, 4), (0,)]
SPECIAL = [-torch.inf, torch.inf, torch.nan, 0.0, -0.0]


@dataclass(frozen=True)
class Problem:
    """One call, ready to be made."""

    logits: Tensor
    target: Any  # a tensor, or (target_a, target_b, lam)
    weight: Tensor | None
    options: dict[str, Any]  # with top_k, scale and the extras
    dloss: Tensor  # 0-d, or of the loss's shape

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis asks for this one
        printer.text(str(self))

    def __str__(self) -> str:
        parts = {"logits": self.logits, "target": self.target, "weight": self.weight, "dloss": self.dloss}
        if isinstance(self.target, tuple):
            parts.update(zip(("target", "target_b", "lam"), self.target, strict=True))
        lines = [f"{name}: {_described(part)}" for name, part in parts.items() if part is not None]
        return "\n".join([*lines, f"options: {self.options}"])


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return str(tensor)
    values = f" = {tensor.tolist()}" if tensor.numel() <= 64 else ""
    return f"{tensor.dtype}, shape {list(tensor.shape)}, strides {list(tensor.stride())}{values}"


@st.composite
def problems(draw: st.DrawFn, max_elements: int) -> Problem:
    """A problem; about one in four has class probabilities as its target, one in six two labels, and a third the extras."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([FP32, BF16, FP16, FP64]))
    n_cols = draw(st.sampled_from(N_COLS))
    shape = (n_cols,)
    if draw(st.integers(0, 15)):
        spatial = draw(st.sampled_from(SPATIAL))
        most = max(1, max_elements // (n_cols * max(1, torch.Size(spatial).numel())))
        shape = (min(draw(st.sampled_from(N_ROWS)), most), n_cols, *spatial)
    batch = shape[:1] + shape[2:] if len(shape) > 1 else ()

    logits = draw(_logits(shape, generator)).to(dtype)
    weight = draw(_weights(n_cols, generator))
    weight = weight.to(dtype) if weight is not None else None
    ignore_index = -100
    if draw(st.integers(0, 3)) == 0:
        target = draw(_probabilities(shape, generator)).to(draw(st.sampled_from([dtype, dtype, FP32, FP64])))
    else:
        ignore_index = draw(st.sampled_from([-100, -100, -1, 0, n_cols - 1, n_cols, 255]))
        target = torch.randint(n_cols, batch, generator=generator)
        ignored = draw(st.sampled_from([0.0, 0.0, 0.25, 1.0]))
        target = target.masked_fill(torch.rand(batch, generator=generator) < ignored, ignore_index)
        if len(batch) == 1 and n_cols <= 255 and 0 <= ignore_index <= 255 and draw(st.booleans()):
            target = target.to(torch.uint8)

    if len(shape) > 1 and shape[0] > 1 and draw(st.integers(0, 3)) == 0:  # rows that tie
        logits, target = logits.clone(), target.clone()
        logits[shape[0] // 2], target[shape[0] // 2] = logits[0].clone(), target[0].clone()
    reduction = draw(st.sampled_from(["none", "sum", "mean", "mean", "max", "topk"]))
    top_k: int | float | None = None
    if reduction == "topk":
        top_k = draw(st.sampled_from([1, 2, 5, 100, 0.1, 0.5, 1.0]))
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "top_k": top_k,
        "scale": draw(st.sampled_from([1.0, 1.0, 1.0, 1 / 3, -2.0, 1e-3, 1024.0])),
    }
    if draw(st.integers(0, 3)) == 0:
        options["scale"] = torch.tensor(options["scale"], dtype=draw(st.sampled_from([FP32, FP64])))
    options.update(draw(_extras(batch, generator)))
    if not target.is_floating_point() and draw(st.integers(0, 4)) == 0:
        target = (draw(_laid_out(target, generator)), *draw(_second_label(target, n_cols, ignore_index, generator)))
    else:
        if not target.is_floating_point() and options["label_smoothing"] == 0:
            options["focal_gamma"] = draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
        target = draw(_laid_out(target, generator))
    dloss = torch.tensor(draw(st.sampled_from([1.0, 1.0, 0.5, -3.0, 0.0])))
    if reduction == "none":
        eighths = torch.randint(-8, 9, batch, generator=generator) / 8
        dloss = draw(st.sampled_from([eighths, dloss.expand(batch), torch.ones(batch)]))
    return Problem(draw(_laid_out(logits, generator)), target, weight, options, dloss)


@st.composite
def _extras(draw: st.DrawFn, batch: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    extras: dict[str, Any] = {"sample_weight": None, "z_loss": 0.0, "logit_scale": 1.0, "softcap": None}
    if draw(st.integers(0, 2)):
        return extras
    extras["z_loss"] = draw(st.sampled_from([0.0, 1e-4, 0.5]))
    extras["logit_scale"] = draw(st.sampled_from([1.0, 1.0, 0.125, -2.0]))
    extras["softcap"] = draw(st.sampled_from([None, 30.0, 2.5]))
    if draw(st.booleans()):
        extras["sample_weight"] = torch.randint(0, 17, batch, generator=generator) / 8
    return extras


@st.composite
def _second_label(
    draw: st.DrawFn, target: Tensor, n_cols: int, ignore_index: int, generator: torch.Generator
) -> tuple[Tensor, float | Tensor]:
    """target_b, a quarter of it like target, an eighth ignored; and lam."""
    other = torch.randint(n_cols, target.shape, generator=generator)
    chance = torch.rand(target.shape, generator=generator)
    other = torch.where(chance < 0.25, target.long(), other.masked_fill(chance > 0.875, ignore_index)).to(target.dtype)
    share = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    lam = draw(st.sampled_from([share, torch.tensor(share), torch.randint(0, 9, target.shape, generator=generator) / 8]))
    return draw(_laid_out(other, generator)), lam


@st.composite
def _logits(draw: st.DrawFn, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    logits = torch.randn(shape, generator=generator, dtype=FP64) * draw(st.sampled_from([2.0, 2.0, 0.0, 1e-3, 30.0, 1e4]))
    logits = logits + draw(st.sampled_from([0.0, 0.0, 0.0, -200.0, 1e4]))
    if draw(st.booleans()):  # a few rows are sure of their class
        logits = torch.where(torch.rand(shape, generator=generator) < 0.05, logits + 40, logits)
    if draw(st.integers(0, 3)) == 0:
        value = draw(st.sampled_from(SPECIAL))
        logits = logits.masked_fill(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.01, 0.3, 1.0])), value)
    return logits


@st.composite
def _weights(draw: st.DrawFn, n_cols: int, generator: torch.Generator) -> Tensor | None:
    """One sign: a mean whose denominator cancels has no accuracy to speak of, in PyTorch neither."""
    kind = draw(st.sampled_from(["none", "none", "positive", "some zero", "all zero", "negative"]))
    eighths = torch.randint(1, 17, (n_cols,), generator=generator) / 8
    if kind == "some zero":
        return eighths.masked_fill(torch.rand(n_cols, generator=generator) < 0.3, 0)
    return {"none": None, "positive": eighths, "all zero": torch.zeros(n_cols), "negative": -eighths}[kind]


@st.composite
def _probabilities(draw: st.DrawFn, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dim = min(1, len(shape) - 1)
    kind = draw(st.sampled_from(["softmax", "one hot", "two labels", "not normalised"]))
    soft = torch.randn(shape, generator=generator, dtype=FP64)
    if kind == "softmax":
        return (3 * soft).softmax(dim)
    if kind == "not normalised":
        return soft.abs().round(decimals=1)
    first = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1) if soft.numel() else soft
    if kind == "one hot":
        return first
    return 0.25 * first + 0.75 * first.flip(dim)


@st.composite
def _laid_out(draw: st.DrawFn, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The same values with other strides: any order of dimensions, padded or with gaps, off by one, or expanded."""
    kind = draw(st.sampled_from(["contiguous", "contiguous", "permuted", "offset", "gaps", "expanded"]))
    if kind == "contiguous" or tensor.dim() == 0:
        return tensor
    if kind == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] > 1 else tensor
    order = torch.randperm(tensor.dim(), generator=generator).tolist() if kind != "offset" else list(range(tensor.dim()))
    moved = tensor.permute(order)
    step = 2 if kind == "gaps" else 1
    room = [step * size + (kind != "permuted") for size in moved.shape]
    window = tuple(slice(kind != "permuted", None, step) for _ in room)
    memory = torch.zeros(room, dtype=tensor.dtype)
    view = memory[window][tuple(slice(0, size) for size in moved.shape)]
    view.copy_(moved)
    return view.permute([order.index(dim) for dim in range(tensor.dim())])
