"""Plots and sentences on whether mean and sum take the same steps: claims 1, 2 and 4."""

import math
import statistics
from typing import Any

from mean_or_sum.records import Record, distinct, if_within_the_spread, line, only, percent, powers_of_two, table, where

FLOAT32_EPS = 2.0**-23


def draw_gradients(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(9, 3.4)
    left, right = figure.subplots(1, 2)
    batches = [record["batch"] for record in records]
    exact = sorted(set(batches))
    left.loglog(exact, exact, "k-", linewidth=0.8, label="B")
    left.loglog(batches, [record["ratio"] for record in records], "C1o", markersize=4, label="measured, each seed")
    left.set(xlabel="batch size B", ylabel="|gradient of sum| / |gradient of mean|", title="The ratio is B")
    left.legend()
    right.semilogx(batches, [record["error"] / FLOAT32_EPS for record in records], "C1o", markersize=4)
    right.set(xlabel="batch size B", ylabel="largest |sum - B mean| / (B |mean|)\nin float32's epsilon", title="What is left")
    for axes in (left, right):
        axes.grid(alpha=0.3)


def tell_gradients(records: list[Record]) -> list[str]:
    powers = [record for record in records if math.log2(record["batch"]).is_integer()]
    others = [record for record in records if record not in powers]
    off = max(abs(record["ratio"] / record["batch"] - 1) for record in records)
    exact = [record["batch"] for record in powers if record["error"] == 0]
    sentence = (
        f"The gradient of the sum is B times that of the mean: over all B from {min(r['batch'] for r in records)} to "
        f"{max(r['batch'] for r in records)} the measured ratio differs from B by {off:.1g} of it at most. For powers of two, by "
        f"which floating point multiplies exactly, no component differs in {len(exact)} of {len(powers)} cases"
    )
    if others:
        worst = max(record["error"] for record in others) / FLOAT32_EPS
        sentence += f"; for other B the largest difference is {worst:.1f} of float32's epsilon of the largest component"
    return [sentence + "."]


def draw_trajectories(figure: Any, records: list[Record]) -> None:
    optimizers = distinct(records, "optimizer")
    figure.set_size_inches(10, 3.6)
    for axes, optimizer in zip(figure.subplots(1, len(optimizers), sharey=True), optimizers, strict=True):
        for batch, marker in zip(distinct(records, "batch"), "-:", strict=True):
            for rate, colour in (("l/B", "C0"), ("l", "C1")):
                for number, record in enumerate(where(records, optimizer=optimizer, batch=batch, sum_rate=rate)):
                    finite = [(x, y) for x, y in zip(record["step"], record["ulps"], strict=True) if y is not None]
                    label = f"sum at {rate}, B = {batch}" if number == 0 else None
                    axes.plot(*zip(*finite, strict=True), colour + marker, linewidth=1, label=label)
        moved = statistics.fmean(record["moved"] for record in where(records, optimizer=optimizer))
        axes.axhline(moved, color="grey", linewidth=0.8, linestyle="--", label="how far the weights went")
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="step", title=optimizer)
        axes.grid(alpha=0.3)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("largest difference from mean at l (ulps)")
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


def _ulps(records: list[Record]) -> str:
    last = [record["ulps"][-1] for record in records]
    if None in last:
        return "not finite"
    return f"{max(last):.3g}" if max(last) < 1e4 else f"{max(last):.1e}"


