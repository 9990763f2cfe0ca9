"""Looks for calls that take longer than PyTorch's: layouts, ranks, dtypes, reductions, with and without a gradient, one thread.

Prints the worst ten as Markdown. A call is forward and backward, or the forward alone under no_grad. Each ratio is ours / eager,
the median over pairs timed one after the other within one process, in the thread's own time: what else the machine does falls on
both alike, and the time that it takes the core away is nobody's.

On a CPU with AVX-512, ATEN_CPU_CAPABILITY=avx2 FUSEDLOSS_CPU_ISA=avx2 asks how both compare on one without.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from fusedloss.backends import cpu

TORCH = F.cross_entropy  # before it is replaced
BAR = 1.1  # no call that PyTorch serves should take more times as long

Loss = Callable[..., Any]
Step = Callable[[], object]
Make = Callable[[Loss], Step]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
REDUCTIONS = ("mean", "none")
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "(10,)": lambda dtype: torch.randn(10, dtype=dtype),
    "(1000,)": lambda dtype: torch.randn(1000, dtype=dtype),
    "4 x 10": lambda dtype: torch.randn(4, 10, dtype=dtype),
    "32 x 32": lambda dtype: torch.randn(32, 32, dtype=dtype),
    "128 x 10": lambda dtype: torch.randn(128, 10, dtype=dtype),
    "512 x 1000": lambda dtype: torch.randn(512, 1000, dtype=dtype),
    "(32, 32).t()": lambda dtype: torch.randn(32, 32, dtype=dtype).t(),
    "(4096, 128).t()": lambda dtype: torch.randn(4096, 128, dtype=dtype).t(),
    "(32000, 64).t()": lambda dtype: torch.randn(32000, 64, dtype=dtype).t(),
    "512 x 100 [:, ::2]": lambda dtype: torch.randn(512, 200, dtype=dtype)[:, ::2],
    "512 x 100 of 512 x 128": lambda dtype: torch.randn(512, 128, dtype=dtype)[:, :100],
    "(128, 10, 8)[:, :, 0]": lambda dtype: torch.randn(128, 10, 8, dtype=dtype)[:, :, 0],
    "rows expanded to 64 x 100": lambda dtype: torch.randn(1, 100, dtype=dtype).expand(64, 100),
    "2 x 2 x 64 x 64": lambda dtype: torch.randn(2, 2, 64, 64, dtype=dtype),
    "8 x 10 x 16 x 16": lambda dtype: torch.randn(8, 10, 16, 16, dtype=dtype),
    "2 x 150 x 32 x 32": lambda dtype: torch.randn(2, 150, 32, 32, dtype=dtype),
    "2 x 21 x 64 x 64 channels_last": lambda dtype: torch.randn(2, 21, 64, 64, dtype=dtype).to(memory_format=torch.channels_last),
    "4 x 1000 x 64": lambda dtype: torch.randn(4, 1000, 64, dtype=dtype),
    "1 x 32000 x 64": lambda dtype: torch.randn(1, 32000, 64, dtype=dtype),
    "2 x 5 x 16 x 16 transposed": lambda dtype: torch.randn(2, 5, 16, 16, dtype=dtype).transpose(2, 3),
}


def class_indices(logits: Tensor) -> Tensor:
    if logits.dim() == 1:
        return torch.randint(logits.shape[0], ())
    return torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))


def probabilities(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, dtype=logits.dtype).softmax(0 if logits.dim() == 1 else 1)


def call(loss: Loss, logits: Tensor, target: Tensor, has_gradient: bool = True, **options: Any) -> Step:
    """One call again and again."""
    logits = logits.detach().requires_grad_(has_gradient)
    upstream = torch.ones_like(loss(logits, target, **options))
    if not has_gradient:
        return lambda: loss(logits, target, **options)
    return lambda: torch.autograd.grad(loss(logits, target, **options), logits, upstream)


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape, dtype=dtype)
    return logits, class_indices(logits)


def in_turn(steps: list[Step]) -> Step:
    def step() -> None:
        for each in steps:
            each()

    return step


def batch_sizes(loss: Loss, sizes: range, n_classes: int) -> Step:
    """Another number of rows at every call, as padding to the longest makes it."""
    return in_turn([call(loss, *example(n_rows, n_classes)) for n_rows in sizes])


def eight_shapes(loss: Loss, has_gradient: bool = True) -> Step:
    return in_turn([call(loss, *example(128, n_classes), has_gradient=has_gradient) for n_classes in range(10, 18)])


def next_tokens(loss: Loss) -> Step:
    """A language model's loss, shifted by one."""
    logits, target = torch.randn(4, 65, 100), torch.randint(100, (4, 65))
    return call(loss, logits[:, :-1].transpose(1, 2), target[:, 1:])


