"""Every kernel once on a small problem, loss and gradient against float64: the first thing to know on a new GPU.

    python benchmarks/gpu_smoke.py                     # all cases
    python benchmarks/gpu_smoke.py "pixels" "slices"   # some, as compute-sanitizer gets them

Prints, or hands to gpu.py, a record before and one after each case: a kernel that never ends is the case without a second one.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_run import emit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from compare import check_against_torch
from problems import make_logits, make_probabilities, make_target, make_weight

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Shape, dtype and options. Each is here for a kernel, or for the way its programs meet.
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "few classes": ((128, 10), FP32, {}),
    "many programs": ((4099, 10), FP32, {"label_smoothing": 0.1}),
    "rows": ((300, 1000), BF16, {}),
    "ragged rows": ((300, 1001), BF16, {"reduction": "sum"}),
    "long rows": ((300, 32000), BF16, {}),
    "slices": ((150, 128256), BF16, {}),
    "pixels": ((2, 19, 64, 64), BF16, {}),
    "weights": ((300, 1001), FP32, {"weight": True}),
    "upstream gradient of 1/8": ((300, 1001), BF16, {"dloss": 0.125}),
    "none, few classes": ((300, 10), FP32, {"reduction": "none"}),
    "none, rows": ((300, 1001), FP16, {"reduction": "none"}),
    "max": ((4099, 10), FP32, {"reduction": "max"}),
    "topk among many rows": ((20000, 10), FP32, {"reduction": "topk", "top_k": 0.3}),
    "topk of rows": ((300, 1001), FP32, {"reduction": "topk", "top_k": 0.5}),
    "probabilities": ((300, 100), FP32, {"probabilities": True}),
    "softcap and z_loss": ((300, 1000), FP32, {"softcap": 30.0, "z_loss": 1e-4}),
}
SANITIZED = (
    "few classes",
    "many programs",
    "ragged rows",
    "slices",
    "pixels",
    "none, rows",
    "topk among many rows",
    "probabilities",
)


def problem(case: str, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """Logits, target, weight and options; dloss, the upstream gradient, may be among these."""
    shape, dtype, given = CASES[case]
    options = dict(given)
    with torch.device(device):
        logits = make_logits(*shape, dtype=dtype)
        if options.pop("probabilities", False):
            target = make_probabilities(*shape, dtype=dtype)
        else:
            target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
        weight = make_weight(shape[1], dtype) if options.pop("weight", False) else None
    return logits, target, weight, options


def check(case: str, device: str) -> None:
    """Raises an AssertionError that names the worst element."""
    logits, target, weight, options = problem(case, device)
    check_against_torch(logits, target, weight, roundings=4 if logits.dtype == FP32 else 1, **options)


def main(arguments: list[str], device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(map(repr, CASES))} (default: all)")
    wrong = 0
    for case in parser.parse_args(arguments).cases or CASES:
        emit({"case": case, "outcome": "started"})
        start = time.perf_counter()
        try:
            check(case, device)
            outcome = "right"
        except Exception as error:
            wrong += 1
            outcome = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        emit({"case": case, "outcome": outcome, "seconds": time.perf_counter() - start})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
