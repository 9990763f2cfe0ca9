"""RESULTS.md and results/gpu.json from what gpu.py found; a verdict first. Our losses are computed like everything else.

A plot, results/gpu.png, comes at the end of a stage, where matplotlib is installed.
"""

import importlib.util
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from files import write_atomically

Record = dict[str, Any]
OURS = "fusedloss"
AS_IT_IS, AGAIN = "as it is", "as it is again"  # the plan, measured first and last
PHASES = ("both", "accumulation", "forward", "backward")
TITLES = {
    "both": "Forward + backward",
    "accumulation": "Forward + backward of loss / 8",
    "forward": "Forward",
    "backward": "Backward",
}
VERDICTS = {"failed": "", "running": "Still running", "stopped": "Stopped before the end", "left out": "Left out"}
NOISE = 1.02  # a peer is ahead when it needs less than our time by more than this
ONCE = 1.05  # of the floor's bytes: "once read, once written"


def write(data: Record, folder: Path, draws: bool = False) -> None:
    """All files, each replaced whole or not at all."""
    results = folder / "results"
    write_atomically(results / "gpu.json", json.dumps(data, indent=1) + "\n")
    plot = results / "gpu.png"
    if not records_of(data, "benchmarks"):
        plot.unlink(missing_ok=True)  # of another run
    elif draws and importlib.util.find_spec("matplotlib") is not None:
        draw(records_of(data, "benchmarks"), plot)
    write_atomically(folder / "RESULTS.md", page(data, plot.exists()))


def records_of(data: Record, stage: str) -> list[Record]:
    return data["stages"].get(stage, {}).get("records", [])


def page(data: Record, has_plot: bool) -> str:
    machine, records = data["machine"], records_of(data, "benchmarks")
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found != "not installed")
    missing = ", ".join(name for name, found in machine["versions"].items() if found == "not installed")
    parts = [
        "# Results on a GPU",
        f"**{machine['gpu']}**, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['sms']} SMs; driver, clocks, power limit: "
        f"{machine['driver, clocks, power limit']}. CUDA {machine['cuda']}, Python {machine['python']}, {versions}"
        f"{f' (not installed: {missing})' if missing else ''}. Written by `benchmarks/gpu.py` on {machine['date']}.",
        verdict(data),
        stages_table(data["stages"]),
        problems(data["stages"]),
    ]
    if records:
        copy = records[0]["copy GB/s"]
        parts += [
            "## Speed",
            f"A copy of 1 GB moved {copy:,.0f} GB/s in the same run (read + write). Forward and backward together: microseconds "
            "on the device; the bytes that no implementation can do without (the logits of rows that are not ignored read once, "
            "the gradient written once) over that time; the same in % of the copy; and each other implementation's time over "
            "ours: below 1 it is faster.",
            summary(data),
            "![Forward + backward, in % of the copy bandwidth](results/gpu.png)" if has_plot else "",
            "## Where others need less",
            losses(records),
        ]
    parts.append(traffic(data))
    if records:
        parts += [
            "## All measurements",
            "Device time in microseconds, host time in brackets; % is the floor's bytes (in the forward a read of the rows that "
            "are not ignored, with the backward a write of all besides) over time and a copy; peak is the memory that the call "
            "allocates, in units of the logits. How it is measured: bench_gpu.py.",
        ]
        parts += [f"### {TITLES[phase]}\n\n{table(records, phase)}" for phase in PHASES if groups(records, phase)]
    parts.append(last_layer(records_of(data, "last_layer")))
    parts.append(tuning(records_of(data, "tune")))
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------------------- verdict


