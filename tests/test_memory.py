"""Memory that is not there, or too little of it: what a kernel that takes addresses must never meet.

What ended the process before is tried in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import BOTH
from poison import poisoned_memory
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedloss
from fusedloss.backends import cpu, cpu_prepared
from fusedloss.plan import ClassShard, Inputs, Options

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")


def _run(program: str, **environment: str) -> str:
    """What a program prints, which must not end by a signal."""
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2", **environment},
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return result.stdout


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view(tensor: Tensor) -> Tensor:
    both = torch.cat([tensor, tensor])
    both.untyped_storage().resize_(0)
    return both[len(tensor) :]


def cut(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "served"


def freed_before_the_call() -> None:
    """Each tensor of a call in turn; a known call, too. Where only the end of it is gone PyTorch reads what is not its own, and
    so does a known call; its mean of class probabilities crashes where all is gone."""
    logits, target, weight = make_logits(8, 10), make_target(8, n_classes=10), make_weight(10)
    ours = fusedloss.cross_entropy
    for take in (cut, freed, freed_view):
        for _ in range(1 if take is cut else 4):
            assert outcome(lambda: ours(take(logits), target)) == "RuntimeError"  # noqa: B023
            assert outcome(lambda: ours(logits, take(target), weight)) == "RuntimeError"  # noqa: B023
            assert outcome(lambda: ours(logits, target, take(weight))) == "RuntimeError"  # noqa: B023
            ours(logits, target), ours(logits, target, weight)
        if take is not cut:  # there PyTorch reads what is not its own
            assert outcome(lambda: F.cross_entropy(take(logits), target)) == "RuntimeError"  # noqa: B023
            assert outcome(lambda: F.cross_entropy(logits, take(target))) == "RuntimeError"  # noqa: B023
        probabilities, rows = make_probabilities(8, 10), torch.rand(8)
        assert outcome(lambda: ours(logits, take(probabilities))) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: ours(logits, (target, take(target), 0.5))) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: ours(logits, (target, target, take(rows)))) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: ours(logits, target, sample_weight=take(rows))) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: ours(logits.bfloat16(), target, take(weight.bfloat16()))) == "RuntimeError"  # noqa: B023
    for strided in (make_logits(8, 20)[:, ::2], make_logits(10, 8).t(), make_logits(8, 3, 10).transpose(1, 2)):
        strided.untyped_storage().resize_(strided.untyped_storage().nbytes() - 8)  # the last two values
        labels = target if strided.dim() == 2 else target.unsqueeze(1).expand(8, 3)
        assert outcome(lambda: ours(strided, labels)) == "RuntimeError"  # noqa: B023
    print("done")


def test_memory_that_was_freed_before_the_call() -> None:
    assert _run("import test_memory; test_memory.freed_before_the_call()") == "done\n"


def hollow_tensors_for_the_kernel() -> None:
    """Of each function in turn one tensor without values, which are looked for on the meta device."""
    f32, options, shard = torch.float32, Options(), ClassShard(0, 20)
    real = Inputs(make_logits(8, 10), make_target(8, n_classes=10), weight=make_weight(10))
    prepared = cpu_prepared.prepare(real, options, f32, True, real, False)
    assert prepared is not None
    dloss, rows, saved, stats = torch.tensor(2.0), torch.rand(8), torch.rand(32), torch.rand(3, 8)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for hollow in (lambda tensor: tensor.to("meta"), mode.from_tensor):
        for name in ("logits", "target", "weight"):
            inputs = real._replace(**{name: hollow(getattr(real, name))})
            logits, target, _, _, weight, *_ = inputs
            for call in (
                lambda: cpu.forward(inputs, options, f32, True),  # noqa: B023
                lambda: cpu.forward_overwriting(inputs, options, f32),  # noqa: B023
                lambda: cpu.backward(dloss, inputs, saved, options),  # noqa: B023
                lambda: cpu.shard_statistics(inputs, options, shard),  # noqa: B023
                lambda: cpu.shard_gradient(rows, inputs, stats, 1.0, options, shard),  # noqa: B023
                lambda: prepared.forward(logits, target, weight, 1.0),  # noqa: B023
                lambda: prepared.backward(dloss, logits, target, weight, saved),  # noqa: B023
            ):
                assert outcome(call) == "RuntimeError"
        assert outcome(lambda: prepared.scale_gradient(hollow(real.logits), dloss)) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: prepared.scale_gradient(real.logits, hollow(dloss))) == "RuntimeError"  # noqa: B023
        assert outcome(lambda: cpu.scale_gradient(real.logits, hollow(dloss))) == "RuntimeError"  # noqa: B023
    print("done")


def test_tensors_without_values_end_no_process() -> None:
    assert _run("import test_memory; test_memory.hollow_tensors_for_the_kernel()") == "done\n"


def freed_before_the_backward() -> None:
    """PyTorch has what it needs in a tensor of its own; ours is served where the gradient is made already, or raises."""
    made = (("mean", torch.float32), ("none", torch.float32))  # the gradients of few rows
    for reduction, dtype in (*made, ("max", torch.float32), ("mean", torch.float16)):
        for _ in range(4):
            leaf, target = make_logits(8, 10, dtype=dtype).requires_grad_(), make_target(8, n_classes=10)
            logits = leaf * 1
            loss = fusedloss.cross_entropy(logits, target, reduction=reduction).sum()
            logits.untyped_storage().resize_(0)
            found = outcome(loss.backward)
            assert found == ("served" if (reduction, dtype) in made else "RuntimeError")
            if found == "served":
                expected = leaf.detach().clone().requires_grad_()
                F.cross_entropy(expected, target, reduction=reduction).sum().backward()
                assert leaf.grad is not None
                assert expected.grad is not None
                torch.testing.assert_close(leaf.grad, expected.grad)
        upstream = torch.ones((), dtype=dtype)
        upstream.untyped_storage().resize_(0)
        for function in BOTH:
            loss = function(leaf, target)
            assert outcome(lambda: loss.backward(upstream)) == "RuntimeError"  # noqa: B023
    for dtype in (torch.float32, torch.bfloat16):
        leaf, target = make_logits(8, 10, dtype=dtype).requires_grad_(), make_target(8, n_classes=10)
        for _ in range(4):
            for upstream in (torch.ones(1, dtype=dtype).expand(8), torch.ones(8, 2, dtype=dtype)[:, 0]):  # to be copied
                loss = fusedloss.cross_entropy(leaf, target, reduction="none")
                upstream.untyped_storage().resize_(0)
                assert outcome(lambda: loss.backward(upstream)) == "RuntimeError"  # noqa: B023
    print("done")


def test_memory_that_was_freed_before_the_backward() -> None:
    assert _run("import test_memory; test_memory.freed_before_the_backward()") == "done\n"


_ON_A_SMALL_STACK = """
import threading, torch, torch.nn.functional as F, fusedloss
torch.set_num_threads({threads})
function, found = {function}, []

