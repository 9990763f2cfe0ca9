"""cross_entropy(): torch.nn.functional.cross_entropy's signature, with the extras."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, overload  # which typing has from Python 3.11 on; torch requires the package

from fusedloss.plan import EXTRAS, ExtraKeywords, Reduction, Target
from fusedloss.serving import serve
from fusedloss.stats import LossStats


# fmt: off
@overload
def cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    sample_weight: Tensor | None = None, return_stats: Literal[False] = False, **extras: Unpack[ExtraKeywords],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    sample_weight: Tensor | None = None, return_stats: Literal[True], **extras: Unpack[ExtraKeywords],
) -> tuple[Tensor, LossStats]: ...
@overload
def cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    sample_weight: Tensor | None = None, return_stats: bool, **extras: Unpack[ExtraKeywords],
) -> Tensor | tuple[Tensor, LossStats]: ...
# fmt: on
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    # By keyword, as the overloads say. A `*` here would take Python 3 % of the time of ten logits.
    top_k: int | float | None = EXTRAS.top_k,
    scale: float | Tensor = EXTRAS.scale,
    sample_weight: Tensor | None = EXTRAS.sample_weight,
    z_loss: float = EXTRAS.z_loss,
    logit_scale: float = EXTRAS.logit_scale,
    softcap: float | None = EXTRAS.softcap,
    focal_gamma: float = EXTRAS.focal_gamma,
    return_stats: bool = EXTRAS.return_stats,
    out_dtype: torch.dtype | None = EXTRAS.out_dtype,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Softmax cross-entropy of logits, reduced over the batch: scale * reduce_n( -w[y_n] log softmax(x_n)[y_n] ).

    The positional parameters are those of `torch.nn.functional.cross_entropy`, with its semantics. Differences, all on
    purpose: sums are accumulated in float32 or better; an ignored row has gradient 0 even where its logits are NaN; on a
    GPU a class index out of range makes the loss and that row's gradient NaN instead of stopping the device (set
    FUSEDLOSS_CHECK_TARGETS=1 for an IndexError, at the price of a synchronisation).

    With all extras, z_n = softcap * tanh(logit_scale * x_n / softcap) (without softcap: logit_scale * x_n), and a row's loss is

        sample_weight_n * ( (1 - p_n)**focal_gamma * PyTorch's loss of z_n with weight and label_smoothing
                            + z_loss * logsumexp(z_n)**2 )

    with p_n = softmax(z_n)[target_n].

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float16, bfloat16, float32 or float64, any strides.
        target: class indices (), (N,) or (N, d1, ...), int64 (uint8 for 1-D); or class probabilities of input's shape; or two
            labels of MixUp or CutMix, (target_a, target_b, lam), a tuple or list of class indices and the share of the first, a
            number or a tensor (), (N,) or of target_a's shape: the loss of the class probabilities
            lam * one_hot(target_a) + (1 - lam) * one_hot(target_b), which are never built: a class whose share is 0 does not
            enter, though its logit be -inf. A row with either label ignored is ignored.
        weight: (C,), a factor per class, in input's dtype.
        size_average: deprecated, overrides reduction as in PyTorch.
        ignore_index: rows with this class index are ignored; may be any integer.
        reduce: deprecated, overrides reduction as in PyTorch.
        reduction: "none" one loss per row; "sum"; "mean", divided by the sum of w[y_n] over the counted rows (by the
            number of counted rows for probabilities and two labels), whatever sample_weight is; "max", the largest loss of a
            counted row, ties sharing the gradient evenly; "topk", the average of the top_k largest losses among the counted
            rows.
        label_smoothing: eps in [0, 1]: (1 - eps) of the loss plus eps times the average over all classes.
        top_k: for reduction "topk" only: an int (rows), or a float in (0, 1], a fraction of the counted rows, rounded to
            the nearest row and to at least one.
        scale: factor of the loss and of its gradient, multiplied inside the kernel: a number, or a 0-d floating point
            tensor, on any device, read there without synchronisation. With reduction="sum" it stands for every
            normalisation that is not PyTorch's mean: scale=1/number_of_targets_in_the_global_batch.
        sample_weight: a factor per row, floating point: (N,), or (N, d1, ...) like class indices.
        z_loss: factor of the squared log-sum-exp, which keeps logits from drifting. It is part of a row's loss and divided by
            what the mean divides by: with class weights the sum of w[y_n], so that weights ten times as large make a tenth of it.
        logit_scale: factor of the logits, a number. (One that is learned is a multiplication before the call.)
        softcap: positive bound of the logits, after logit_scale.
        focal_gamma: exponent of the focal loss, at least 0: rows that the model is sure of count less, while what a mean
            divides by stays. For class indices without label_smoothing only.
        return_stats: also return `fusedloss.LossStats`, made in the same launch; with reduction "none" its `entropy` has a
            gradient.
        out_dtype: dtype of the loss, floating point; None: PyTorch's. torch.float32 gives the loss of float16 and bfloat16 logits
            as it was accumulated, and changes no bit of the gradient; PyTorch's is rounded to the logits' dtype, for a loss
            around 8 in bfloat16 to a multiple of 0.03.

    Returns:
        The loss in out_dtype, by default in input's (float32 for float16 and bfloat16 under autocast; promoted with
        probabilities as in PyTorch): 0-d, or the shape of the class indices for reduction "none". With return_stats
        (loss, stats).

    Raises:
        ValueError: batch sizes differ; unknown reduction; top_k missing, out of range or without "topk"; scale not 0-d;
            lam, softcap, focal_gamma or the shape of sample_weight out of range; focal_gamma with another target than class
            indices, or with label_smoothing; out_dtype not floating point.
        RuntimeError: shapes or dtypes do not fit; label_smoothing > 1; a backend was asked for that cannot serve.
        IndexError: a class index is out of range (CPU).
        NotImplementedError: input is not floating point.
        TypeError: an argument of the wrong Python type.

    References:
        Szegedy et al. 2016, arXiv:1512.00567 (label smoothing); Fan et al. 2017, arXiv:1705.08826 (average top-k);
        Zhang et al. 2018, arXiv:1710.09412 (MixUp); Yun et al. 2019, arXiv:1905.04899 (CutMix); Chowdhery et al. 2022,
        arXiv:2204.02311 (z-loss); Gemma Team 2024, arXiv:2408.00118 (softcap); Lin et al. 2017, arXiv:1708.02002 (focal loss).
    """
    # fmt: off
    return serve(cross_entropy, input, target, weight, scale, (
        ignore_index, size_average, reduce, reduction, label_smoothing,
        sample_weight, top_k, return_stats, z_loss, logit_scale, softcap, focal_gamma, out_dtype,
    ))
    # fmt: on
