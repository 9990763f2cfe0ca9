"""The passes of linear_passes.py as operators of the dispatcher, for what traces them: torch.compile, fake tensors, meta tensors.

Eager calls go around the operators, so that a dispatch mode sees the matmuls of a call: PyTorch's FlopCounterMode, its profiler.
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss import linear_passes
from fusedloss.backends.outputs import N_ROW_STATS
from fusedloss.linear_checks import Chunking
from fusedloss.linear_passes import GradientPass, LinearInputs, NeedsGrad, RowPass, Settings
from fusedloss.ops import OPTIONS_SCHEMA, all_tensors, library
from fusedloss.plan import Options, accumulation_dtype
from fusedloss.world import PLAIN_TYPES

_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? target_b, Tensor? lam, Tensor? weight, "
    "Tensor? sample_weight, Tensor? scale"
)
_N_INPUTS, _N_OPTIONS = len(LinearInputs._fields), len(Options._fields)
_TRACING_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))

library.define(
    f"linear_gradient_pass({_INPUTS}, {OPTIONS_SCHEMA}, bool input_grad, bool weight_grad, bool bias_grad, int? chunk_rows, "
    "bool float32_sum, bool compact, str backend, Tensor? upstream, Tensor? dentropy) "
    "-> (Tensor loss, Tensor dinput, Tensor dweight, Tensor dbias, Tensor row_stats, Tensor n_correct)"
)
library.define(
    f"linear_row_pass({_INPUTS}, {OPTIONS_SCHEMA}, int? chunk_rows, bool compact, str backend) "
    "-> (Tensor row_losses, Tensor row_stats, Tensor n_correct)"
)


def gradient_pass(
    inputs: LinearInputs,
    options: Options,
    settings: Settings,
    upstream: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> GradientPass:
    """`linear_passes.gradient_pass`."""
    if nobody_traces(*inputs, upstream, dentropy):
        return linear_passes.gradient_pass(inputs, options, settings, upstream, dentropy)
    operator = torch.ops.fusedloss.linear_gradient_pass.default
    loss, *tensors = operator(*inputs, *options, *settings.needs_grad, *settings.chunking, settings.backend, upstream, dentropy)
    asked = (*settings.needs_grad, options.return_stats, options.return_stats)
    return GradientPass(loss, *(tensor if is_asked else None for tensor, is_asked in zip(tensors, asked, strict=True)))


def row_pass(inputs: LinearInputs, options: Options, settings: Settings) -> RowPass:
    """`linear_passes.row_pass`."""
    if nobody_traces(*inputs):
        return linear_passes.row_pass(inputs, options, settings)
    how = settings.chunking.chunk_rows, settings.chunking.compact, settings.backend
    row_losses, *stats = torch.ops.fusedloss.linear_row_pass.default(*inputs, *options, *how)
    return RowPass(row_losses, *(stats if options.return_stats else (None, None)))


def nobody_traces(*tensors: Tensor | None) -> bool:
    """Whether the tensors hold data, and no mode records the call for later."""
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES):
        return False
    return all(tensor is None or (type(tensor) in PLAIN_TYPES and not tensor.is_meta) for tensor in tensors)


def _gradient_pass_impl(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, (*needs_grad, chunk_rows, float32_sum, compact, backend, upstream, dentropy) = _split(arguments)
    settings = Settings(NeedsGrad(*needs_grad), Chunking(chunk_rows, float32_sum, compact), backend)
    return all_tensors(linear_passes.gradient_pass(inputs, options, settings, upstream, dentropy, keeps_workspace=False))


def _row_pass_impl(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, (chunk_rows, compact, backend) = _split(arguments)
    settings = Settings(NeedsGrad(False, False, False), Chunking(chunk_rows, False, compact), backend)
    return all_tensors(linear_passes.row_pass(inputs, options, settings, keeps_workspace=False))


def _split(arguments: tuple[Any, ...]) -> tuple[LinearInputs, Options, tuple[Any, ...]]:
    rest = arguments[_N_INPUTS:]
    return LinearInputs(*arguments[:_N_INPUTS]), Options(*rest[:_N_OPTIONS]), rest[_N_OPTIONS:]


for _key in ("CUDA", "CPU"):
    library.impl("linear_gradient_pass", _gradient_pass_impl, _key)
    library.impl("linear_row_pass", _row_pass_impl, _key)


@torch.library.register_fake("fusedloss::linear_gradient_pass", lib=library)
def _gradient_pass_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, rest = _split(arguments)
    input_grad, weight_grad, bias_grad = rest[:3]
    return all_tensors(
        GradientPass(
            inputs.input.new_empty((), dtype=accumulation_dtype(inputs.input.dtype)),
            torch.empty_like(inputs.input) if input_grad else None,
            torch.empty_like(inputs.linear_weight) if weight_grad else None,
            torch.empty_like(inputs.linear_bias) if bias_grad and inputs.linear_bias is not None else None,
            *_empty_stats(inputs, options),
        )
    )


@torch.library.register_fake("fusedloss::linear_row_pass", lib=library)
def _row_pass_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, _ = _split(arguments)
    dtype = accumulation_dtype(inputs.input.dtype)
    return all_tensors(RowPass(inputs.input.new_empty(inputs.input.shape[:1], dtype=dtype), *_empty_stats(inputs, options)))


def _empty_stats(inputs: LinearInputs, options: Options) -> tuple[Tensor | None, Tensor | None]:
    if not options.return_stats:
        return None, None
    x = inputs.input
    return x.new_empty((N_ROW_STATS, x.shape[0]), dtype=accumulation_dtype(x.dtype)), x.new_empty((), dtype=torch.int64)
