"""Runs pytest in several processes, each of every N-th test: a new GPU waits for compilers, and needs no pytest-xdist for this.

    python benchmarks/gpu_shards.py 8 -m gpu tests

Prints the lines of all, each whole. Ctrl-C reaches all, and what they print at their end is still printed.
"""

import argparse
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

NOTHING_TO_RUN = 5  # pytest's exit status


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, metavar="N", help="processes")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="for pytest")
    given = parser.parse_args(arguments)
    n, command = given.n, [sys.executable, "-m", "pytest", *given.options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shards = [subprocess.Popen([*command, f"--shard={i}/{n}"], **pipes, text=True, errors="replace") for i in range(n)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the shards, which have been started with the usual handler, end this process
    lock = Lock()

    def pass_on(shard: "subprocess.Popen[str]") -> int:
        assert shard.stdout is not None
        for line in shard.stdout:
            with lock:
                print(line, end="", flush=True)
        return shard.wait()

    with ThreadPoolExecutor(n) as pool:
        statuses = set(pool.map(pass_on, shards))
    some = statuses - {NOTHING_TO_RUN}  # a shard of no test at all is no fault of the others
    return max(some, key=abs) if some else NOTHING_TO_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
