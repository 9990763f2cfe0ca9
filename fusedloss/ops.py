"""The operators as PyTorch's dispatcher sees them: schemas, one implementation per device, shapes for tracing.

torch.library.Library with define/impl costs 2 to 3 us a call over plain Python; the custom_op decorator costs 15. The forward
has its own gradient, for compiled graphs and for whoever calls it directly; in eager that would cost 30 us, as long as the whole
loss of a 128 x 10 batch takes, so there autograd.py has a Function, below which the dispatcher differentiates nothing.
"""

from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from fusedloss.backends import cpu as cpu_backend
from fusedloss.backends import cpu_prepared
from fusedloss.backends import triton as triton_backend
from fusedloss.backends.outputs import ENTROPY, Outputs, RowStats, allocate_forward, allocate_gradient
from fusedloss.entropy import add_gradient
from fusedloss.plan import Inputs, Options
from fusedloss.world import nobody_watches

_INPUTS = "Tensor logits, Tensor target, Tensor? target_b, Tensor? lam, Tensor? weight, Tensor? sample_weight, Tensor? scale"
# A compiler may know the ignore_index only when it runs; all other numbers are constants to it. Two have a tensor's name.
OPTIONS_SCHEMA = ", ".join(
    f"{'SymInt' if name == 'ignore_index' else kind.__name__} {name}{'_factor' if name in Inputs._fields else ''}"
    for name, kind in get_type_hints(Options).items()
)
_N_INPUTS, _N_OPTIONS = len(Inputs._fields), len(Options._fields)

_BACKENDS: dict[str, Any] = {"triton": triton_backend, "cpu": cpu_backend}

# The namespace outlives these modules: where they were deleted from sys.modules and are imported again, as some test runners and
# notebooks do, the operators of the first import make room for those of the second.
_namespace = vars(torch.ops.fusedloss)
if "library" in _namespace:
    _namespace["library"]._destroy()
library = _namespace["library"] = torch.library.Library("fusedloss", "DEF")
library.define(
    f"forward({_INPUTS}, {OPTIONS_SCHEMA}, ScalarType out_dtype, bool needs_grad, str backend) "
    "-> (Tensor loss, Tensor saved, Tensor dlogits, Tensor row_stats, Tensor counts)"
)
library.define(f"backward(Tensor dloss, {_INPUTS}, Tensor saved, {OPTIONS_SCHEMA}, str backend, Tensor? dentropy=None) -> Tensor")
library.define("scale_gradient(Tensor(a!) dlogits, Tensor dloss, str backend) -> ()")


def forward(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, backend: str, keeps_workspace: bool = True
) -> Outputs:
    """The kernels' forward. What the call does not ask for is None, or a tensor of no elements where the dispatcher was asked.
    keeps_workspace: between calls; False where a compiled graph may own all memory."""
    if nobody_watches(*inputs):
        return _BACKENDS[backend].forward(inputs, options, out_dtype, needs_grad, keeps_workspace)
    return Outputs(*torch.ops.fusedloss.forward.default(*inputs, *options, out_dtype, needs_grad, backend))


class Prepared(Protocol):
    """Forward and backward of calls alike, with class indices or probabilities, and weights or not. Each backend has its own."""

    @property
    def any_batch(self) -> bool:
        """Whether calls with another number of examples are alike, too."""
        ...

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None, RowStats | None]:
        """The loss, what the backward reads, the gradient for an upstream gradient of 1 and statistics; as `Outputs` has them."""
        ...

    def backward(self, dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Tensor) -> Tensor:
        """The gradient of the logits; saved: the forward's, the scale in it."""
        ...

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss, of each row its own; a row of zeros stays so."""
        ...


def prepare(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, backend: str, as_given: Inputs, varies: bool
) -> Prepared | None:
    """What serves calls alike while nobody watches; None where such calls take more than a launch.
    as_given: the inputs as the caller has them; varies: calls with another number of examples should be alike, too."""
    if backend == "cpu":
        return cpu_prepared.prepare(inputs, options, out_dtype, needs_grad, as_given, varies)
    return triton_backend.prepare(inputs, options, out_dtype, needs_grad, as_given)


def backward(
    dloss: Tensor,  # of the loss's shape
    inputs: Inputs,
    saved: Tensor,
    options: Options,
    backend: str,
    dentropy: Tensor | None = None,  # (n_rows,)
) -> Tensor:
    """Returns the gradient of the logits, in their dtype, with their strides where they are dense."""
    if nobody_watches(dloss, *inputs):
        return _backward(dloss, inputs, saved, options, backend, dentropy)
    return torch.ops.fusedloss.backward.default(dloss, *inputs, saved, *options, backend, dentropy)


def _backward(dloss: Tensor, inputs: Inputs, saved: Tensor, options: Options, backend: str, dentropy: Tensor | None) -> Tensor:
    dlogits: Tensor = _BACKENDS[backend].backward(dloss, inputs, saved, options)
    if dentropy is not None:
        add_gradient(dlogits, dentropy, inputs, options)
    return dlogits


def forward_overwriting(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, backend: str, keeps_workspace: bool = True
) -> Outputs:
    """The forward of "sum" or "mean" and its gradient, which takes the place of the logits where `overwrites` says so.

    No operator: who calls it has made sure that the tensors hold data.
    """
    return _BACKENDS[backend].forward_overwriting(inputs, options, out_dtype, keeps_workspace)


def overwrites(inputs: Inputs, options: Options, backend: str) -> bool:
    """Whether the gradient can take the place of the logits: if no kernel reads a logit after it wrote its gradient."""
    can: bool = _BACKENDS[backend].overwrites(inputs, options)
    return can


def scale_gradient(dlogits: Tensor, dloss: Tensor, backend: str) -> None:  # dloss: 0-d, or of the rows (N, d1, ...)
    """Multiplies a fused gradient by the upstream gradient, in place; where that is 1 the gradient is not touched."""
    if nobody_watches(dlogits, dloss):
        _BACKENDS[backend].scale_gradient(dlogits, dloss)
    else:
        torch.ops.fusedloss.scale_gradient.default(dlogits, dloss, backend)


def scaled(dlogits: Tensor, dloss: Tensor) -> Tensor:  # dloss: as above
    """dlogits * dloss out of place, by PyTorch's operators. Zeros, as an ignored row has, stay so whatever dloss is."""
    dloss = dloss if dloss.dim() == 0 else dloss.unsqueeze(1)
    return torch.where(dlogits == 0, dlogits, (dlogits.to(dloss.dtype) * dloss).to(dlogits.dtype))


