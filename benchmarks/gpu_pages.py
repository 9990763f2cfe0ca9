"""RESULTS.md, results/gpu.json and a plot from what gpu.py measured: our losses are computed like everything else."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OURS = "fusedloss"
PHASES = ("both", "forward", "backward")
TITLES = {"both": "Forward + backward", "forward": "Forward", "backward": "Backward"}
NOISE = 1.02  # a peer is ahead when it needs less than our time by more than this


def write(data: Record, folder: Path) -> None:
    """All three files, each replaced whole or not at all."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    replace(results / "gpu.json", (json.dumps(data, indent=1) + "\n").encode())
    shows = draw(data["benchmarks"], results) if data["benchmarks"] else False
    replace(folder / "RESULTS.md", page(data, shows).encode())


def replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def page(data: Record, has_plot: bool) -> str:
    machine = data["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    stages = "\n".join(
        "\n  - ".join(
            [f"- {name}: {found['outcome']} ({found['seconds']:.0f} s)", *(f"left out: {x}" for x in found["left_out"])]
        )
        for name, found in data["stages"].items()
    )
    parts = [
        "# Results on a GPU",
        f"Written by `make gpu` on {machine['date']}: {machine['gpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['sms']} SMs; driver, clocks, power limit: {machine['driver, clocks, power limit']}; CUDA {machine['cuda']}, "
        f"Python {machine['python']}; {versions}.",
        stages,
    ]
    records = data["benchmarks"]
    if records:
        copy = records[0]["copy GB/s"]
        parts += [
            f"A copy of 1 GB moved {copy:,.0f} GB/s in the same run (read + write). Device time in microseconds, host time in "
            "brackets; % is the floor's bytes (forward 1 pass over the logits, forward + backward 2) over time and a copy; "
            "peak is the memory that the call allocates, in units of the logits. How it is measured: bench_gpu.py.",
            "![Forward and backward, in % of the copy bandwidth](results/gpu.png)" if has_plot else "",
            "## Where others are faster",
            losses(records),
        ]
        parts += [f"## {TITLES[phase]}\n\n{table(records, phase)}" for phase in PHASES]
    return "\n\n".join(part for part in parts if part) + "\n"


def groups(records: list[Record], phase: str) -> dict[tuple[str, str], dict[str, Record]]:
    """The records of a phase: (shape, dtype) -> implementation -> record."""
    grouped: defaultdict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        name, dtype, implementation, measured = record["case"]
        if measured == phase:
            grouped[f"{name}, {' x '.join(map(str, record['shape']))}", dtype][implementation] = record
    return dict(grouped)


def implementations(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(record["case"][2] for record in records))


def table(records: list[Record], phase: str) -> str:
    names = implementations(records)
    lines = ["| logits | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for (shape, dtype), found in groups(records, phase).items():
        cells = [cell(found[name], phase) if name in found else "" for name in names]
        lines.append(f"| {shape}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(record: Record, phase: str) -> str:
    # A fused gradient leaves the backward nothing to move: its bandwidth would mean nothing.
    share = "" if phase == "backward" else f", {record['% of copy']:.0f} %"
    return f"{record['device_us']:,.1f} ({record['host_us']:,.0f}){share}, peak {record['peak_in_logits']:.2f}"


def losses(records: list[Record]) -> str:
    """Device time of forward and backward together, and of the forward; host time of both; memory of both."""
    lines = []
    for phase in ("both", "forward"):
        for (shape, dtype), found in groups(records, phase).items():
            for key, what in (("device_us", "device time"), ("host_us", "host time"), ("peak_in_logits", "memory")):
                if OURS not in found or (phase == "forward" and key != "device_us"):
                    continue
                ours = found[OURS][key]
                ahead = [f"{name} {other[key] / ours:.2f}" for name, other in found.items() if other[key] * NOISE < ours]
                if ahead:
                    lines.append(f"- {TITLES[phase]}, {shape}, {dtype}: {what} in ours: {', '.join(ahead)}.")
    return "\n".join(lines) or "Nowhere in the tables below, forward + backward and forward alone."


def draw(records: list[Record], folder: Path) -> bool:
    """Forward and backward of every implementation in % of the copy bandwidth; False where there is nothing to draw."""
    found = groups(records, "both")
    if not found:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = implementations(records)
    figure, panel = plt.subplots(figsize=(9, 0.45 * len(found) + 1.2))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [row for row, measured in enumerate(found.values()) if name in measured]
        shares = [measured[name]["% of copy"] for measured in found.values() if name in measured]
        panel.barh([row + (i - (len(names) - 1) / 2) * height for row in rows], shares, height, label=name)
    panel.axvline(100, color="black", linewidth=1)
    panel.set_yticks(range(len(found)), [f"{shape}, {dtype}" for shape, dtype in found], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("forward + backward: the floor's bytes over time, in % of a copy's bandwidth")
    panel.legend(fontsize=7)
    path = folder / "gpu.png"
    temporary = path.with_name("gpu.new.png")
    figure.savefig(temporary, bbox_inches="tight", dpi=90, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)
    return True
