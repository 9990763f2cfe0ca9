"""All that a GPU can show, in 9 minutes, without network or pip: one command, one page with a verdict, RESULTS.md.

    make gpu
    python benchmarks/gpu.py --out FOLDER --minutes 9
    python benchmarks/gpu.py --only benchmarks
    python benchmarks/gpu.py --only tune              # the plan's constants; not part of a usual run

The stages run in the order of --help, what matters most first. Each has a share of the time that is left, and what it does not
use is for those that follow; one that is stopped at its end says what it did until then. RESULTS.md is written anew after every
stage, and with every number of the benchmarks, so that it can be read while the run goes on and nothing is lost by a kill. The
numbers are in results/gpu.json, a plot in results/gpu.png, what the stages printed in log/. Without a GPU: one line, and exit
status 2.
"""

import argparse
import datetime
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_pages
import torch
from files import write_atomically
from gpu_stages import ON_REQUEST, STAGES, Stage

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "triton", "numpy", "pytest", "liger-kernel", "flash-attn", "quack-kernels")


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "sms": properties.multi_processor_count,
        "driver, clocks, power limit": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def share(stages: dict[str, Stage], name: str, chosen: list[str], seconds_left: float) -> float:
    """Seconds of a stage: what is left, divided among it and those that follow as their usual times are."""
    following = chosen[chosen.index(name) :]
    return max(1.0, seconds_left * stages[name].seconds / sum(stages[other].seconds for other in following))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in STAGES if name not in ON_REQUEST]
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: beside this file)")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="of all stages together (default: 9)")
    help_text = f"some of {', '.join(usual)} (together the default), {', '.join(ON_REQUEST)}"
    parser.add_argument("--only", choices=list(STAGES), nargs="+", default=usual, metavar="STAGE", help=help_text)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda sees none, nothing was run and RESULTS.md was left as it is")
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the stage's processes end with this one
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [name for name in STAGES if name in arguments.only]
    data: dict[str, Any] = {"machine": machine(), "stages": {}}
    for name in chosen:
        seconds = share(STAGES, name, chosen, end - time.monotonic())
        print(f"{name}: at most {seconds:.0f} s", flush=True)

        def progress(records: list[dict[str, Any]], name: str = name) -> None:
            data["stages"][name] = {"verdict": "running", "outcome": "still running", "seconds": 0.0, "records": records}
            gpu_pages.write(data, arguments.out)

        progress([])
        result = STAGES[name].run(seconds, progress)
        write_atomically(arguments.out / "log" / f"{name}.txt", result.pop("output"))
        data["stages"][name] = result
        gpu_pages.write(data, arguments.out, draws=True)
        print(f"{name}: {result['verdict']}: {result['outcome']} ({result['seconds']:.0f} s)", flush=True)
    print(f"written: {arguments.out / 'RESULTS.md'}")
    sys.exit(1 if any(found["verdict"] == "failed" for found in data["stages"].values()) else 0)


if __name__ == "__main__":
    main()
