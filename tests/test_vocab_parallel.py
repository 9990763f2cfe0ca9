"""vocab_parallel_cross_entropy on 2, 3 and 4 ranks of gloo: the loss and gradient of the rows put together, in one collective."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from oracle import exact_loss
from problems import make_logits, make_target, make_weight
from sharded_cases import CASES, SHARDS, SWEEP, Case, assert_within, exact, limits, run
from sharded_statistics import N_RANKS, ROWS, STATISTICS, check_statistics, statistics
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import fusedloss
from fusedloss import sharded
from fusedloss.backends import cpu
from fusedloss.distributed import vocab_parallel_cross_entropy


def compared_with_torch(mesh: Any) -> dict[str, Any]:
    """torch's loss_parallel beside ours, and the collectives of both directions."""
    found: dict[str, Any] = {}
    logits, target = make_logits(ROWS, 20, dtype=torch.float64), make_target(ROWS, n_classes=20)
    for reduction in ("mean", "sum", "none"):
        shard = logits.tensor_split(N_RANKS, 1)[dist.get_rank()].clone().requires_grad_()
        with CommDebugMode() as forward:
            loss = vocab_parallel_cross_entropy(shard, target, reduction=reduction)
        with CommDebugMode() as backward:
            (gradient,) = torch.autograd.grad(loss.sum(), shard)
        theirs = DTensor.from_local(shard.detach(), mesh, [Shard(1)]).requires_grad_()
        with loss_parallel():
            expected = F.cross_entropy(theirs, target, reduction=reduction)
            expected.sum().backward()
        assert theirs.grad is not None
        found[reduction] = {
            "collectives": (forward.get_total_counts(), backward.get_total_counts()),
            "loss": (loss.detach(), expected.to_local().detach()),
            "gradient": (gradient, theirs.grad.to_local()),
        }
    return found


DTENSOR_CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "max": {"reduction": "max"},
    "smoothing and weight": {"label_smoothing": 0.1, "weight": True},
}


