"""linear_cross_entropy(): torch.nn.functional.linear_cross_entropy's signature, the extras, and the choice of path."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import distributed, linear_ops, reference
from fusedloss.checks import Facts, check_options
from fusedloss.linear_autograd import RowLosses, SummedLoss
from fusedloss.linear_checks import Chunking, check_chunking, check_dtypes, check_layer, check_targets, logits_shape
from fusedloss.linear_passes import LinearInputs, NeedsGrad, Settings
from fusedloss.plan import EXTRAS, ROW_REDUCTIONS, Extras, Inputs, Options, fuses_gradient
from fusedloss.route import Route, autocast_is_on, facts_of, route_with
from fusedloss.serving import check_if_asked, labels_of, serve_checked
from fusedloss.stats import LossStats
from fusedloss.world import world_of


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
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
    chunk_rows: int | None = None,
) -> Any:  # Tensor, or (Tensor, LossStats) with return_stats
    r"""The cross-entropy of a linear layer's outputs, input @ linear_weight.T + linear_bias, which are never stored.

    The signature is that of `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13), and the value that of
    `fusedloss.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`. The rows are taken in chunks: the logits
    of a chunk are made, and their gradient in the same memory, before those of the next. "sum" and "mean" make the gradients of
    the layer in the forward, with the three matmuls that training needs anyway; the other reductions, and float16, compute the
    logits once more in the backward, "max" and "topk" only those of the selected rows. Ignored rows cost no matmul on a CPU; on
    a GPU, where the host would have to wait for their number, leave them out yourself: keep = target != ignore_index;
    linear_cross_entropy(input[keep], linear_weight, target[keep]).

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
            over more than 4 chunks.
        top_k, scale, sample_weight, z_loss, logit_scale, softcap, return_stats: as for `cross_entropy`, a row being one of input.
        chunk_rows: rows of a chunk; None: as many as have 64 MiB of logits, but 256 at least (on a GPU 250 MB and 2048).

    Returns:
        The loss in input's dtype (float32 under autocast, for which the layer's operands are cast as F.linear casts them): 0-d,
        or input's shape without F for reduction "none". With return_stats (loss, stats).

    Raises:
        RuntimeError: shapes or dtypes do not fit; linear_weight has no elements; ignore_index with class probabilities.
        ValueError: chunk_rows below 1, or another than options.batch_chunk_size.
        What `cross_entropy` raises.

    References:
        Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy: the same loss without stored logits); Hsu et al. 2024,
        arXiv:2410.10989 (Liger: gradients of the layer made in the forward, a chunk of rows at a time).
    """
    labels, labels_b, lam = labels_of(target)
    lam_tensor = lam if isinstance(lam, Tensor) else None
    tensors = (input, linear_weight, labels, labels_b, lam_tensor, linear_bias, weight, sample_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
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
            chunk_rows=chunk_rows,
        )
    check_layer(input, linear_weight, linear_bias)
    check_targets(input, linear_weight, labels, labels_b, lam_tensor, sample_weight, ignore_index)
    chunking = check_chunking(options, chunk_rows)
    extras = Extras(scale, sample_weight, top_k, return_stats, z_loss, logit_scale, softcap)
    checked = check_options(reduction, -100 if ignore_index is None else ignore_index, label_smoothing, extras, lam)
    scale_tensor = scale if isinstance(scale, Tensor) else None
    inputs = LinearInputs(input, linear_weight, linear_bias, labels, labels_b, lam_tensor, weight, sample_weight, scale_tensor)
    loss, stats = _serve(inputs, checked, chunking)
    return (loss, stats) if return_stats else loss


def _serve(inputs: LinearInputs, options: Options, chunking: Chunking) -> tuple[Tensor, LossStats | None]:
    batch = inputs.input.shape[:-1]
    if len(batch) > 1:
        inputs = _as_rows(inputs)
    dtype, route = _route(inputs, options)
    if route.backend in ("torch", "reference"):
        loss, stats = serve_checked(_with_logits(inputs), options)
    else:
        inputs, factor = _as_read(_as_rows(inputs), dtype)
        if not inputs.has_probabilities():
            check_if_asked(inputs.target, inputs.target_b, len(inputs.linear_weight), options, route)
        settings = Settings(NeedsGrad(*map(_needs_grad, inputs[:3])), *chunking, route.backend)
        fused = any(settings.needs_grad) and fuses_gradient(options.reduction, dtype)
        loss, stats = (_summed if fused else _from_rows)(inputs, options, settings)
        loss = (loss if factor is None else loss * factor).to(route.out_dtype)
    if options.reduction == "none":
        loss = loss.reshape(batch + loss.shape[1:])  # of a linear_weight (C, d1, ..., F) there are (N, d1, ...)
    if stats is not None:
        lse, row_loss = (values.reshape(batch + values.shape[1:]) for values in (stats.lse, stats.row_loss))
        stats = stats._replace(lse=lse, row_loss=row_loss)
    return loss, stats


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _as_rows(inputs: LinearInputs) -> LinearInputs:
    """With input (F,) or (N, d1, ..., F) as (n_rows, F), and one value per row of all that goes with it."""
    x, target, n_classes = inputs.input.reshape(-1, inputs.input.shape[-1]), inputs.target, len(inputs.linear_weight)
    has_probabilities = inputs.target_b is None and target.shape == (*inputs.input.shape[:-1], n_classes)
    lam, sample_weight = (
        None if values is None else values.reshape(-1).expand(len(x)) for values in (inputs.lam, inputs.sample_weight)
    )
    return inputs._replace(
        input=x,
        target=target.reshape(-1, target.shape[-1]) if has_probabilities else target.reshape(-1),
        target_b=None if inputs.target_b is None else inputs.target_b.reshape(-1),
        lam=lam,
        sample_weight=sample_weight,
    )


def _route(inputs: LinearInputs, options: Options) -> tuple[torch.dtype, Route]:
    """Checks the tensors and chooses the path; first the dtype of the logits."""
    x, device = inputs.input, inputs.input.device
    dtype = check_dtypes(*inputs[:3], autocast_is_on(x))
    logits = Facts(logits_shape(x, inputs.linear_weight), dtype, device, any(map(_needs_grad, inputs[:3])))
    route = route_with(facts_of(logits, *inputs[3:-1]), options, inputs.scale is not None, world_of(*inputs))
    if inputs.linear_weight.dim() > 2 and route.backend not in ("torch", "reference"):
        route = route._replace(backend="reference", reason="a linear_weight (C, d1, ..., F) has no fused path")
    return dtype, route


def _with_logits(inputs: LinearInputs) -> Inputs:
    """The inputs of `cross_entropy`, for which the logits are stored."""
    x, linear_weight, linear_bias, *loss_tensors = inputs
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(x, linear_weight.reshape(-1, linear_weight.shape[-1]), bias)
    return Inputs(logits.reshape(logits_shape(x, linear_weight)), *loss_tensors)  # type: ignore[arg-type]


def _as_read(inputs: LinearInputs, dtype: torch.dtype) -> tuple[LinearInputs, Tensor | None]:
    """The tensors as matmuls and kernels read them; and the factor of the loss that has a gradient of its own, if any."""
    linear_bias, scale = inputs.linear_bias, inputs.scale
    inputs = inputs._replace(
        input=inputs.input.to(dtype),
        linear_weight=inputs.linear_weight.to(dtype),
        linear_bias=None if linear_bias is None else linear_bias.to(dtype),
        scale=None if scale is None else scale.to(inputs.input.device, non_blocking=True),
    )
    inputs = LinearInputs(*(None if tensor is None else tensor.resolve_neg() for tensor in inputs))  # type: ignore[arg-type]
    return (inputs._replace(scale=None), inputs.scale) if _needs_grad(inputs.scale) else (inputs, None)


def _summed(inputs: LinearInputs, options: Options, settings: Settings) -> tuple[Tensor, LossStats | None]:
    """The loss of "sum" and "mean", whose gradients are made with it."""
    if options.reduction == "mean":
        share = 1 / _denominator(inputs, options)
        inputs = inputs._replace(scale=share if inputs.scale is None else share * inputs.scale)
    result = SummedLoss.apply(*inputs, options._replace(reduction="sum"), settings)
    if not options.return_stats:
        return result, None
    loss, row_stats, n_correct = result
    return loss, _statistics(row_stats, n_correct, inputs, options)


def _from_rows(inputs: LinearInputs, options: Options, settings: Settings) -> tuple[Tensor, LossStats | None]:
    """The loss from the losses of the rows: every reduction."""
    scale, inputs = inputs.scale, inputs._replace(scale=None)
    of_rows = options._replace(reduction="none", scale=1.0)
    row_stats = n_correct = None
    if any(settings.needs_grad):
        rows = RowLosses.apply(*inputs, of_rows, settings)
        if options.return_stats:
            rows, row_stats, n_correct = rows
    else:
        rows, row_stats, n_correct = linear_ops.row_pass(inputs, of_rows, settings)
    if options.reduction == "none":
        loss = rows
    elif options.reduction in ROW_REDUCTIONS:
        loss = reference.average_of_largest(rows, _counted(inputs, options), options)
    else:
        loss = rows.sum() if options.reduction == "sum" else rows.sum() / _denominator(inputs, options)
    if options.scale != 1:
        loss = loss * options.scale
    if scale is not None:
        loss = loss * scale
    return loss, _statistics(row_stats, n_correct, inputs, options) if row_stats is not None else None


def _counted(inputs: LinearInputs, options: Options) -> Tensor:
    counted = inputs.counted(options.ignore_index)
    return torch.ones_like(inputs.target[:, 0], dtype=torch.bool) if counted is None else counted


def _denominator(inputs: LinearInputs, options: Options) -> Tensor:
    """What the mean divides by, 0-d; nan where no row counts, as PyTorch's mean is then."""
    if inputs.target_b is None:
        total = distributed.denominator(inputs.target, options.ignore_index, inputs.weight)
    else:
        total = _counted(inputs, options).sum(dtype=torch.float64)
    return total.masked_fill(total == 0, torch.nan)


def _statistics(row_stats: Tensor, n_correct: Any, inputs: LinearInputs, options: Options) -> LossStats:
    lse, row_loss = row_stats.unbind()
    counted = _counted(inputs, options)
    return LossStats(lse, row_loss, counted.sum(), n_correct, reference.worst_row(row_loss, counted))
