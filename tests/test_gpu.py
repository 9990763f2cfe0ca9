"""What only a GPU can show: CUDA graphs, several streams, threads and devices, no wait of the host.

The loss is bitwise deterministic, so that every test compares bits with a call that ran alone.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paths import no_waits
from problems import make_logits, make_target

import fusedloss

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
# Each case is here for the way its programs meet: one program; a ticket; a count before; rows read twice; a later selection.
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "single program": ((64, 10), FP32, {}),
    "mean of many programs": ((4099, 10), FP32, {}),
    "sum of many programs": ((4099, 10), FP32, {"reduction": "sum"}),
    "ragged rows": ((300, 1001), BF16, {}),
    "long rows": ((150, 128256), BF16, {}),
    "none": ((300, 1001), BF16, {"reduction": "none"}),
    "max": ((4099, 10), FP32, {"reduction": "max"}),
    "topk": ((300, 1001), FP32, {"reduction": "topk", "top_k": 0.5}),
    "pixels": ((2, 19, 64, 64), BF16, {}),
}
SEVERAL_GPUS = pytest.mark.skipif("torch.cuda.device_count() < 2", reason="torch.cuda sees fewer than two GPUs")
cases = pytest.mark.parametrize("case", CASES)


def make(case: str, seed: int = 0, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype, _ = CASES[case]
    logits = make_logits(*shape, dtype=dtype, seed=seed).to(device).requires_grad_()
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100, seed=seed + 1).to(device)
    return logits, target


def run(case: str, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, for an upstream gradient of 1."""
    loss = fusedloss.cross_entropy(logits, target, **CASES[case][2])
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), gradient


def same(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, expected, strict=True))


