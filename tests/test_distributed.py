"""fusedloss.distributed.global_scale: ranks and micro-batches with unequal counts have the gradient of the whole batch's mean."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from paths import Path as Backend
from paths import no_waits
from problems import make_logits, make_target, make_weight
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedloss
from fusedloss.distributed import global_scale

CLASSES, FEATURES, ROWS = 10, 6, 24
CASES: dict[str, dict[str, Any]] = {
    "unequal counts": {},
    "class weights": {"weight": make_weight(CLASSES, torch.float64)},
    "label smoothing and weights": {"weight": make_weight(CLASSES, torch.float64), "label_smoothing": 0.1},
    "a rank that counts nothing": {},
    "accumulation": {},
    "another ignore_index": {"ignore_index": 3},
    "fused with the layer": {},
}


def batch(case: str) -> tuple[Tensor, Tensor]:
    inputs, target = make_logits(ROWS, FEATURES, dtype=torch.float64), make_target(ROWS, n_classes=CLASSES)
    target[:7] = -100 if case != "another ignore_index" else 3
    if case == "a rank that counts nothing":
        target[: ROWS // 2] = -100
    return inputs, target


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES, dtype=torch.float64)


def gradient_on_this_rank(case: str, rank: int, n_ranks: int) -> Tensor:
    """The gradient after DistributedDataParallel's averaging, from this rank's rows alone."""
    options = CASES[case]
    counted = {name: value for name, value in options.items() if name in ("weight", "ignore_index")}
    if case == "fused with the layer":
        return _gradient_of_the_fused_layer(*(rows.tensor_split(n_ranks)[rank] for rows in batch(case)))
    model = DistributedDataParallel(layer())
    inputs, target = (rows.tensor_split(n_ranks)[rank] for rows in batch(case))
    parts = list(zip(inputs.split(5), target.split(5), strict=True)) if case == "accumulation" else [(inputs, target)]
    scale = global_scale([labels for _, labels in parts], **counted)
    with model.no_sync():
        for x, labels in parts[:-1]:
            fusedloss.cross_entropy(model(x), labels, reduction="sum", scale=scale, **options).backward()
    x, labels = parts[-1]
    fusedloss.cross_entropy(model(x), labels, reduction="sum", scale=scale, **options).backward()
    return model.module.weight.grad


def _gradient_of_the_fused_layer(inputs: Tensor, target: Tensor) -> Tensor:
    module = fusedloss.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, dtype=torch.float64, reduction="sum", chunk_rows=5)
    module.linear.load_state_dict(layer().state_dict())
    model = DistributedDataParallel(module)  # kept: with it go the hooks that average the gradients
    model(inputs, target, scale=global_scale(target)).backward()
    return module.linear.weight.grad


def rank_main(rank: int, n_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n_ranks)
    results: dict[str, Tensor] = {case: gradient_on_this_rank(case, rank, n_ranks) for case in CASES}
    alone = dist.new_group([0]), dist.new_group([1])
    results["group of one"] = global_scale(torch.zeros(rank + 2, dtype=torch.long), group=alone[rank])
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads, torn down with the interpreter, now and then abort a process that has done its work


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (2, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradient_of_the_whole_batch(case: str, results: list[dict[str, Tensor]]) -> None:
    model, (inputs, target) = layer(), batch(case)
    torch.nn.functional.cross_entropy(model(inputs), target, **CASES[case]).backward()
    for rank in range(2):
        torch.testing.assert_close(results[rank][case], model.weight.grad, rtol=1e-12, atol=1e-14)


def test_the_mean_of_the_ranks_means_is_something_else() -> None:
    """So that the test above could fail."""
    model, (inputs, target) = layer(), batch("unequal counts")
    whole, parts = fusedloss.cross_entropy(model(inputs), target), zip(inputs.chunk(2), target.chunk(2), strict=True)
    mean_of_means = sum(fusedloss.cross_entropy(model(x), y) for x, y in parts) / 2
    assert mean_of_means.item() != pytest.approx(whole.item(), rel=0.01)


def test_a_group_is_the_ranks_that_are_averaged_over(results: list[dict[str, Tensor]]) -> None:
    assert [found["group of one"].item() for found in results] == [1 / 2, 1 / 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_alone_it_is_the_mean(path: Backend, weighted: bool, dtype: torch.dtype) -> None:
    logits, target = make_logits(ROWS, CLASSES, dtype=dtype).requires_grad_(), make_target(ROWS, n_classes=CLASSES)
    target[3:9] = -100
    weight = make_weight(CLASSES, dtype) if weighted else None
    scale = global_scale(target, weight=weight)
    loss = fusedloss.cross_entropy(logits, target, weight, reduction="sum", scale=scale)
    expected = torch.nn.functional.cross_entropy(logits, target, weight)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(loss, expected, **tolerance)
    gradients = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("shape", [(CLASSES,), (4, CLASSES), (4, CLASSES, 3)])
def test_every_row_of_class_probabilities_counts(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, target = (
        torch.randn(shape, dtype=torch.float64),
        torch.randn(shape, dtype=torch.float64).softmax(min(1, len(shape) - 1)),
    )
    weight = make_weight(CLASSES, torch.float64)
    loss = fusedloss.cross_entropy(logits, target, weight, reduction="sum", scale=global_scale(target, weight=weight))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, weight))


def test_nothing_counted_is_nan_with_gradient_0_as_pytorchs_mean() -> None:
    logits, target = torch.randn(3, CLASSES, requires_grad=True), torch.full((3,), -100)
    scale = global_scale(target)
    loss = fusedloss.cross_entropy(logits, target, reduction="sum", scale=scale)
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert not logits.grad.any()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        global_scale([])


def test_counts_beyond_float32s_integers() -> None:
    n = 2**24 + 1
    assert global_scale(torch.zeros(1, dtype=torch.long).expand(n)).item() == 1 / n


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    target = make_target(ROWS, n_classes=CLASSES).cuda()
    weight = make_weight(CLASSES).cuda()
    with no_waits():
        scale = global_scale([target, target], weight=weight)
    assert scale.is_cuda
