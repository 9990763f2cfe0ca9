"""What the kernels are made of, for GPUs that are not here: writes KERNELS.md, its plots, and the numbers they are drawn from.

    make report                                         # to runs/
    make report ARGS=--update                           # to the tracked files beside this one: needs the emulator
    python benchmarks/kernel_report.py --update --only-write   # the pages anew from results/kernels.json, nothing compiled

Every launch of every case is cross-compiled by Triton for each target and read back from the machine code; nothing is timed.
PyTorch's figures are counted from the operators that F.cross_entropy and its backward dispatch. Liger's kernel is compiled the
same way where it can be imported (PYTHONPATH=folder of `pip install --target folder --no-deps liger-kernel`).
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import emulated
import peers
import pytest
import torch
import torch.nn.functional as F
import triton
from compiled import FACTS, TARGETS, Launch, Report, compile_for, launches, recorded_launches, report
from files import write_atomically
from kernel_pages import write
from torch import Tensor
from torch_ops import count

import fusedloss

FOLDER = Path(__file__).parent
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any]
    probabilities: bool = False  # the target, else class indices

    def __str__(self) -> str:
        options = ", probabilities" if self.probabilities else ""
        options += "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{' x '.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}{options}"


# Each shape says why it is here. Rows are few where the classes are many: what is compiled depends on their number in nothing
# but its divisibility.
SHAPES = (
    (128, 10),  # one CIFAR-10 batch: a single program
    (4096, 10),
    (4096, 100),  # 16-byte rows that share a tile
    (2048, 1000),  # ImageNet: a multiple of 8, not of 16
    (4096, 4096),
    (4096, 32000),  # Llama 2
    (4096, 50257),  # GPT-2: no row but the first is aligned
    (4096, 50264),  # GPT-2, padded to a multiple of 8
    (4096, 128256),  # Llama 3
    (4096, 151936),  # Qwen
    (1, 128256),  # one row for a whole GPU
    (8, 256000),
    (8, 19, 512, 1024),  # Cityscapes
    (2, 150, 512, 512),  # ADE20K
)
CASES = (
    *(Case(shape, dtype, {}) for dtype in (BF16, FP32) for shape in SHAPES),
    # other dtypes and options, at the shapes where they cost registers
    Case((4096, 50257), FP16, {}),
    Case((4096, 50257), FP64, {}),
    *(Case((4096, 50257), BF16, options) for options in ({"label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "max"})),
    Case((4096, 10), FP32, {"label_smoothing": 0.1}),
    *(Case(shape, BF16, {}, probabilities=True) for shape in ((4096, 10), (2048, 1000), (4096, 50257), (8, 19, 512, 1024))),
)


class Device(NamedTuple):
    """Published figures of the device that stands for a target."""

    name: str
    bandwidth: float  # bytes per second
    cache_bytes: int  # the last cache before the memory
    threads: int  # of one SM
    registers: int  # of 32 bits, of one SM
    shared_bytes: int  # of one SM
    programs: int  # that an SM takes, however small


DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 2.039e12, 40 << 20, 2048, 65536, 164 << 10, 32),
    "sm_90": Device("H100 SXM", 3.35e12, 50 << 20, 2048, 65536, 228 << 10, 32),
    "sm_100": Device("B200", 8.0e12, 126 << 20, 2048, 65536, 228 << 10, 32),
    "gfx942": Device("MI300X", 5.3e12, 256 << 20, 2048, 131072, 64 << 10, 32),
}
ARCHITECTURES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}  # what Liger asks of them


def tensors(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits that nobody writes, so that gigabytes of them cost no memory; targets."""
    logits = torch.empty(case.shape, dtype=case.dtype, device=device, requires_grad=True)
    if case.probabilities:
        return logits, torch.empty_like(logits, requires_grad=False)
    return logits, torch.zeros(case.shape[:1] + case.shape[2:], dtype=torch.int64, device=device)