def verdict(data: Record) -> str:
    """Two or three sentences: what a reader wants to know who reads no further."""
    stages = data["stages"]
    by_word = {word: [name.replace("_", " ") for name in stages if stages[name]["verdict"] == word] for word in VERDICTS}
    passed = sum(int(n.replace(",", "")) for found in stages.values() for n in re.findall(r"([\d,]+) passed", found["outcome"]))
    failed = ", ".join(by_word["failed"])
    found = [f"**{f'Failed: {failed}' if failed else 'Nothing failed'}**; {passed:,} tests passed."]
    found += [f"{what}: {', '.join(by_word[word])}." for word, what in VERDICTS.items() if what and by_word[word]]
    both = [cell for cell in groups(records_of(data, "benchmarks"), "both").values() if OURS in cell]
    if both:
        shares = sorted(cell[OURS]["% of copy"] for cell in both)
        behind = sum(any(other["device_us"] * NOISE < cell[OURS]["device_us"] for other in cell.values()) for cell in both)
        found.append(f"Forward + backward: {shares[0]:.0f} to {shares[-1]:.0f} % of a copy's bandwidth;")
        found.append(f"something else is faster in {behind} of {len(both)} cases.")
    if moved := [over_the_floor(record) for record in records_of(data, "traffic") if "read" in record]:
        found.append(f"DRAM moved {min(moved):.2f} to {max(moved):.2f} times the bytes of the floor.")
    return " ".join(found)


def over_the_floor(record: Record) -> float:
    return (record["read"] + record["written"]) / record["floor"]


def stages_table(stages: Record) -> str:
    lines = ["| stage | verdict | what was done | seconds |", "|---|---|---|---|"]
    for name, found in stages.items():
        verdict = f"**{found['verdict']}**" if found["verdict"] == "failed" else found["verdict"]
        lines.append(f"| {name.replace('_', ' ')} | {verdict} | {found['outcome']} | {found['seconds']:.0f} |")
    return "\n".join(lines)


def problems(stages: Record) -> str:
    """What failed, and what was left out, by stage."""
    lines = []
    for name, found in stages.items():
        for key, what in (("failures", "failed"), ("left_out", "left out")):
            lines += [f"- {name.replace('_', ' ')}: {what}: {line}" for line in found.get(key, [])]
    return "\n".join(lines)


