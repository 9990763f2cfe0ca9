"""Plots and sentences on what a factor of the loss does not reach, the regulariser, or reaches twice: claims 3, 4a and 4b."""

import math
import statistics
from typing import Any

from mean_or_sum.records import Record, distinct, line, only, percent, plus_minus, powers_of_two, slope, spread, where


def best_decay(records: list[Record], seed: int | None = None) -> dict[int, float]:
    """For each batch size the weight decay of the highest accuracy, a seed's or the mean's; the geometric middle of a tie."""
    found = {}
    for batch in distinct(records, "batch"):
        scores = {
            record["weight_decay"]: statistics.fmean(record["accuracy"]) if seed is None else record["accuracy"][seed]
            for record in where(records, batch=batch)
        }
        best = [decay for decay, score in scores.items() if score == max(scores.values())]
        found[batch] = 2 ** statistics.fmean(math.log2(decay) for decay in best)
    return found


def decay_slopes(records: list[Record]) -> list[float]:
    """Each seed's exponent a in: best weight decay ~ B**a."""
    slopes = []
    for seed in range(len(records[0]["accuracy"])):
        best = best_decay(records, seed)
        slopes.append(slope([math.log2(batch) for batch in best], [math.log2(decay) for decay in best.values()]))
    return slopes


def draw_regulariser(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(9, 6.4)
    batches, decays = distinct(records, "batch"), distinct(records, "weight_decay")
    rows = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, optimizer in zip(rows, distinct(records, "optimizer"), strict=True):
        for axes, reduction in zip(row, ["mean", "sum"], strict=True):
            mine = where(records, optimizer=optimizer, reduction=reduction)
            grid = [
                [100 * statistics.fmean(only(mine, batch=batch, weight_decay=decay)["accuracy"]) for batch in batches]
                for decay in decays
            ]
            image = axes.imshow(grid, origin="lower", aspect="auto", vmin=10, vmax=90, cmap="viridis")
            for x, batch in enumerate(batches):
                for y in range(len(decays)):
                    axes.text(
                        x, y, f"{grid[y][x]:.0f}", ha="center", va="center", fontsize=7, color="w" if grid[y][x] < 60 else "k"
                    )
                best = best_decay(mine)[batch]
                height = slope(list(map(math.log2, decays)), list(range(len(decays)))) * (math.log2(best) - math.log2(decays[0]))
                axes.plot(x, height, "s", color="none", markeredgecolor="red", markersize=17, markeredgewidth=1.6)
            axes.set_xticks(range(len(batches)), batches)
            axes.set_yticks(range(len(decays)), [f"{decay:.3g}" for decay in decays], fontsize=7)
            axes.set_title(f"{optimizer}, {reduction}: best decay ~ B^{statistics.fmean(decay_slopes(mine)):.2f}", fontsize=10)
    for axes in rows[:, 0]:
        axes.set_ylabel("weight decay")
    for axes in rows[1]:
        axes.set_xlabel("batch size B")
    figure.colorbar(image, ax=rows, label="test accuracy (%); red: the best of the column", shrink=0.7)


def tell_regulariser(records: list[Record]) -> list[str]:
    sentences = []
    for optimizer in distinct(records, "optimizer"):
        exponents = {}
        for reduction in ("mean", "sum"):
            mine = where(records, optimizer=optimizer, reduction=reduction)
            exponents[reduction] = decay_slopes(mine)
            best = best_decay(mine)
            small, large = min(best), max(best)
            # `best` may lie between two decays that tie: look at the nearest one that was measured.
            kept = min(distinct(mine, "weight_decay"), key=lambda decay: abs(math.log2(decay / best[small])))
            there = where(mine, batch=large)
            cost = max(statistics.fmean(r["accuracy"]) for r in there) - statistics.fmean(
                only(there, weight_decay=kept)["accuracy"]
            )
            sentences.append(
                f"**{optimizer}, {reduction}**: the best weight decay {_verdict(exponents[reduction])}: it goes as "
                f"B^({plus_minus(exponents[reduction])}), from {best[small]:.3g} at B = {small} to {best[large]:.3g} at "
                f"B = {large}. Keeping at {large} what was best at {small} costs {100 * cost:.1f} points of accuracy."
            )
        apart = statistics.fmean(exponents["sum"]) - statistics.fmean(exponents["mean"])
        verdict = "the sum moves the best decay by a factor of B" if abs(apart - 1) < 0.25 else "the sum does not move it by B"
        verdict = "sum or mean makes no difference to it" if abs(apart) < 0.25 else verdict
        sentences.append(f"**{optimizer}**: the exponents of sum and mean differ by {apart:.2f}: {verdict}.")
    n = len(records[0]["accuracy"])
    return [
        "\n".join(f"- {sentence}" for sentence in sentences),
        "Few images with noisy labels, so that weight decay decides; the number of steps is fixed; the rates are those with "
        "which sum and mean take the same steps without weight decay (SGD: l and l/B; AdamW: l for both). "
        f"{n} seeds, each with its own images and noise; the exponent is fitted to each seed's best decays.",
    ]


def _verdict(exponents: list[float]) -> str:
    exponent = statistics.fmean(exponents)
    if abs(exponent) < 0.25:
        return "stays put"
    return "moves as B" if abs(exponent - 1) < 0.25 else "moves, though not as B"


def axes_of_k(axes: Any, ks: list[Any], label: str) -> None:
    axes.set_xscale("log", base=2)
    powers_of_two(axes.xaxis, ks)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_remark1(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(9, 3.4)
    left, right = figure.subplots(1, 2)
    styles = {"rate x k": "C0o-", "loss x k": "C3s-", "loss x k, decay x k": "C2x--"}
    ks = distinct(records, "k")
    for variant, style in styles.items():
        mine = [where(records, variant=variant, k=k) for k in ks]
        line(left, ks, [[100 * r["accuracy"] for r in at_k] for at_k in mine], fmt=style, label=variant)
        if variant != "rate x k":
            line(right, ks, [[r["distance"] for r in at_k] for at_k in mine], fmt=style, label=variant)
    left.set(ylabel="test accuracy (%)", title="Remark 1: the loss times k")
    right.set(ylabel="|weights - those of rate x k| / |those|", title="Distance to rate x k")
    right.set_yscale("symlog", linthresh=1e-8)
    for axes in (left, right):
        axes_of_k(axes, ks, "k")


def tell_remark1(records: list[Record]) -> list[str]:
    k = max(distinct(records, "k"))
    at = {variant: where(records, variant=variant, k=k) for variant in distinct(records, "variant")}
    accuracies = {variant: [r["accuracy"] for r in mine] for variant, mine in at.items()}
    distance = {variant: max(r["distance"] for r in mine) for variant, mine in at.items()}
    fails = [b - a for a, b in zip(accuracies["loss x k"], accuracies["rate x k"], strict=True)]
    return [
        f"With weight decay, k times the loss is not k times the rate. At k = {k} scaling the loss alone ends "
        f"{distance['loss x k']:.2g} of the weights' length away from scaling the rate, and has "
        f"{percent(accuracies['loss x k'])} accuracy against {percent(accuracies['rate x k'])} (difference "
        f"{100 * statistics.fmean(fails):.1f} ± {100 * spread(fails):.1f} points): the decay counts for a k-th. "
        f"With the decay times k as well it ends {distance['loss x k, decay x k']:.1g} away, with "
        f"{percent(accuracies['loss x k, decay x k'])}."
    ]


REMARK_3_STYLES = {"sum of means": "C3s-", "mean of means": "C1^-", "sum / global count": "C2o--"}


def draw_remark3(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(9, 3.4)
    left, right = figure.subplots(1, 2)
    ks = distinct(records, "k")
    for variant, style in REMARK_3_STYLES.items():
        mine = [where(records, variant=variant, k=k) for k in ks]
        line(left, ks, [[r["error"] for r in at_k] for at_k in mine], fmt=style, label=variant)
        line(right, ks, [[100 * r["accuracy"] for r in at_k] for at_k in mine], fmt=style, label=variant)
    left.set(ylabel="relative error of the gradient", title="Remark 3, unequal counts")
    left.set_yscale("symlog", linthresh=1e-8)
    right.set(ylabel="test accuracy (%)", title="Trained with equal counts, rate times k")
    for axes in (left, right):
        axes_of_k(axes, ks, "workers k")


def tell_remark3(records: list[Record]) -> list[str]:
    k = max(distinct(records, "k"))
    at = {variant: where(records, variant=variant, k=k) for variant in REMARK_3_STYLES}
    error = {variant: statistics.fmean(r["error"] for r in mine) for variant, mine in at.items()}
    accuracies = {variant: percent([r["accuracy"] for r in mine]) for variant, mine in at.items()}
    return [
        f"With k = {k} workers, each with its own number of counted targets, the gradient of the summed per-worker means is off "
        f"by {error['sum of means']:.3g} of its length (k - 1 = {k - 1}). Averaging the means, as DistributedDataParallel does, "
        f"is off by {error['mean of means']:.2g}, because workers do not count equally many. The sums times `global_scale` are "
        f"off by {error['sum / global count']:.1g}. Trained with equal counts and the rate times k, the summed means reach "
        f"{accuracies['sum of means']}, the means of means {accuracies['mean of means']}, the right normalisation "
        f"{accuracies['sum / global count']}."
    ]
