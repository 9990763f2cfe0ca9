"""Tensor subclasses with a rule for each operator: DTensor, alone and compiled, and one of a user's own."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import BOTH
from problems import make_logits, make_target
from torch import Tensor

import fusedloss


@pytest.fixture(scope="module")  # of a second one in a process, PyTorch compiles no backward
def mesh() -> Iterator[Any]:
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("placement", ["replicated", "rows", "classes"])
def test_dtensor(mesh: Any, placement: str, patched: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    of_logits = {"replicated": Replicate(), "rows": Shard(0), "classes": Shard(1)}[placement]
    of_target = Shard(0) if placement == "rows" else Replicate()
    results = []
    for call in BOTH:
        logits = distribute_tensor(make_logits(6, 8), mesh, [of_logits]).requires_grad_()
        target = distribute_tensor(make_target(6, n_classes=8), mesh, [of_target])
        ours = call is not F.cross_entropy
        with loss_parallel() if placement == "classes" else nullcontext():
            if ours and patched:
                with fusedloss.patch_torch():
                    loss = F.cross_entropy(logits, target)
            else:
                loss = call(logits, target)
            loss.backward()
        assert not ours or "DTensor" in fusedloss.plan(logits, target).reason
        results.append((loss.full_tensor(), logits.grad.full_tensor()))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("placement", ["replicated", "rows", "classes"])
def test_dtensor_under_compile(mesh: Any, placement: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    of_logits = {"replicated": Replicate(), "rows": Shard(0), "classes": Shard(1)}[placement]
    results = []
    for call in BOTH:
        torch.compiler.reset()
        logits = distribute_tensor(make_logits(6, 8), mesh, [of_logits]).requires_grad_()
        target = distribute_tensor(make_target(6, n_classes=8), mesh, [Shard(0) if placement == "rows" else Replicate()])
        loss = torch.compile(call, backend="aot_eager")(logits, target)
        loss.backward()
        results.append((loss.full_tensor(), logits.grad.full_tensor()))
    torch.compiler.reset()
    torch.testing.assert_close(*results)


class Logged(Tensor):
    """A wrapper that knows ATen's operators only."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Logged":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func.namespace == "aten", func
        unwrapped = torch.utils._pytree.tree_map_only(Logged, lambda tensor: tensor.inner, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map_only(Tensor, Logged, result)


def test_another_subclass_with_a_dispatch_of_its_own() -> None:
    results = []
    for call in BOTH:
        logits = Logged(make_logits(6, 5)).requires_grad_()
        loss = call(logits, make_target(6, n_classes=5))
        loss.backward()
        results.append((loss.detach().inner, logits.grad.inner))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_upstream_gradient_of_another_subclass(reduction: str, create_graph: bool) -> None:
    """The loss is a plain tensor, its gradient one that only the class's own rules can multiply."""
    layer = torch.eye(5)
    for call in (*BOTH, lambda logits, *rest, **options: fusedloss.linear_cross_entropy(logits, layer, *rest, **options)):
        for _ in range(3):  # known by then
            logits, target = make_logits(6, 5).requires_grad_(), make_target(6, n_classes=5)
            loss = call(logits, target, reduction=reduction)
            (expected,) = torch.autograd.grad(2 * loss.sum(), logits, retain_graph=True)
            dloss = Logged(torch.full_like(loss, 2.0))
            (gradient,) = torch.autograd.grad(loss, logits, dloss, create_graph=create_graph)
            assert type(gradient) is Logged
            torch.testing.assert_close(gradient.inner, expected)
