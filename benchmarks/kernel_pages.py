"""KERNELS.md and its plots from kernel_report.py's numbers: no figure and no verdict here that is not computed from them."""

import io
from pathlib import Path
from typing import Any

from files import write_atomically

Record = dict[str, Any]

# The best peer of each mark, as issue 6 gives it: name, instructions, passes, widths, launches (own + torch's), syncs.
BEST_PEERS = {
    "4096 x 10": ("torch.compile", 91, 5.0, "8", "3 + 1", 0),
    "2048 x 1000": ("torch.compile", 49, 3.6, "16", "3 + 1", 0),
    "1024 x 32000": ("Liger", 21, 2.7, "16", "1 + 13", 5),
    "512 x 50257": ("Unsloth", 32, 4.0, "2", "2 + 6", 0),
    "256 x 128256": ("Liger", 18, 2.7, "16", "1 + 13", 5),
}
TARGET_PASSES = 1.9
TARGET_LAUNCHES = 3
TARGET_WIDTH = 16
TARGET_INSTRUCTIONS = 14  # with MANY_CLASSES or more
MANY_CLASSES = 4096
LIGER_PASSES = (2, 1)  # read, written: the marks' counts agree
PLOT_TARGET = "sm_90"


def write(data: Record, folder: Path) -> str:
    """Writes KERNELS.md and the plots; returns the table of marks."""
    table = marks_table(data["marks"]) if data["marks"] else NO_MARKS
    plots = draw(data, folder / "results")
    parts = [
        "# The kernels, without a GPU",
        introduction(data),
        "## Marks",
        MARKS_TEXT if data["marks"] else "",
        table,
        plots.get("marks", ""),
        "## Where we lose, or miss the target",
        losses(data),
        "## Traffic and launches",
        TRAFFIC_TEXT,
        traffic_table(data),
        "## Time that the bytes need",
        time_text(data),
        time_table(data),
        plots.get("time", ""),
        "## As compiled",
        COMPILED_TEXT,
        *(f"### {target}: {device['name']}\n\n{compiled_table(data, target)}" for target, device in data["devices"].items()),
    ]
    write_atomically(folder / "KERNELS.md", "\n\n".join(part for part in parts if part) + "\n")
    return table


NO_MARKS = "Left out: the emulator that counts instructions and sectors is not beside this checkout."
MARKS_TEXT = """Forward and backward of the mean, one row in seven ignored, executed for sm_90 by an emulator of the compiled PTX.
Instructions are thread instructions (warp instructions x 32) per logit; passes are the 32-byte sectors asked of L2, of all
buffers, over the bytes of the logits; widths are the narrowest and widest access of the main loops in bytes per thread. The best
peer's row holds the figures this project was given to beat; Liger's is measured here. "Misses" compares with the best peer's
instructions, 1.9 passes, 3 launches of our own, 16-byte accesses, no sync, no spill, and 14 instructions from 4096 classes on."""
TRAFFIC_TEXT = """Forward and backward. R and W are reads and writes in passes over the logits as asked by the kernels, and their
bytes per logit, class probabilities included; tensors smaller than the logits (class indices, per-row statistics) come on top.
PyTorch's are counted from its operators, each reading its inputs once, which is a lower bound: its softmax reads long rows two or
three times. Launches: ours + PyTorch's, which fills the upstream gradient with 1. For an upstream gradient other than 1 a fused
gradient, ours or Liger's, is multiplied: 1R + 1W more."""
COMPILED_TEXT = """Every kernel of a case. Tile: rows x columns that a program holds at a time. Per SM: programs that it has
room for, by threads, registers and shared memory; with one, loading, reducing and storing never overlap. Registers per thread;
spills are instructions (NVIDIA) or registers (AMD); shared memory in bytes; loads and stores: bytes per thread x instructions in
the machine code, narrow ones among them for targets, statistics and ragged edges."""


def introduction(data: Record) -> str:
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in data["versions"].items())
    return (
        "Written by `make report`; nothing on this page was measured on a GPU. Kernels are cross-compiled by Triton and read "
        f"back from the machine code. {versions}."
    )