def traffic(data: Record) -> str:
    records = records_of(data, "traffic")
    if not records:
        return ""
    lines = [
        "## Bytes that DRAM moved",
        "",
        "One forward of training, which writes the gradient, counted by ncu. The floor: logits and targets read once, gradient "
        "written once, bfloat16.",
        "",
        "| logits | launches | read, MB | written, MB | over the floor | once read, once written |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        if "read" not in record:  # still running
            continue
        over = over_the_floor(record)
        shape = f"{record['case']}, {' x '.join(map(str, record['shape']))}"
        numbers = f"{record['launches']} | {record['read'] / 1e6:,.0f} | {record['written'] / 1e6:,.0f} | {over:.3f}"
        lines.append(f"| {shape} | {numbers} | {'yes' if over < ONCE else 'no'} |")
    return "\n".join(lines)


def summary(data: Record) -> str:
    """A line per shape and dtype: ours, and every other's time over it, for an upstream gradient of 1 and of 1/8."""
    records = records_of(data, "benchmarks")
    others = [name for name in implementations(records) if name != OURS]
    scaled = groups(records, "accumulation")
    over = [f"{name} / ours" for name in others]
    head = ["logits", "ours, us", "GB/s", "% of copy", *over, "(loss / 8): ours, us", *(f"(loss / 8): {name}" for name in over)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, found in groups(records, "both").items():
        if OURS not in found:
            continue
        ours = found[OURS]
        cells = [f"{ours['device_us']:,.1f}", f"{ours['GB/s']:,.0f}", f"{ours['% of copy']:.0f}", *times_of(found, others)]
        after = scaled.get(key, {})
        cells += [f"{after[OURS]['device_us']:,.1f}" if OURS in after else "", *times_of(after, others)]
        lines.append(f"| {', '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_of(found: dict[str, Record], others: list[str]) -> list[str]:
    known = {name: found[name]["device_us"] / found[OURS]["device_us"] for name in others if name in found and OURS in found}
    return [f"{known[name]:.2f}" if name in known else "" for name in others]


# -------------------------------------------------------------------------------------------------------- measurements


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
    """Device time of every phase but the backward alone; host time and memory of forward and backward together."""
    lines = []
    for phase in ("both", "accumulation", "forward"):
        for (shape, dtype), found in groups(records, phase).items():
            for key, what in (("device_us", "device time"), ("host_us", "host time"), ("peak_in_logits", "memory")):
                if OURS not in found or (phase != "both" and key != "device_us"):
                    continue
                ours = found[OURS][key]
                ahead = [f"{other[key] / ours:.2f} with {name}" for name, other in found.items() if other[key] * NOISE < ours]
                if ahead:
                    lines.append(f"- {TITLES[phase]}, {shape}, {dtype}: of our {what} {', '.join(ahead)}.")
    return "\n".join(lines) or "Nowhere: neither forward + backward, of loss or loss / 8, nor the forward alone."


def last_layer(records: list[Record]) -> str:
    """A line for each case of the loss fused with the last linear layer."""
    if not records:
        return ""
    names = list(dict.fromkeys(record["implementation"] for record in records))
    by_case: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_case[record["case"]][record["implementation"]] = record
    lines = [
        "## The loss fused with the last linear layer",
        "",
        "Forward and backward of rows x features -> classes: device time in milliseconds; in brackets the time of the three "
        "matmuls alone, over all rows, in % of it, and the memory beyond inputs and gradients. How: gpu_linear.py.",
        "",
        f"| case | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for case, found in by_case.items():
        cells = []
        for name in names:
            if name not in found:
                cells.append("")
                continue
            share = f"{100 * found['matmuls']['device_us'] / found[name]['device_us']:.0f} %, " if "matmuls" in found else ""
            cells.append(f"{found[name]['device_us'] / 1e3:.2f} ({share}{found[name]['extra_bytes'] / 1e6:,.0f} MB)")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning(records: list[Record]) -> str:
    """Device time of each setting, per shape; the least is bold."""
    if not records:
        return ""
    settings = list(dict.fromkeys(named(record["setting"]) for record in records))
    by_shape: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_shape[record["shape"]][named(record["setting"])] = record
    lines = [
        "## Constants of the plan",
        "",
        "Device time of the fused forward in microseconds, bfloat16, and how each setting cuts the rows.",
        "",
        f"| logits | {' | '.join(settings)} |",
        "|---" * (1 + len(settings)) + "|",
    ]
    for shape, found in by_shape.items():
        least = min(record["device_us"] for record in found.values())
        cells = []
        for setting in settings:
            time = f"{found[setting]['device_us']:,.1f}" if setting in found else ""
            mark = "**" if setting in found and found[setting]["device_us"] == least else ""
            cells.append(f"{mark}{time}{mark}, {found[setting]['launch']}" if setting in found else "")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *faster(by_shape)])


def faster(by_shape: dict[str, dict[str, Record]]) -> list[str]:
    """What the table says of the plan."""
    lines = []
    for shape, found in by_shape.items():
        times = {setting: record["device_us"] for setting, record in found.items()}
        if AS_IT_IS not in times:
            continue
        usual, again = times[AS_IT_IS], times.pop(AGAIN, times[AS_IT_IS])
        noise = max(NOISE, usual / again, again / usual)
        setting = min(times, key=lambda name: times[name])
        if times[setting] * noise < usual:
            lines.append(f"- {shape}: {setting} takes {times[setting] / usual:.2f} of the time of the plan as it is.")
        if noise > NOISE:
            lines.append(f"- {shape}: the plan as it is, measured first and last, differs by {100 * (noise - 1):.0f} %.")
    return lines or ["No setting beats the plan as it is by more than the 2 % that two runs differ by."]


def named(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or AS_IT_IS


def draw(records: list[Record], path: Path) -> None:
    """Forward and backward of every implementation in % of the copy bandwidth."""
    found = groups(records, "both")
    if not found:
        return
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
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight", dpi=90, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, image.getvalue())
