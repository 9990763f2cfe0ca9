"""The bytes that DRAM really moved in five launches, read by ncu: is every logit read once and its gradient written once?

gpu.py runs this file under ncu and reads what ncu prints. A launch is the forward of training, which writes the gradient; each of
the five tensors is so large that what the L2 still holds at the end is little of it.
"""

import argparse
import csv
from collections import defaultdict
from typing import Any

import torch
from gpu_run import emit

import fusedloss

CASES = {
    "ImageNet": (262144, 1000),
    "Llama 2": (8192, 32000),
    "GPT-2": (8192, 50257),
    "Llama 3": (4096, 128256),
    "segmentation": (32, 19, 512, 1024),
}
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
OPTIONS = (
    "--profile-from-start=off",  # cases that compile
    "--clock-control=none",
    f"--metrics={READ},{WRITTEN}",
    "--nvtx",
    "--print-nvtx-rename=kernel",  # a kernel gets the name of its case
    "--csv",
    "--print-units=base",
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for case, shape in CASES.items():
        logits = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
        for _ in range(3):  # compiles; the third call is a known one
            fusedloss.cross_entropy(logits, target)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(case)
        fusedloss.cross_entropy(logits, target)
        torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        emit({"case": case, "shape": list(shape), "floor": 2 * logits.nbytes + target.nbytes})


def counted(printed: str) -> dict[str, dict[str, float]]:
    """What ncu printed: case -> metric -> bytes, of all its launches together."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: defaultdict[str, dict[str, float]] = defaultdict(lambda: {READ: 0.0, WRITTEN: 0.0, "launches": 0})
    for row in csv.DictReader(lines[start:]):
        metric = row.get("Metric Name")
        if metric in (READ, WRITTEN):
            case = found[row["Kernel Name"]]
            case[metric] += float(row["Metric Value"].replace(",", ""))
            case["launches"] += metric == READ
    return dict(found)


def with_counts(records: list[dict[str, Any]], printed: str) -> list[dict[str, Any]]:
    """The records of the cases that ncu has counted, with its counts."""
    found = counted(printed)
    return [
        {**record, "read": found[name][READ], "written": found[name][WRITTEN], "launches": found[name]["launches"]}
        for record in records
        if (name := record["case"]) in found
    ]


if __name__ == "__main__":
    main()