def gradient_of_probabilities(loss: Loss) -> Step:
    logits = torch.randn(128, 10)
    target = probabilities(logits).requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, target), target)


def per_example_gradients(loss: Loss) -> Step:
    logits, target = example(32, 10)
    return lambda: torch.func.vmap(torch.func.grad(loss))(logits, target)


def double_backward(loss: Loss) -> Step:
    logits, target = example(64, 1000)
    logits.requires_grad_()

    def step() -> None:
        (gradient,) = torch.autograd.grad(loss(logits, target), logits, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), logits)

    return step


def accumulated(loss: Loss) -> Step:
    """One of eight steps whose gradients are added up."""
    logits, target = example(128, 10)
    logits.requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, target) / 8, logits)


def weighted_by_hand(loss: Loss) -> Step:
    """A loss for each row, which the caller weights."""
    logits, target = example(128, 10)
    logits.requires_grad_()
    weight = torch.rand(128)
    return lambda: torch.autograd.grad((loss(logits, target, reduction="none") * weight).mean(), logits)


def statistics_of(loss: Loss) -> Step:
    """With the accuracy, which PyTorch takes further operators for."""
    logits, target = example(128, 10)
    logits.requires_grad_()

    def ours() -> None:
        value, stats = loss(logits, target, return_stats=True)
        torch.autograd.grad(value, logits)
        stats.n_correct  # noqa: B018

    def theirs() -> None:
        torch.autograd.grad(loss(logits, target), logits)
        (logits.detach().argmax(1) == target).sum()

    return theirs if loss is TORCH else ours


def of_module(loss: Loss, *shape: int, has_gradient: bool = True) -> Step:
    """The module, and a leaf that its gradient is added up in."""
    module = nn.CrossEntropyLoss() if loss is TORCH else fusedloss.CrossEntropyLoss()
    logits, target = example(*shape)
    logits.requires_grad_(has_gradient)
    return lambda: module(logits, target).backward() if has_gradient else module(logits, target)


def patched(loss: Loss, *shape: int) -> Step:
    """What F.cross_entropy is after patch_torch(), with a gradient."""
    if loss is not TORCH:
        fusedloss.patch_torch()
        loss = F.cross_entropy
    return call(loss, *example(*shape))