def _forward_impl(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, rest = Inputs(*arguments[:_N_INPUTS]), arguments[_N_INPUTS:]
    options, (out_dtype, needs_grad, backend) = Options(*rest[:_N_OPTIONS]), rest[_N_OPTIONS:]
    return all_tensors(_BACKENDS[backend].forward(inputs, options, out_dtype, needs_grad, keeps_workspace=False))


def all_tensors(outputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The same for the dispatcher, which knows no tensor that is None; the first is none."""
    return tuple(outputs[0].new_empty((0,)) if tensor is None else tensor for tensor in outputs)


def _backward_impl(dloss: Tensor, *arguments: Any) -> Tensor:
    inputs, (saved, *rest) = Inputs(*arguments[:_N_INPUTS]), arguments[_N_INPUTS:]
    backend, dentropy = (*rest[_N_OPTIONS:], None)[:2]  # the dispatcher leaves out what has its default
    return _backward(dloss, inputs, saved, Options(*rest[:_N_OPTIONS]), backend, dentropy)


def _scale_gradient_impl(dlogits: Tensor, dloss: Tensor, backend: str) -> None:
    _BACKENDS[backend].scale_gradient(dlogits, dloss)


# An explicit backend("triton") launches on CPU tensors too: under Triton's interpreter, or in an emulator.
for _key in ("CUDA", "CPU"):
    library.impl("forward", _forward_impl, _key)
    library.impl("backward", _backward_impl, _key)
    library.impl("scale_gradient", _scale_gradient_impl, _key)


@torch.library.register_fake("fusedloss::forward", lib=library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, rest = Inputs(*arguments[:_N_INPUTS]), arguments[_N_INPUTS:]
    options, (out_dtype, needs_grad, _) = Options(*rest[:_N_OPTIONS]), rest[_N_OPTIONS:]
    return all_tensors(allocate_forward(inputs, options, out_dtype, needs_grad))


@torch.library.register_fake("fusedloss::backward", lib=library)
def _backward_fake(dloss: Tensor, logits: Tensor, *_: object) -> Tensor:
    return allocate_gradient(logits)


@torch.library.register_fake("fusedloss::scale_gradient", lib=library)
def _scale_gradient_fake(dlogits: Tensor, dloss: Tensor, backend: str) -> None:
    pass


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, saved, dlogits, row_stats, counts = output
    tensors, rest = Inputs(*inputs[:_N_INPUTS]), inputs[_N_INPUTS:]
    options, needs_grad, backend = Options(*rest[:_N_OPTIONS]), rest[-2], rest[-1]
    ctx.mark_non_differentiable(saved, dlogits, counts, *([] if options.differentiates_entropy() else [row_stats]))
    ctx.set_materialize_grads(False)
    ctx.call = options, needs_grad, backend
    if options.fuses_gradient(tensors.logits.dtype):
        ctx.save_for_backward(dlogits)
    else:
        ctx.save_for_backward(*tensors, saved)


def _gradient_of_forward(
    ctx: Any, dloss: Tensor | None, dsaved: None, ddlogits: None, drow_stats: Tensor | None, dcounts: None
) -> tuple[Tensor | None, ...]:
    options, needs_grad, backend = ctx.call
    if not needs_grad or torch.is_grad_enabled():
        raise RuntimeError(
            "torch.ops.fusedloss.forward has a gradient of first order, where needs_grad=True asks for it; "
            "fusedloss.cross_entropy has all of them"
        )
    dentropy = None if drow_stats is None else drow_stats[ENTROPY]
    if dloss is None:  # no loss was made of the rows' losses
        if dentropy is None:
            return (None,) * (1 + _N_INPUTS + _N_OPTIONS + 2)
        dloss = torch.zeros_like(dentropy)
    if len(ctx.saved_tensors) == 1:
        (dlogits,) = ctx.saved_tensors
        gradient = scaled(dlogits, dloss)  # out of place: a graph may run its backward again
    else:
        *tensors, saved = ctx.saved_tensors
        gradient = torch.ops.fusedloss.backward.default(dloss, *tensors, saved, *options, backend, dentropy)
    return gradient, *[None] * (_N_INPUTS + _N_OPTIONS + 2)


torch.library.register_autograd("fusedloss::forward", _gradient_of_forward, setup_context=_save_for_gradient, lib=library)