def tell_trajectories(records: list[Record]) -> list[str]:
    rows = []
    for optimizer in distinct(records, "optimizer"):
        for batch in distinct(records, "batch"):
            mine = where(records, optimizer=optimizer, batch=batch)
            moved = statistics.fmean(record["moved"] for record in mine)
            cells = [_ulps(where(mine, sum_rate=rate)) for rate in ("l/B", "l")]
            rows.append([optimizer, str(batch), f"{mine[0]['rate']:g}", *cells, f"{moved:.1e}"])
    head = ["optimizer", "B", "l", "sum at l/B: ulps from mean at l", "sum at l: ulps from mean at l", "ulps that the mean went"]
    steps = records[0]["step"][-1]
    sentences = []
    for optimizer in distinct(records, "optimizer"):
        same = [r for r in where(records, optimizer=optimizer) if None not in r["ulps"]]
        share = {
            rate: max((r["ulps"][-1] / r["moved"] for r in same if r["sum_rate"] == rate), default=math.inf)
            for rate in ("l/B", "l")
        }
        right = min(share, key=lambda rate: share[rate])
        identical = {r["batch"] for r in same if r["sum_rate"] == right} - {
            r["batch"] for r in same if r["sum_rate"] == right and r["ulps"][-1] > 0
        }
        bitwise = f" (bit for bit the same at B = {', '.join(map(str, sorted(identical)))})" if identical else ""
        sentences.append(
            f"**{optimizer}**: the sum follows the mean when its rate is {right}: in {steps} steps the two are never further "
            f"apart than {share[right]:.2g} of the way that the mean went{bitwise}; with the other rate {_times(share, right)}."
        )
    return [" ".join(sentences), table(head, rows), "The largest of all seeds; an ulp is that of the tensor's largest parameter."]


def _times(share: dict[str, float], right: str) -> str:
    (other,) = (value for rate, value in share.items() if rate != right)
    return f"{other:.2g}" if math.isfinite(other) else "more than float32 holds"


POLICIES = {"rate fixed": "C7o-", "rate x k": "C0o-", "sum, rate fixed": "C1x--"}


def draw_scaling(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(9, 3.6)
    for axes, warm in zip(figure.subplots(1, 2, sharey=True), [False, True], strict=True):
        for policy, style in POLICIES.items():
            mine = where(records, warm_up=warm, policy=policy)
            line(axes, [r["batch"] for r in mine], [[100 * a for a in r["accuracy"]] for r in mine], fmt=style, label=policy)
        axes.set_xscale("log", base=2)
        powers_of_two(axes.xaxis, distinct(records, "batch"))
        axes.set(xlabel="batch size 32 k", title="with warm-up in the first quarter" if warm else "without warm-up")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.axes[0].set_ylabel("test accuracy (%)")


def tell_scaling(records: list[Record]) -> list[str]:
    sentences = []
    base = statistics.fmean(only(records, k=1, policy="rate fixed", warm_up=False)["accuracy"])
    largest = max(distinct(records, "k"))
    for warm in (False, True):
        when = "With" if warm else "Without"
        told = []
        for policy in POLICIES:
            mine = where(records, policy=policy, warm_up=warm)
            holds = [r["batch"] for r in mine if statistics.fmean(r["accuracy"]) > base - 0.01]
            up_to = f"holds to batch {max(holds)}" if holds else "holds nowhere"
            told.append(f"*{policy}* {up_to} and has {percent(only(mine, k=largest)['accuracy'])} at {32 * largest}")
        sentences.append(f"{when} warm-up: {'; '.join(told)}.")
    sentences.append(_what_warm_up_changes(records))
    differences = [
        abs(a - b)
        for warm in (False, True)
        for k in distinct(records, "k")
        for a, b in zip(
            only(records, k=k, warm_up=warm, policy="rate x k")["accuracy"],
            only(records, k=k, warm_up=warm, policy="sum, rate fixed")["accuracy"],
            strict=True,
        )
    ]
    if max(differences) == 0:
        same = f"in each of the {len(differences)} pairs it finds exactly as many test images as *rate x k*"
    else:
        same = f"of {len(differences)} pairs with *rate x k* the worst differs by {100 * max(differences):.2f} points"
    sentences.append(f"The sum at a fixed rate does the scaling by itself: {same}.")
    return [
        f"As many epochs for every batch size, plain SGD; {100 * base:.1f} % at batch 32; *holds* means within a point of it. "
        + " ".join(sentences)
    ]


def _what_warm_up_changes(records: list[Record]) -> str:
    pairs = {
        record["batch"]: (only(records, k=record["k"], policy="rate x k", warm_up=False)["accuracy"], record["accuracy"])
        for record in where(records, policy="rate x k", warm_up=True)
    }
    batch = max(pairs, key=lambda batch: abs(statistics.fmean(pairs[batch][1]) - statistics.fmean(pairs[batch][0])))
    without, with_ = pairs[batch]
    return (
        f"Warm-up changes *rate x k* most at batch {batch}: from {percent(without)} to {percent(with_)}"
        f"{if_within_the_spread(without, with_)}."
    )
