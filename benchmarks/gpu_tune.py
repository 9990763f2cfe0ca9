"""Device time of the fused launch under other constants of the plan, per shape: what the constants of the plan follow from.

    python benchmarks/gpu.py --only tune
    python benchmarks/gpu_tune.py '{"FUSED_ROW_THREADS": 256}'     # one setting

Each setting is a process of its own, in which nothing is remembered of another plan. The first is the plan as it is, and so is
the last: what the two differ by is noise. "packed rows" is no constant: gathered_tile.py says what it tries. A name that begins
with FUSEDLOSS_ is an environment variable.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import bench_gpu
import torch
from gpu_run import emit

import fusedloss
from fusedloss import cut_rows as constants
from fusedloss import cut_tiles, kernels

SHAPES = {
    "100 classes": (65536, 100),
    "101 classes": (65536, 101),
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
    {"FUSED_ROW_THREADS": 512},
    {"SLICE_THREADS": 256},
    {"FUSED_ROW_THREADS": 128, "SLICE_THREADS": 64},
    {"packed rows": "gathered"},
    {"FUSEDLOSS_NO_WAIT": "1"},
    {"as it is": "again"},
]
ROUNDS = 20


def gather_packed_rows() -> None:
    """Loads kernels/tile.py anew, with the functions of gathered_tile.py, and the fused kernels with it; Triton remembers what it
    has compiled of a function."""
    import gathered_tile

    cut_tiles.PART_REGISTERS = constants.MAX_REGISTERS  # fewer would spill
    for name in ("tile", "fused"):
        spec = importlib.util.find_spec(f"fusedloss.kernels.{name}")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(kernels, name, module)
        if name == "tile":
            for function in ("_load_lines", "_store_lines"):
                assert hasattr(module, function), f"kernels/tile.py has no {function}"
                setattr(module, function, getattr(gathered_tile, function))


def apply(setting: dict[str, Any]) -> None:
    """For the rest of the process."""
    for name, value in setting.items():
        if name == "packed rows":
            gather_packed_rows()
        elif name.startswith("FUSEDLOSS_"):
            assert os.environ.get(name) == value, f"{name} is read at import: it must be set before"
        elif name != "as it is":
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", type=json.loads, metavar="SETTING", help="JSON; default: all, one after another")
    setting = parser.parse_args(arguments).setting
    if setting is not None:
        apply(setting)
        measure(setting)
        return 0
    failed = []
    for setting in SETTINGS:
        environment = {name: value for name, value in setting.items() if name.startswith("FUSEDLOSS_")}
        if subprocess.run([sys.executable, __file__, json.dumps(setting)], env={**os.environ, **environment}).returncode:
            failed.append(setting)
    print("\n".join(f"{setting}: failed" for setting in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