def our_side(case: Case, target: str) -> tuple[list[Launch], dict[str, Any]]:
    """Our launches, and what the plan says of them."""
    logits, classes = tensors(case)
    with pytest.MonkeyPatch.context() as patch:
        ours = launches(patch, target, lambda: fusedloss.cross_entropy(logits, classes, **case.options))
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, classes, device=FACTS[target], **case.options)
    one_pass = logits.numel() * logits.element_size()
    cuts = [cut for cut in (plan.forward, plan.backward) if cut is not None]
    summary = {
        "strategy": plan.strategy,
        "reads": plan.read_bytes / one_pass,
        "writes": plan.write_bytes / one_pass,
        "tiles": {cut.kernel: [cut.shape.rows, cut.shape.cols] for cut in cuts},
    }
    return ours, summary


def liger_side(case: Case, target: str) -> list[Launch]:
    """Liger's launches: none for what it does not serve."""
    if "Liger" not in peers.installed() or len(case.shape) > 2 or case.options or case.probabilities or case.dtype == FP64:
        return []
    module = "liger_kernel.ops.cross_entropy"
    with (
        mock.patch(f"{module}.is_hip", return_value=target == "gfx942"),
        mock.patch(f"{module}.infer_device_arch", return_value=ARCHITECTURES[target]),
        recorded_launches() as recorded,
    ):
        peers.liger(*tensors(case)).backward()
    return recorded


def compiled_launches(recorded: list[Launch], target: str) -> list[dict[str, Any]]:
    found = [{"kernel": launch.kernel, "n_programs": launch.n_programs, **_compiled(launch, target)} for launch in recorded]
    return [{**launch, "per_sm": programs_per_sm(launch, target)} for launch in found]


_reports: dict[str, Report] = {}


def _compiled(launch: Launch, target: str) -> dict[str, Any]:
    kernel = compile_for(launch, target)
    if kernel.hash not in _reports:
        _reports[kernel.hash] = report(kernel, target)
    return {"num_warps": launch.arguments["num_warps"], **dataclasses.asdict(_reports[kernel.hash])}