def calls():
    for shape in ((16, 10), (64, 10, 30), (4, 40), (20, 3000), (2, 300, 100)):
        for dtype in (torch.float32, torch.float64):
            for reduction in ("mean", "none"):
                logits = torch.randn(shape, dtype=dtype).requires_grad_()
                target = torch.randint(shape[1], (shape[0], *shape[2:]))
                function(logits, target, reduction=reduction).sum().backward()
                found.append(bool(logits.grad.isfinite().all()))

if {stack}:
    calls()  # what Python and autograd do once needs more
    found.clear()
    threading.stack_size({stack})
    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
else:
    calls()
print(len(found), all(found))
"""


@pytest.mark.parametrize("function", ["F.cross_entropy", "fusedloss.cross_entropy"])
@pytest.mark.parametrize(("stack", "threads"), [(32 << 10, 1), (0, 2)], ids=["a Python thread", "workers"])
def test_small_stacks(function: str, stack: int, threads: int) -> None:
    program = _ON_A_SMALL_STACK.format(function=function, stack=stack, threads=threads)
    assert _run(program, OMP_STACKSIZE="32k") == "20 True\n"


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options("sum", label_smoothing=0.1),
        Options("none"),
        Options("max"),
        Options("topk", top_k_fraction=0.5),
        Options("none", return_stats=True, z_loss=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 3), (6, 70), (2, 9, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operators_write_all_that_they_return(dtype: torch.dtype, shape: tuple[int, ...], options: Options) -> None:
    """An ignored row included, whose gradient is 0 and of which nothing is known."""
    with poisoned_memory():
        assert torch.empty(4).isnan().all()
        logits, rows = make_logits(*shape, dtype=dtype), (shape[0], *shape[2:])
        indices = make_target(*rows, n_classes=shape[1], ignored=-100).reshape(-1)
        for target in (indices, make_probabilities(*shape, dtype=dtype)):
            inputs = Inputs(logits, target)
            if options.return_stats and inputs.has_probabilities():
                continue
            for needs_grad in (False, True):
                outputs = torch.ops.fusedloss.forward(*inputs, *options, dtype, needs_grad, "cpu")
                assert all(output.isfinite().all() or output is outputs[1] for output in outputs)
                assert not outputs[1].isnan().any()
                assert (outputs[4].abs() < 100).all()
            saved = outputs[1]
            if saved.numel() > 0:
                gradient = torch.ops.fusedloss.backward(torch.ones_like(outputs[0]), *inputs, saved, *options, "cpu")
                assert gradient.isfinite().all()
