"""plan(): which path a call would take, why, and what it would cost."""

from inspect import signature
from typing import Any, overload

from torch import Tensor

from fusedloss import linear_serving, serving
from fusedloss.functional import cross_entropy
from fusedloss.geometry import DeviceFacts
from fusedloss.linear import linear_cross_entropy
from fusedloss.plan import Plan, Target
from fusedloss.plan_linear import LinearPlan


# fmt: off
@overload
def plan(
    input: Tensor, target: Target, weight: Tensor | None = None, *, linear_weight: None = None, device: DeviceFacts | None = None,
    **options: Any,
) -> Plan: ...
@overload
def plan(
    input: Tensor, target: Target, weight: Tensor | None = None, *, linear_weight: Tensor, device: DeviceFacts | None = None,
    **options: Any,
) -> LinearPlan: ...
# fmt: on
def plan(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    linear_weight: Tensor | None = None,
    device: DeviceFacts | None = None,
    **options: Any,
) -> Plan | LinearPlan:
    """Tells which path `cross_entropy(input, target, weight, **options)` takes, why, and what it costs; runs nothing.

    The gradient of `LossStats.entropy`, where a loss is made of it, comes on top: one more pass, by PyTorch's operators; of
    `linear_cross_entropy` also the memory of one more chunk.

    With linear_weight it tells the same of `linear_cross_entropy(input, linear_weight, target, weight=weight, **options)`.

    Args:
        input, target, weight: as for `cross_entropy`; meta tensors do, with backend("triton") for the GPU's plan.
        linear_weight: as for `linear_cross_entropy`.
        device: facts of the GPU, those of an H100 where there is none.
        **options: the other arguments of the function, by keyword.

    Returns:
        A frozen `Plan` (`from fusedloss.plan import Plan`), or a `LinearPlan` of fusedloss.plan_linear; `print` it.

    Raises:
        What the function would raise for these shapes, dtypes and options.
    """
    if linear_weight is not None:
        arguments = signature(linear_cross_entropy).bind(input, linear_weight, target, weight=weight, **options)
        arguments.apply_defaults()
        return linear_serving.planned(device, **arguments.arguments)
    arguments = signature(cross_entropy).bind(input, target, weight, **options)
    arguments.apply_defaults()
    return serving.planned(device, **arguments.arguments)