def programs_per_sm(launch: dict[str, Any], target: str) -> int:
    """Programs that an SM has room for: threads, registers, which a thread takes in eights, and shared memory, of which a program
    on NVIDIA's takes another 1024 bytes."""
    device, facts = DEVICES[target], FACTS[target]
    threads = launch["num_warps"] * facts.warp_size
    registers = threads * max(8, -(-launch["registers"] // 8) * 8)
    shared_bytes = launch["shared_bytes"] + (1024 if facts.is_nvidia else 0)
    of_shared = device.shared_bytes // shared_bytes if shared_bytes else device.programs
    return max(1, min(device.programs, device.threads // threads, device.registers // registers, of_shared))


def cached_bytes(launch: dict[str, Any], row_bytes: int, target: str) -> int:
    """Bytes of the logits under the programs that run at the same time: a second read of theirs meets the cache or does not."""
    return min(launch["n_programs"], launch["per_sm"] * FACTS[target].n_sms) * row_bytes


def memory_passes(reads: float, writes: float, launch: dict[str, Any], row_bytes: int, target: str, one_read: int = 1) -> float:
    """Passes over the memory: a kernel's second read is free where the rows in flight fit the cache. `one_read`: of everything
    that a kernel must read once, class probabilities among it."""
    second_read_hits = reads > one_read and cached_bytes(launch, one_read * row_bytes, target) <= DEVICES[target].cache_bytes
    return (one_read if second_read_hits else reads) + writes


def call_record(case: Case) -> dict[str, Any]:
    """What does not depend on the target: PyTorch's operators."""
    logits, classes = tensors(case, "meta")
    options = {**case.options}
    if options.get("reduction") == "max":  # not PyTorch's: the losses, and their maximum
        eager = count(lambda: F.cross_entropy(logits, classes, reduction="none").max(), logits.numel())
    elif options.get("reduction") == "none":
        eager = count(lambda: F.cross_entropy(logits, classes, **options).sum(), logits.numel())
    else:
        eager = count(lambda: F.cross_entropy(logits, classes, **options), logits.numel())
    one_pass = logits.numel() * logits.element_size()
    return {
        "case": str(case),
        "n_logits": logits.numel(),
        "itemsize": logits.element_size(),
        "eager": {
            "reads": eager.read_bytes / one_pass,
            "writes": eager.write_bytes / one_pass,
            "launches": eager.launches,
            "syncs": eager.syncs,
        },
    }


def target_record(case: Case, target: str) -> dict[str, Any]:
    """One case compiled for one target, ours and Liger's, and the time that the bytes need there."""
    ours, summary = our_side(case, target)
    liger = liger_side(case, target)
    record: dict[str, Any] = {**summary, "launches": compiled_launches(ours, target), "liger": compiled_launches(liger, target)}
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    n_cols = case.shape[1]
    main = next(launch for launch in record["launches"] if launch["kernel"] in summary["tiles"])
    block_rows = summary["tiles"][main["kernel"]][0]
    one_read = 2 if case.probabilities else 1
    if summary["strategy"] == "fused":
        passes = memory_passes(summary["reads"], summary["writes"], main, block_rows * n_cols * itemsize, target, one_read)
    else:  # the second read is another launch's
        passes = summary["reads"] + summary["writes"]
    record["memory_passes"], record["floor_passes"] = passes, one_read + 1
    if liger:
        record["liger_memory_passes"] = memory_passes(2, 1, record["liger"][0], n_cols * itemsize, target)
    return record


def marks(names: list[str]) -> dict[str, dict[str, Any]] | None:
    """Issue 6's marks; None without the emulator."""
    if emulated.emulator() is None:
        return None
    losses: dict[str, Any] = {"ours": fusedloss.cross_entropy}
    if "Liger" in peers.installed():
        losses["Liger"] = peers.liger
    return {
        name: {who: dataclasses.asdict(emulated.measure(loss, *emulated.MARKS[name])) for who, loss in losses.items()}
        for name in names
    }


def collect(cases: tuple[Case, ...], targets: list[str], mark_names: list[str]) -> dict[str, Any]:
    """Everything the pages are written from."""
    records = []
    for case in cases:
        print(case, file=sys.stderr, flush=True)
        records.append({**call_record(case), "targets": {target: target_record(case, target) for target in targets}})
    return {
        "versions": {"torch": _version(torch.__version__), "triton": _version(triton.__version__), "Liger": _liger_version()},
        "devices": {target: DEVICES[target]._asdict() for target in targets},
        "marks": marks(mark_names),
        "cases": records,
    }


def as_json(data: dict[str, Any]) -> str:
    """One line per case and target: a diff shows what changed."""
    cases = ",\n".join(
        json.dumps({**case, "targets": None})[:-1].replace('"targets": null', '"targets": {\n')
        + ",\n".join(f'"{target}": {json.dumps(record)}' for target, record in case["targets"].items())
        + "}}"
        for case in data["cases"]
    )
    head = json.dumps({**data, "cases": None})
    return head.replace('"cases": null', f'"cases": [\n{cases}\n]') + "\n"


def _version(text: str) -> str:
    return re.match(r"[\d.]+", text).group()


def _liger_version() -> str | None:
    if "Liger" not in peers.installed():
        return None
    from importlib.metadata import version

    return version("liger-kernel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("runs"), help="folder of KERNELS.md and results/")
    where.add_argument("--update", action="store_const", dest="out", const=FOLDER, help="write those beside this file")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only-write", action="store_true", help="compile and count nothing")
    arguments = parser.parse_args()
    numbers = arguments.out / "results" / "kernels.json"
    if not arguments.only_write:
        if arguments.out == FOLDER and emulated.emulator() is None:
            print("--update would lose the columns that the emulator counts, and there is none: nothing was written")
            sys.exit(2)
        write_atomically(numbers, as_json(collect(CASES, arguments.targets, list(emulated.MARKS))))
    print(write(json.loads(numbers.read_text()), arguments.out))


if __name__ == "__main__":
    main()
