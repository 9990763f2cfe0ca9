"""`make test`: the suite in four processes, two at a time; their output as it comes, and one summary of all at the end.

    python tests/parts.py                              # all, each with the options of pytest that follow
    python tests/parts.py --part native -k accuracy -x

TRITON_INTERPRET must be set before triton is imported, and an interpreted process cannot compile: so the parts are processes.
Each keeps one core busy, and the next takes the core that is free first: parts of a like length end together. The last line is
"N passed, N failed, N skipped" of all parts together: an error counts as a failure, and so does a part that ended in another way
than by its tests.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_EMULATED = ("ptxsim*", "report", "bench_gpu", "gpu_run", "gpu_stages", "gpu_linear", "host_overhead")
# Tests that compile, or start programs.
_PROGRAMS = ("compiled", "launches", "packaging", "commands", "train_*")
EMULATED, PROGRAMS = (
    tuple(f"tests/{path.name}" for name in names for path in sorted((ROOT / "tests").glob(f"test_{name}.py")))
    for names in (_EMULATED, _PROGRAMS)
)
NOTHING_TO_RUN = 5  # pytest's exit status


class Part(NamedTuple):
    name: str
    arguments: tuple[str, ...]  # of pytest
    interpreted: bool = False


PARTS = (
    Part("interpreted", ("-m", "interpreter"), interpreted=True),
    Part("programs", PROGRAMS),
    Part("native", ("-m", "not interpreter", *(f"--ignore={path}" for path in (*PROGRAMS, *EMULATED)))),
    Part("emulated", EMULATED),
)


class Outcome(NamedTuple):
    part: Part
    counts: Counter[str]  # passed, failed, skipped, deselected, ...
    failures: list[str]  # pytest's lines on them
    seconds: float


def run(part: Part, options: list[str]) -> Outcome:
    """Runs one part; its lines are printed behind its name."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if part.interpreted else "0"}
    command = [sys.executable, "-m", "pytest", *part.arguments, *options]
    counts: Counter[str] = Counter()
    failures = []
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{part.name:11s} | {line}", end="" if line.endswith("\n") else "\n", flush=True)
            if line.startswith(("FAILED ", "ERROR ")):
                failures.append(line.rstrip())
            if summary := re.match(r"=*\s*(\d+ \w+(?:, \d+ \w+)*) in \d", line):
                counts = Counter({word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary[1])})
    counts["failed"] += counts.pop("error", 0) + counts.pop("errors", 0)
    if process.returncode not in (0, NOTHING_TO_RUN) and counts["failed"] == 0:
        counts["failed"] = 1
        failures.append(f"FAILED {part.name}: it ended with status {process.returncode}")
    return Outcome(part, counts, failures, time.monotonic() - start)


def summary(outcomes: list[Outcome]) -> str:
    """The failures again, a line for each part, and the closing line."""
    lines = [f"{outcome.part.name:11s} | {failure}" for outcome in outcomes for failure in outcome.failures]
    words = ("passed", "failed", "skipped", "deselected")
    lines.append("part        " + "".join(f"{word:>11s}" for word in words) + "    seconds")
    for part, counts, _, seconds in outcomes:
        lines.append(f"{part.name:12s}" + "".join(f"{counts[word]:>11,}" for word in words) + f"{seconds:>11.0f}")
    passed, failed, skipped = (sum(outcome.counts[word] for outcome in outcomes) for word in words[:3])
    return "\n".join([*lines, f"{passed} passed, {failed} failed, {skipped} skipped"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only this one; may be repeated")
    chosen, options = parser.parse_known_args(arguments)
    parts = [part for part in PARTS if not chosen.part or part.name in chosen.part]
    with ThreadPoolExecutor(max_workers=2) as pool:
        outcomes = list(pool.map(lambda part: run(part, options), parts))
    print(summary(outcomes))
    if any(outcome.counts["failed"] for outcome in outcomes):
        return 1
    return 0 if any(outcome.counts["passed"] for outcome in outcomes) else NOTHING_TO_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