def dtensor_problem(options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    target = make_target(ROWS, n_classes=22)
    target[2] = -100
    options = {**options, "weight": make_weight(22, torch.float64)} if "weight" in options else dict(options)
    return make_logits(ROWS, 22, dtype=torch.float64), target, options


def dtensor_calls(mesh: Any) -> dict[str, Any]:
    """Loss and gradient, gathered, of DTensors whose classes are sharded, alone or with the batch."""
    found: dict[str, Any] = {}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name, arguments in DTENSOR_CALLS.items():
        logits, target, options = dtensor_problem(arguments)
        layouts: dict[str, tuple[Any, list[Any], Any]] = {
            "classes": (mesh, [Shard(1)], target),
            "classes and replicas": (square, [Replicate(), Shard(1)], target),
        }
        if name in ("mean", "sum", "none"):
            layouts["classes and batch"] = (
                square,
                [Shard(0), Shard(1)],
                distribute_tensor(target, square, [Shard(0), Replicate()]),
            )
        for layout, (on, placements, labels) in layouts.items():
            leaf = distribute_tensor(logits, on, placements).requires_grad_()
            for inside in (False, True):
                with loss_parallel() if inside else nullcontext():
                    loss = fusedloss.cross_entropy(leaf, labels, **options)
                    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                assert gradient.placements == leaf.placements
                found[name, layout, inside] = loss.full_tensor().detach(), gradient.full_tensor()
        found["plan", name] = str(fusedloss.plan(leaf, labels, **options))
    replicated = distribute_tensor(logits, mesh, [Replicate()])
    found["plan of replicas"] = str(fusedloss.plan(replicated, target))
    return found


def in_two_dtypes(mesh: Any) -> list[tuple[Tensor, Tensor]]:
    """Losses of bfloat16 logits as PyTorch has them and as they were accumulated: of shards, of a DTensor."""
    logits, target = make_logits(ROWS, 20, dtype=torch.bfloat16), make_target(ROWS, n_classes=20)
    shard, dtensor = logits.tensor_split(N_RANKS, 1)[dist.get_rank()].clone(), distribute_tensor(logits, mesh, [Shard(1)])
    losses = [
        (vocab_parallel_cross_entropy(shard, target, out_dtype=dtype), fusedloss.cross_entropy(dtensor, target, out_dtype=dtype))
        for dtype in (None, torch.float32)
    ]
    return [(of_shards, of_dtensor.full_tensor()) for of_shards, of_dtensor in losses]


def errors(mesh: Any) -> dict[str, str]:
    """What raises on this rank; every rank must get as far, for none may wait for another."""
    shard, target = make_logits(ROWS, 5), make_target(ROWS, n_classes=20)
    outside = target.clone()
    outside[2] = 20
    calls: dict[str, Any] = {
        "out of range": lambda: vocab_parallel_cross_entropy(shard, outside),
        "gathered": lambda: vocab_parallel_cross_entropy(make_logits(ROWS, 20), target, n_classes=20),
        "unknown": lambda: vocab_parallel_cross_entropy(shard, target, first_class=5 * dist.get_rank()),
        "weight": lambda: vocab_parallel_cross_entropy(shard, target, make_weight(5), n_classes=20),
        "reduction": lambda: vocab_parallel_cross_entropy(shard, target, reduction="average"),
        "number": lambda: vocab_parallel_cross_entropy(shard, target, n_classes=20.0),
        "gap": lambda: vocab_parallel_cross_entropy(shard, target, n_classes=21),
        "overlap": lambda: vocab_parallel_cross_entropy(shard, target, first_class=5 * (dist.get_rank() // 2), n_classes=20),
        "unequal": lambda: vocab_parallel_cross_entropy(make_logits(ROWS, 5 + dist.get_rank()), target % 20),
        "grad": lambda: torch.func.grad(lambda logits: vocab_parallel_cross_entropy(logits, target))(shard),
        "vmap": lambda: torch.func.vmap(lambda logits: vocab_parallel_cross_entropy(logits, target))(shard.unsqueeze(0)),
        "subclass": lambda: vocab_parallel_cross_entropy(distribute_tensor(shard, mesh, [Replicate()]), target),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)) as raised:
            call()
        found[name] = f"{type(raised.value).__name__}: {raised.value}"
    leaf = shard.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, target)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(loss, leaf, create_graph=True)
    found["second derivative"] = str(raised.value)
    return found


def data_and_tensor_parallel() -> Tensor:
    """This rank's gradient of the mean over 2 x 2 ranks: rows over the first dimension, classes over the second."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    logits, target = make_logits(ROWS, 20, dtype=torch.float64), make_target(ROWS, n_classes=20)
    target[:4] = -100
    row, col = mesh.get_coordinate()
    rows = logits.tensor_split(2)[row].tensor_split(2, 1)[col].clone().requires_grad_()
    labels = target.tensor_split(2)[row]
    scale = fusedloss.distributed.global_scale(labels, group=mesh.get_group("data"))
    loss = vocab_parallel_cross_entropy(rows, labels, group=mesh.get_group("tensor"), reduction="sum", scale=scale)
    loss.backward()
    assert rows.grad is not None
    return rows.grad / 2  # as DistributedDataParallel averages


def rank_main(rank: int, folder: Path, cases: list[Case]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_RANKS)
    groups = {n: dist.new_group(list(range(n))) for n in (2, 3, 4)}
    results: dict[Any, Any] = {}
    for case in cases:
        n_ranks = len(SHARDS[case.shards][0])
        if rank < n_ranks:
            results[case] = run(case, rank, groups[n_ranks])
    results["torch"] = compared_with_torch(init_device_mesh("cpu", (N_RANKS,)))
    results["statistics"] = statistics()
    results["dtensor"] = dtensor_calls(init_device_mesh("cpu", (N_RANKS,)))
    results["out_dtype"] = in_two_dtypes(init_device_mesh("cpu", (N_RANKS,)))
    results["errors"] = errors(init_device_mesh("cpu", (N_RANKS,)))
    results["mesh"] = data_and_tensor_parallel()
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads, torn down with the interpreter, now and then abort a process that has done its work


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = CASES + (SWEEP if request.config.getoption("--sweep") else [])
    torch.multiprocessing.start_processes(rank_main, (folder, cases), nprocs=N_RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(N_RANKS)]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.sweep) for case in SWEEP)], ids=str)
def test_shards_have_the_loss_and_gradient_of_whole_rows(case: Case, results: list[dict[Any, Any]]) -> None:
    loss, gradient = exact(case)
    losses, gradients = zip(*(found[case] for found in results if case in found), strict=True)
    assert all(torch.equal(found, losses[0]) for found in losses), "ranks differ"
    assert losses[0].dtype == case.dtype
    of_loss, of_gradient = limits(case)
    assert_within(losses[0], loss, of_loss)
    assert_within(torch.cat(gradients, 1), gradient, of_gradient)  # that of padding is 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_torchs_loss_parallel_in_one_collective(reduction: str, results: list[dict[Any, Any]]) -> None:
    for found in results:
        for ours, theirs in (found["torch"][reduction]["loss"], found["torch"][reduction]["gradient"]):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
        assert found["torch"][reduction]["collectives"] == (1, 0)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_whole_rows(name: str, results: list[dict[Any, Any]]) -> None:
    check_statistics(name, [found["statistics"] for found in results])


@pytest.mark.parametrize("name", DTENSOR_CALLS)
def test_a_dtensor_of_sharded_classes_is_a_drop_in(name: str, results: list[dict[Any, Any]]) -> None:
    logits, target, options = dtensor_problem(DTENSOR_CALLS[name])
    logits.requires_grad_()
    expected = exact_loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    for rank in results:
        calls = {key: value for key, value in rank["dtensor"].items() if key[0] == name}
        assert len(calls) in (4, 6)
        for loss, found in calls.values():
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(found, gradient, rtol=1e-13, atol=1e-15)
        assert "one collective" in rank["dtensor"]["plan", name]
        assert (cpu.MISSING or "not exactly one shards the classes") in rank["dtensor"]["plan of replicas"]


def test_the_loss_as_it_was_accumulated(results: list[dict[Any, Any]]) -> None:
    logits, target = make_logits(ROWS, 20, dtype=torch.bfloat16), make_target(ROWS, n_classes=20)
    expected = F.cross_entropy(logits.double(), target).float()
    for rank in results:
        for rounded, loss in zip(*rank["out_dtype"], strict=True):
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            assert torch.equal(rounded, loss.bfloat16())


def test_every_rank_raises_the_same(results: list[dict[Any, Any]]) -> None:
    for found in results:
        messages = found["errors"]
        assert messages["out of range"].startswith("IndexError: Target 20 is out of bounds")
        assert messages["gathered"].startswith("ValueError: input holds all 20 classes")
        assert messages["weight"].startswith("RuntimeError: weight tensor should be defined either for all 20 classes")
        assert messages["reduction"] == "ValueError: average is not a valid value for reduction"
        assert "has no second derivative" in messages["second derivative"]
        assert messages["number"] == "TypeError: argument 'n_classes' must be int, not float"
        places = "5 from 0 on of 21, 5 from 5 on of 21, 5 from 10 on of 21, 5 from 15 on of 21"
        assert f"ValueError: the shards do not make up the rows: the ranks hold {places};" in messages["gap"]
        for name in ("overlap", "unequal"):
            assert messages[name].startswith("ValueError: the shards do not make up the rows")
        for name, reason in {"grad": "torch.func", "vmap": "torch.func", "subclass": "DTensor"}.items():
            assert messages[name].startswith("NotImplementedError: the loss of sharded classes")
            assert reason in messages[name]
    assert results[1]["errors"]["unknown"].startswith("ValueError: n_classes must be given with first_class=5")


@pytest.mark.parametrize(
    ("places", "whole"),
    [
        ([(0, 3), (3, 4), (7, 1)], True),
        ([(7, 1), (0, 3), (3, 4)], True),  # in any order
        ([(0, 8), (8, 0), (12, 0)], True),  # nothing but padding
        ([(0, 3), (3, 4), (3, 1)], False),
        ([(0, 4), (0, 4), (8, 0)], False),
        ([(1, 4), (5, 4), (9, 0)], False),
        ([(0, 3), (3, 3), (6, 1)], False),
    ],
)
def test_which_shards_make_up_rows(places: list[tuple[int, int]], whole: bool) -> None:
    for many in (1, 2**27):  # classes; as many as float32 does not count
        found = torch.tensor([(first * many, width * many, 8 * many) for first, width in places])
        assert sharded._make_up_rows(found).item() == whole


def test_data_parallel_times_tensor_parallel_is_one_process(results: list[dict[Any, Any]]) -> None:
    logits, target = make_logits(ROWS, 20, dtype=torch.float64).requires_grad_(), make_target(ROWS, n_classes=20)
    target[:4] = -100
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    for rank, found in enumerate(results):
        mine = expected.tensor_split(2)[rank // 2].tensor_split(2, 1)[rank % 2]
        torch.testing.assert_close(found["mesh"], mine, rtol=1e-14, atol=1e-16)


def test_a_group_of_one_is_the_plain_loss() -> None:
    logits, target = make_logits(ROWS, 10).requires_grad_(), make_target(ROWS, n_classes=7)
    loss, stats = vocab_parallel_cross_entropy(logits, target, n_classes=7, return_stats=True)
    expected, expected_stats = fusedloss.cross_entropy(logits[:, :7], target, return_stats=True)
    assert torch.equal(loss, expected)
    assert all(torch.equal(found, value) for found, value in zip(stats, expected_stats, strict=True))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient[:, 7:], torch.zeros(ROWS, 3))


@pytest.fixture
def _the_other_rank_is_not_there() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_the_other_rank_is_not_there")
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_stats": True}, {"reduction": "topk", "top_k": 2}], ids=str)
def test_tensors_without_values(kind: str, options: dict[str, Any]) -> None:
    """Nobody looks at their labels, nor at the other ranks' shards; shapes and dtypes are those of whole rows."""
    logits, weight = make_logits(4, 10, dtype=torch.bfloat16), make_weight(10, torch.bfloat16)
    tensors, shard = (logits, make_target(4, n_classes=10), weight), logits[:, :5].clone()
    whole = fusedloss.cross_entropy(*tensors, **options)
    mode = FakeTensorMode() if kind == "fake" else nullcontext()
    with mode:
        hollow = [tensor.to("meta") if kind == "meta" else mode.from_tensor(tensor) for tensor in (shard, *tensors[1:])]
        hollow[0].requires_grad_()
        found = vocab_parallel_cross_entropy(*hollow, **options)
        (gradient,) = torch.autograd.grad(tree_leaves(found)[0].sum(), hollow[0])
    for ours, expected in zip(tree_leaves((found, gradient)), tree_leaves((whole, shard)), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (expected.shape, expected.dtype, hollow[0].device)
