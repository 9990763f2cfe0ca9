"""Runs a command for gpu.py: no longer than it may, in a process group of its own, with its records as they come."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that nothing was installed from, whose fusedloss is imported after this file
RECORDS = "FUSEDLOSS_RECORDS"  # the file that a command appends its records to
SECONDS_TO_END = 5  # after an interrupt, in which pytest still says what it did
POLL_SECONDS = 0.2

Record = dict[str, Any]


class Finished(NamedTuple):
    status: int | None  # None: it was stopped
    output: str  # what it printed, its errors among it
    seconds: float
    records: list[Record]
    hung: bool  # it was stopped because it had been silent for too long


def emit(record: Record) -> None:
    """Hands a record to the process that started this one; shows it where nobody did."""
    line = json.dumps(record)
    if RECORDS not in os.environ:
        print(line, flush=True)
        return
    with open(os.environ[RECORDS], "a") as file:
        file.write(line + "\n")


def run(
    command: list[str],
    seconds: float,
    silence: float | None = None,
    on_records: Callable[[list[Record]], None] = lambda _: None,
    **environment: str,
) -> Finished:
    """Args:
    seconds: the command is interrupted after so many, and killed SECONDS_TO_END later with all that it started: what a
        sanitizer or a test has started would keep the GPU.
    silence: it is killed where so many seconds pass without a new record.
    on_records: called with all records whenever there are more.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, printed = Path(folder) / "records", Path(folder) / "output"
        path.touch()
        folders = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # the command's own, as ours
        variables = {**os.environ, "PYTHONPATH": folders, "PYTHONUNBUFFERED": "1", RECORDS: str(path), **environment}
        start = heard = time.monotonic()
        records: list[Record] = []
        stopped = hung = False
        with printed.open("w") as output:
            child = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while child.poll() is None and not stopped:
                    time.sleep(POLL_SECONDS)
                    now = time.monotonic()
                    found = read_records(path)
                    if len(found) > len(records):
                        records, heard = found, now
                        on_records(records)
                    hung = silence is not None and now - heard > silence
                    stopped = hung or now - start > seconds
                if stopped and child.poll() is None:
                    interrupt(child)
            finally:
                kill_group(child)
        text = printed.read_text(errors="replace")
        records = read_records(path)
        return Finished(None if stopped else child.returncode, text, time.monotonic() - start, records, hung)


def interrupt(child: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C does; what does not end by itself is for `kill_group`."""
    os.killpg(child.pid, signal.SIGINT)
    try:
        child.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        print(f"{child.args!r}: did not end when it was interrupted", file=sys.stderr)


def kill_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends the command and whatever it left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_records(path: Path) -> list[Record]:
    """All whole lines."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