def captured(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `call`, which runs once beforehand: Triton compiles at the first launch, which no capture may see."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, results


@cases
def test_a_graph_replays_with_new_inputs(case: str) -> None:
    logits, target = make(case)
    graph, results = captured(lambda: run(case, logits, target), torch.cuda.Stream())
    for seed in (3, 4, 5):
        new_logits, new_target = make(case, seed)
        expected = run(case, new_logits, new_target)
        with torch.no_grad():
            logits.copy_(new_logits)
        target.copy_(new_target)
        for _ in range(3):  # a ticket that a replay left behind would show in the next
            graph.replay()
            torch.cuda.synchronize()
            assert same(results, expected)


@cases
def test_a_graph_captured_on_a_stream_of_its_own_needs_no_call_there_before(case: str) -> None:
    """The kernels are compiled on one stream; the stream of the capture sees its first call while it captures."""
    logits, target = make(case)
    expected = run(case, logits, target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        results = run(case, logits, target)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same(results, expected)
    # A call on the stream of the capture, after it: nothing of the graph's may have been kept for it.
    del graph, results
    assert same(run(case, logits, target), expected)


def test_a_capture_after_a_warmup_needs_no_call_before() -> None:
    logits, target = torch.randn(64, 777, device="cuda", requires_grad=True), torch.zeros(64, dtype=torch.long, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"fusedloss\.warmup"), torch.cuda.graph(graph):
        fusedloss.cross_entropy(logits, target, z_loss=1e-3, softcap=3.0)
    fusedloss.warmup(logits, target, z_loss=1e-3, softcap=3.0)
    with torch.cuda.graph(graph):
        loss = fusedloss.cross_entropy(logits, target, z_loss=1e-3, softcap=3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, fusedloss.cross_entropy(logits, target, z_loss=1e-3, softcap=3.0))


@cases
def test_replays_run_beside_calls_on_the_stream_of_the_capture(case: str) -> None:
    logits, target = make(case)
    expected = run(case, logits, target)
    capturing, replaying = torch.cuda.Stream(), torch.cuda.Stream()
    graph, results = captured(lambda: run(case, logits, target), capturing)
    eager = []
    for _ in range(30):
        with torch.cuda.stream(replaying):
            graph.replay()
        with torch.cuda.stream(capturing):
            eager.append(run(case, logits, target))
    torch.cuda.synchronize()
    assert same(results, expected)
    assert all(same(found, expected) for found in eager)


@cases
def test_several_streams(case: str) -> None:
    problems = [make(case, seed) for seed in range(4)]
    expected = [run(case, *problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found: list[list[Any]] = [[] for _ in problems]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(run(case, *problems[i]))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(same(result, expected[i]) for result in results)


@pytest.mark.parametrize("own_streams", [True, False])
def test_several_threads(own_streams: bool) -> None:
    case = "mean of many programs"
    problems = [make(case, seed) for seed in range(4)]
    expected = [run(case, *problem) for problem in problems]
    torch.cuda.synchronize()
    right = [False] * len(problems)

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            results = [run(case, *problems[i]) for _ in range(50)]
        stream.synchronize()
        right[i] = all(same(result, expected[i]) for result in results)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right)


@cases
def test_the_host_never_waits(case: str) -> None:
    logits, target = make(case)
    scale = torch.tensor(0.5, device="cuda")
    run(case, logits, target)  # compiles
    torch.cuda.synchronize()
    with no_waits():
        loss = fusedloss.cross_entropy(logits, target, scale=scale, **CASES[case][2])
        torch.autograd.grad(loss, logits, torch.ones_like(loss))


def test_graphed_callables() -> None:
    logits, target = make("ragged rows")
    loss = fusedloss.CrossEntropyLoss()
    expected = run("ragged rows", logits, target)
    graphed = torch.cuda.make_graphed_callables(loss, (logits.detach().clone().requires_grad_(), target))
    for _ in range(3):
        found = graphed(logits, target)
        (gradient,) = torch.autograd.grad(found, logits)
        assert same((found.detach(), gradient), expected)


@pytest.mark.parametrize("case", ["mean of many programs", "ragged rows", "max"])
def test_cudagraph_trees_on_a_stream_of_their_own(case: str) -> None:
    """The compiler's graphs warm up in a memory pool of their own, and check that nothing stays behind in it."""
    torch.compiler.reset()
    logits, target = make(case)
    expected = run(case, logits, target)
    compiled = torch.compile(lambda x, y: fusedloss.cross_entropy(x, y, **CASES[case][2]), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert same((loss.detach().clone(), gradient.clone()), expected)


def test_cudagraph_trees_of_the_fused_layer() -> None:
    torch.compiler.reset()
    layer = [torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((64, 32), (1000, 32))]
    target = torch.randint(1000, (64,), device="cuda")
    expected = fusedloss.linear_cross_entropy(*layer, target)
    gradients = torch.autograd.grad(expected, layer)
    compiled = torch.compile(fusedloss.linear_cross_entropy, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*layer, target)
        torch.testing.assert_close(loss.detach().clone(), expected.detach())
        for found, gradient in zip(torch.autograd.grad(loss, layer), gradients, strict=True):
            torch.testing.assert_close(found.clone(), gradient)


@SEVERAL_GPUS
@cases
def test_a_device_that_is_not_the_current_one(case: str) -> None:
    expected = run(case, *make(case))
    with torch.cuda.device(0):
        loss, gradient = run(case, *make(case, device="cuda:1"))
    assert loss.device == gradient.device == torch.device("cuda:1")
    assert same((loss.cpu(), gradient.cpu()), tuple(result.cpu() for result in expected))


@SEVERAL_GPUS
def test_devices_in_turn() -> None:
    case = "mean of many programs"
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    problems = [make(case, device=device) for device in devices]
    expected = [result.cpu() for result in run(case, *problems[0])]
    found = [run(case, *problem) for _ in range(20) for problem in problems]
    for results in found:
        assert same(tuple(result.cpu() for result in results), tuple(expected))


@SEVERAL_GPUS
def test_a_graph_on_a_device_that_is_not_the_current_one() -> None:
    """Whether a stream captures is a question about the device of the logits."""
    case = "mean of many programs"
    logits, target = make(case, device="cuda:1")
    expected = run(case, logits, target)
    torch.cuda.synchronize(1)

    def call() -> Any:
        with torch.cuda.device(0):  # the capture goes on, on the other device
            return run(case, logits, target)

    with torch.cuda.device(1):
        graph, results = captured(call, torch.cuda.Stream(1))
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    assert same(results, expected)
    assert same(run(case, logits, target), expected)
