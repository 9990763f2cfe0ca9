"""Device time of the fused launch under other constants of the plan, per shape: what the constants of the plan follow from.

    python benchmarks/gpu.py --only tune
    python benchmarks/gpu_tune.py '{"FUSED_ROW_THREADS": 256}'     # one setting

Each setting is a process of its own, in which nothing is remembered of another plan. The first is the plan as it is. "ticket"
is no constant: fused_row_kernel draws its ticket of the batch reduction after the gradient's stores, for which the ticket's fence
then waits; here its source is changed to draw it before them.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import bench_gpu
import torch
from gpu_run import emit

import fusedloss
from fusedloss import cut_rows as constants

SHAPES = {
    "ImageNet": (4096, 1000),
    "8192 classes": (8192, 8192),
    "Llama 2": (8192, 32000),
    "GPT-2": (8192, 50257),
    "Llama 3": (8192, 128256),
    "few long rows": (64, 128256),
}
# A row that takes more than FUSED_ROW_THREADS threads to hold in registers is cut into slices of SLICE_THREADS threads.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"FUSED_ROW_THREADS": 128},
    {"FUSED_ROW_THREADS": 256},
    {"FUSED_ROW_THREADS": 512},
    {"FUSED_ROW_THREADS": 256, "SLICE_THREADS": 256},
    {"FUSED_ROW_THREADS": 128, "SLICE_THREADS": 64},
    {"ticket": "before the stores"},
    {"FUSED_ROW_THREADS": 128, "ticket": "before the stores"},
]
# Where the gradient's stores begin: of a row that counts, of one that does not.
STORES = (
    "        store_edges(dlogits,",
    "        for i in tl.static_range(N_BLOCKS):\n            tl.store(dlogits.own + i * COLS + lane, tl.zeros(",
)
ROUNDS = 20


def draws_before_the_stores(source: str) -> str:
    """kernels/fused.py with fused_row_kernel's last part, which draws the ticket, in front of the stores."""
    start = source.index("def fused_row_kernel(")
    kernel = source[start : source.index("\n\n\n", start)]
    before, drawing, reduction = kernel.partition("    if part == 0:\n")
    assert drawing, "the ticket is no longer drawn at the end of the kernel"
    for stores in STORES:
        assert before.count(stores) == 1, f"the gradient's stores no longer begin with {stores!r}"
        before = before.replace(stores, f"{textwrap.indent(drawing + reduction, '    ')}\n{stores}")
    return source.replace(kernel, before.rstrip())


def use(source: str, folder: Path) -> None:
    """Puts this in the place of kernels/fused.py, of which nothing may have been launched yet."""
    from fusedloss import kernels

    path = folder / "fused.py"  # Triton reads a kernel's source from its file
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("fusedloss.kernels.fused", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kernels.fused = module
    spec.loader.exec_module(module)


def apply(setting: dict[str, Any], folder: Path) -> None:
    """For the rest of the process."""
    for name, value in setting.items():
        if name == "ticket":
            use(draws_before_the_stores((Path(fusedloss.kernels.__path__[0]) / "fused.py").read_text()), folder)
        else:
            assert hasattr(constants, name), f"the plan has no {name}"
            setattr(constants, name, value)


def measure(setting: dict[str, Any], device: str = "cuda") -> None:
    """Emits the median device time of every shape."""
    clock = bench_gpu.TIMER.clock
    for name, shape in SHAPES.items():
        logits = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
        target = torch.randint(shape[1], shape[:1], device=device)
        times = []
        for _ in range(3 + ROUNDS):
            clock.flush()
            times.append(clock.run(lambda: fusedloss.cross_entropy(logits, target)))  # noqa: B023
        forward = fusedloss.plan(logits, target).forward
        cut = f"{forward.n_programs // shape[0]} x {forward.num_warps} warps" if forward is not None else "no kernel"
        record = {"shape": f"{name}, {' x '.join(map(str, shape))}", "setting": setting, "launch": cut}
        emit({**record, "device_us": 1e6 * statistics.median(times[3:])})


def main(arguments: list[str]) -> int:
    if arguments:
        setting = json.loads(arguments[0])
        with tempfile.TemporaryDirectory() as folder:
            apply(setting, Path(folder))
            measure(setting)
        return 0
    failed = [setting for setting in SETTINGS if subprocess.run([sys.executable, __file__, json.dumps(setting)]).returncode]
    print("\n".join(f"{setting}: failed" for setting in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