OTHERS: dict[str, Make] = {
    "float64 probabilities, 256 x 1000 float32": lambda loss: call(
        loss, example(256, 1000)[0], probabilities(torch.randn(256, 1000).double())
    ),
    "float64 probabilities, 4096 x 1000 float64": lambda loss: call(
        loss, torch.randn(4096, 1000).double(), probabilities(torch.randn(4096, 1000).double())
    ),
    "probabilities that need a gradient, 128 x 10": gradient_of_probabilities,
    "vmap(grad), 32 x 10": per_example_gradients,
    "double backward, 64 x 1000": double_backward,
    "another N at every call, N x 10": lambda loss: batch_sizes(loss, range(100, 132), 10),
    "another N at every call, 200 to 2000 x 100": lambda loss: batch_sizes(loss, range(200, 2000, 60), 100),
    "eight shapes in turn, 128 x 10 to 17": eight_shapes,
    "eight shapes in turn, 128 x 10 to 17, no_grad": lambda loss: eight_shapes(loss, has_gradient=False),
    "next tokens, 4 x 64 x 100": next_tokens,
    "an eighth of the loss, 128 x 10": accumulated,
    "losses times weights, 128 x 10": weighted_by_hand,
    "statistics, 128 x 10": statistics_of,
    "module, (10,)": lambda loss: of_module(loss, 10),
    "module, (10,), no_grad": lambda loss: of_module(loss, 10, has_gradient=False),
    "module, 128 x 10": lambda loss: of_module(loss, 128, 10),
    "uint8, 128 x 10": lambda loss: call(loss, torch.randn(128, 10), torch.randint(10, (128,), dtype=torch.uint8)),
    "weight and smoothing, 128 x 10": lambda loss: call(loss, *example(128, 10), weight=torch.rand(10), label_smoothing=0.1),
    "weight in bfloat16, 128 x 10": lambda loss: call(
        loss, *example(128, 10, dtype=torch.bfloat16), weight=torch.rand(10).bfloat16()
    ),
    "float16, 128 x 1000": lambda loss: call(loss, *example(128, 1000, dtype=torch.float16)),
    # The last, since F.cross_entropy stays replaced.
    "patched, (10,)": lambda loss: patched(loss, 10),
    "patched, 128 x 10": lambda loss: patched(loss, 128, 10),
}


def on_layout(layout: str, dtype: torch.dtype, target: Callable[[Tensor], Tensor], has_gradient: bool, **options: Any) -> Make:
    def make(loss: Loss) -> Step:
        logits = LAYOUTS[layout](dtype)
        return call(loss, logits, target(logits), has_gradient, **options)

    return make


def cases() -> Iterator[tuple[str, Make]]:
    for layout, dtype, reduction, has_gradient in product(LAYOUTS, DTYPES, REDUCTIONS, (True, False)):
        for targets, target in (("", class_indices), (", probabilities", probabilities)):
            name = f"{layout} {str(dtype).removeprefix('torch.')}, {reduction}{targets}" + ("" if has_gradient else ", no_grad")
            yield name, on_layout(layout, dtype, target, has_gradient, reduction=reduction)
    yield from OTHERS.items()


def ratio(make: Make, seconds: float) -> tuple[float, float]:
    """Ours / eager, and eager's time in seconds."""
    eager, ours = make(TORCH), make(fusedloss.cross_entropy)
    for _ in range(3):
        start = time.perf_counter()
        eager(), ours()
        once = time.perf_counter() - start
    batch = max(1, int(0.0005 / once))
    pairs = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((_time(eager, batch), _time(ours, batch)))
    return statistics.median(mine / its for its, mine in pairs), statistics.median(its for its, _ in pairs)


def _time(step: Step, n: int) -> float:
    start = time.thread_time()
    for _ in range(n):
        step()
    return (time.thread_time() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time per call")
    parser.add_argument("--only", default="", help="calls whose name this regular expression finds")
    parser.add_argument("--all", action="store_true", help="print all of them, not the worst ten")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = [(name, make) for name, make in cases() if re.search(arguments.only, name)]
    found = [(*ratio(make, arguments.seconds), name) for name, make in chosen]
    found.sort(reverse=True)
    slow = sum(times > BAR for times, _, _ in found)
    isa = f"{torch.backends.cpu.get_cpu_capability()} for PyTorch, {cpu.ISA} for us"
    print(f"{slow} of {len(found)} calls take more than {BAR} times as long as PyTorch's, 1 thread, {isa}\n")
    print("| call | ours / eager | eager |\n|---|---|---|")
    for times, eager, name in found if arguments.all else found[:10]:
        print(f"| {name} | {times:.2f} | {eager * 1e6:.0f} us |")


if __name__ == "__main__":
    main()