def marks_table(marks: Record) -> str:
    lines = [
        "| logits | | instructions | passes | widths | launches | syncs | spills | misses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in marks.items():
        peer, instructions, passes, widths, launches, syncs = BEST_PEERS[name]
        for who in measured:
            mark = measured[who]
            bold = "**" if who == "ours" else ""
            spread = sorted({mark["narrowest"], mark["widest"]})
            verdict = (", ".join(misses(name, mark)) or "nothing") if who == "ours" else ""
            lines.append(
                f"| {name if who == 'ours' else ''} | {bold}{who}{bold} | {mark['instructions']:,.1f} | {mark['passes']:.2f} | "
                f"{' to '.join(map(str, spread))} | {mark['launches']} + {mark['torch_launches']} | {mark['syncs']} | "
                f"{mark['spills']} | {verdict} |"
            )
        if "Liger" not in measured:
            lines.append("| | Liger | not installed | | | | | | |")
        lines.append(f"| | best peer: {peer} | {instructions} | {passes} | {widths} | {launches} | {syncs} | | |")
    return "\n".join(lines)


def misses(name: str, mark: Record) -> list[str]:
    """Which of the issue's targets our mark misses."""
    limit = BEST_PEERS[name][1]
    found = []
    if mark["instructions"] >= limit:
        found.append(f"{limit} instructions")
    if int(name.split(" x ")[1]) >= MANY_CLASSES and mark["instructions"] > TARGET_INSTRUCTIONS:
        found.append(f"{TARGET_INSTRUCTIONS} instructions")
    if round(mark["passes"], 1) > TARGET_PASSES:
        found.append(f"{TARGET_PASSES} passes")
    if mark["narrowest"] < TARGET_WIDTH:
        found.append(f"{TARGET_WIDTH}-byte accesses")
    if mark["launches"] > TARGET_LAUNCHES:
        found.append(f"{TARGET_LAUNCHES} launches")
    return found + [what for what in ("syncs", "spills") if mark[what]]


READ_NO_LOGITS = ("denominator_kernel", "finish_kernel", "digit_kernel", "selected_kernel", "scale_gradient_kernel")


def main_launches(record: Record) -> list[Record]:
    """The launches that touch every logit, in order."""
    return [launch for launch in record["launches"] if launch["kernel"] not in READ_NO_LOGITS]


def widest(accesses: Record) -> int:
    return max((int(width) for width in accesses), default=0)


def seconds(data: Record, case: Record, target: str, who: str) -> float | None:
    """Bytes that must come from and go to memory, over the bandwidth."""
    record = case["targets"][target]
    if who == "eager":
        passes = case["eager"]["reads"] + case["eager"]["writes"]
    elif who == "Liger":
        if "liger_memory_passes" not in record:
            return None
        passes = record["liger_memory_passes"]
    else:
        passes = record["memory_passes"]
    return passes * case["n_logits"] * case["itemsize"] / data["devices"][target]["bandwidth"]


def losses(data: Record) -> str:
    """Every cell in which a peer is ahead, or a target is missed."""
    lines = []
    for name, measured in (data["marks"] or {}).items():
        missed = misses(name, measured["ours"])
        if missed:
            lines.append(f"- {name}, executed on sm_90: misses {', '.join(missed)}.")
    for case in data["cases"]:
        problems: dict[str, list[str]] = {}
        for target, record in case["targets"].items():
            kernels = main_launches(record)
            found = []
            spills = sum(launch["spills"] for launch in record["launches"])
            if spills:
                found.append(f"{spills} spills")
            narrow = [launch for launch in kernels if widest(launch["loads"]) < TARGET_WIDTH]
            if narrow:
                found.append(f"no load wider than {max(widest(launch['loads']) for launch in narrow)} bytes")
            narrow = [launch for launch in kernels if launch["stores"] and widest(launch["stores"]) < TARGET_WIDTH]
            narrow = [launch for launch in narrow if not launch["kernel"].startswith("forward")]
            if narrow:
                found.append(f"no store wider than {max(widest(launch['stores']) for launch in narrow)} bytes")
            if any(launch["per_sm"] == 1 for launch in kernels):
                found.append("an SM has room for one program")
            if record["memory_passes"] > record["floor_passes"]:
                found.append(f"{record['memory_passes']:.3g} passes over the memory where {record['floor_passes']} would do")
            for who in ("eager", "Liger"):
                theirs, ours = seconds(data, case, target, who), seconds(data, case, target, "ours")
                if theirs is not None and ours is not None and theirs < ours:
                    found.append(f"{who} needs {theirs / ours:.2f} of our bytes")
            for problem in found:
                problems.setdefault(problem, []).append(target)
        for problem, targets in problems.items():
            where = "everywhere" if len(targets) == len(case["targets"]) else ", ".join(targets)
            lines.append(f"- {case['case']}: {problem} ({where}).")
    return "\n".join(lines) or "Nowhere in the tables below."


def traffic_table(data: Record) -> str:
    target = next(iter(data["devices"]))
    lines = [
        "| logits | strategy | ours | PyTorch | Liger | launches: ours | PyTorch | Liger |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in data["cases"]:
        record, eager, size = case["targets"][target], case["eager"], case["itemsize"]

        def cell(reads: float, writes: float, size: int = size) -> str:
            return f"{reads:.3g}R + {writes:.3g}W, {size * (reads + writes):.3g} B"

        if record["liger"]:
            liger, liger_launches = cell(*LIGER_PASSES), f"{len(record['liger'])} + 13, 5 syncs"
        else:
            liger = liger_launches = absent(data)
        lines.append(
            f"| {case['case']} | {record['strategy']} | {cell(record['reads'], record['writes'])} | "
            f"{cell(eager['reads'], eager['writes'])} | {liger} | {len(record['launches'])} + 1 | {eager['launches']} | "
            f"{liger_launches} |"
        )
    return "\n".join(lines)


def absent(data: Record) -> str:
    return "does not serve it" if data["versions"]["Liger"] else "not installed"


def time_text(data: Record) -> str:
    devices = ", ".join(f"{d['name']} {d['bandwidth'] / 1e9:,.0f} GB/s" for d in data["devices"].values())
    return (
        f"Bytes through memory over the published bandwidth, in microseconds: {devices}. A lower bound that no kernel reaches; "
        "launches, 2 to 5 microseconds each, come on top and decide below about 10 MB of logits. A second read by the same "
        "program counts as free where the rows of all programs in flight fit the last cache; PyTorch's operators each go to "
        "memory."
    )


def time_table(data: Record) -> str:
    targets = list(data["devices"])
    lines = [
        "| logits | " + " | ".join(f"{target}: ours | PyTorch | Liger" for target in targets) + " |",
        "|---|" + "---|" * (3 * len(targets)),
    ]
    for case in data["cases"]:
        cells = []
        for target in targets:
            for who in ("ours", "eager", "Liger"):
                value = seconds(data, case, target, who)
                cells.append("" if value is None else microseconds(value))
        lines.append(f"| {case['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def microseconds(value: float) -> str:
    return f"{1e6 * value:,.0f}" if value >= 1e-4 else f"{1e6 * value:.2g}"


def compiled_table(data: Record, target: str) -> str:
    lines = [
        "| logits | kernel | tile | programs | per SM | warps | registers | spills | shared | loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in data["cases"]:
        record = case["targets"][target]
        name = case["case"]
        for launch in [*record["launches"], *({**launch, "kernel": "Liger's"} for launch in record["liger"])]:
            tile = record["tiles"].get(launch["kernel"])
            lines.append(
                f"| {name} | {launch['kernel'].removesuffix('_kernel')} | {' x '.join(map(str, tile)) if tile else ''} | "
                f"{launch['n_programs']} | {launch['per_sm']} | {launch['num_warps']} | {launch['registers']} | "
                f"{launch['spills']} | {launch['shared_bytes']} | {widths(launch['loads'])} | {widths(launch['stores'])} |"
            )
            name = ""
    return "\n".join(lines)


def widths(accesses: Record) -> str:
    return ", ".join(f"{width} x {accesses[str(width)]}" for width in sorted(map(int, accesses), reverse=True)) or "none"


def draw(data: Record, folder: Path) -> dict[str, str]:
    """The plots as files, and the Markdown that shows them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {}

    def save(figure: Any, name: str, title: str) -> None:
        # No Software entry: the file depends on the numbers alone.
        file = io.BytesIO()
        figure.savefig(file, format="png", bbox_inches="tight", dpi=85, metadata={"Software": None})
        plt.close(figure)
        write_atomically(folder / f"kernels_{name}.png", file.getvalue())
        shown[name] = f"![{title}](results/kernels_{name}.png)"

    if data["marks"]:
        names = list(data["marks"])
        figure, panels = plt.subplots(1, 2, figsize=(11, 3.6))
        for panel, key, index, title in (
            (panels[0], "instructions", 1, "thread instructions per logit"),
            (panels[1], "passes", 2, "passes asked of L2"),
        ):
            bars = {"ours": [data["marks"][name]["ours"][key] for name in names]}
            bars["best peer"] = [BEST_PEERS[name][index] for name in names]
            if all("Liger" in data["marks"][name] for name in names):
                bars["Liger"] = [data["marks"][name]["Liger"][key] for name in names]
            grouped(panel, names, bars)
            panel.set_yscale("log")
            panel.set_title(title, fontsize=10)
        panels[1].axhline(TARGET_PASSES, color="black", linewidth=1, linestyle=":")
        save(figure, "marks", "Instructions per logit and passes asked, ours, best peer, Liger")
    target = PLOT_TARGET if PLOT_TARGET in data["devices"] else next(iter(data["devices"]))
    bandwidth = data["devices"][target]["bandwidth"]
    figure, panel = plt.subplots(figsize=(9, 0.22 * len(data["cases"]) + 1.2))
    for i, who in enumerate(("ours", "eager", "Liger")):
        points = []
        for row, case in enumerate(data["cases"]):
            value = seconds(data, case, target, who)
            if value is not None:
                points.append((value * bandwidth / (case["n_logits"] * case["itemsize"]), row + 0.2 * (i - 1)))
        panel.scatter(*zip(*points, strict=True), s=18, label=who, zorder=2) if points else None
    panel.axvline(2, color="black", linewidth=1, linestyle=":")
    panel.set_yticks(range(len(data["cases"])), [case["case"] for case in data["cases"]], fontsize=7)
    panel.invert_yaxis()
    panel.grid(axis="y", alpha=0.3)
    panel.set_xlabel(f"passes over the memory, forward and backward, {target}; the floor is 2, of probabilities 3")
    panel.legend(fontsize=8)
    save(figure, "time", "Passes over the memory of every case")
    return shown


def grouped(panel: Any, names: list[str], bars: dict[str, list[float]]) -> None:
    width = 0.8 / len(bars)
    for i, (who, values) in enumerate(bars.items()):
        places = [row + (i - (len(bars) - 1) / 2) * width for row in range(len(names))]
        panel.bar(places, values, width, label=who)
    panel.set_xticks(range(len(names)), names, fontsize=7)
    panel.legend(fontsize=8)
