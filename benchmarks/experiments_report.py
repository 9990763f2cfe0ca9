"""Plots and sentences of experiments.py's results: no number and no verdict here that is not computed from the files."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from training.failure import Failure
from training.files import write_atomically

Record = dict[str, Any]
FLOAT32_EPS = 2.0**-23


def write(folder: Path) -> None:
    """EXPERIMENTS.md and a plot for each file in results/; an experiment that was not run is left out."""
    measured = {}
    for name in SECTIONS:
        path = folder / "results" / f"{name}.json"
        if path.exists():
            measured[name] = json.loads(path.read_text())
    if not measured:
        raise Failure(f"{folder}/results holds no results: run without --report first")
    parts = [introduction(measured)]
    for name, results in measured.items():
        title, draw, sentences = SECTIONS[name]
        save_figure(draw, results["records"], folder / "results" / f"{name}.png")
        command = f"```\n{command_line(name, results['options'])}\n```"
        text = "\n\n".join(sentences(results["records"]))
        parts.append(f"## {title}\n\n{text}\n\n![{title}](results/{name}.png)\n\n{command}")
    save_text(folder / "EXPERIMENTS.md", "\n\n".join(parts) + "\n")


def save_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def introduction(measured: dict[str, Any]) -> str:
    def all_of(key: str) -> str:
        return "; ".join(dict.fromkeys(str(results[key]) for results in measured.values()))

    options = next(iter(measured.values()))["options"]
    seconds = sum(results["seconds"] for results in measured.values())
    times = ", ".join(f"{name} {results['seconds']:.0f} s" for name, results in measured.items())
    setting = {
        "mlp": "scikit-learn's digits (1437 images for training, 360 for the test), a network of one hidden layer with 64 units",
        "tutorial": f"{options['data']}, the network of TensorFlow's tutorial, images standardised, not augmented",
    }[options["model"]]
    quick = " **A quick run: eight steps, which show nothing.**" if options["quick"] else ""
    return f"""# Mean or sum? The measurements

Written by `benchmarks/experiments.py`: every number, and every verdict in a sentence, is computed from the files in
[results/](results); nothing is typed in.{quick}

Setting: {setting}; losses by `fusedloss.cross_entropy`, optimizers by PyTorch, float32.
{options["seeds"]} seeds: "a ± b" is mean and standard deviation over them, as are points and bars in the plots.
B is the batch size, l the learning rate.

Machine: {all_of("machine")}; other programs ran on it, too.
{all_of("versions")}. {all_of("date")}.
Time: {seconds / 60:.1f} minutes in all ({times})."""


def command_line(name: str, options: Record) -> str:
    usual = {"data": "digits", "model": "mlp", "device": "cpu", "seeds": 5, "quick": False}
    given = [f"--{key}" if value is True else f"--{key} {value}" for key, value in options.items() if value != usual[key]]
    return f'make experiments ARGS="{" ".join([f"--only {name}", *given])}"'


# ------------------------------------------------------------------------------------------------------------- helpers


def where(records: list[Record], **wanted: Any) -> list[Record]:
    return [record for record in records if all(record[key] == value for key, value in wanted.items())]


def distinct(records: list[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def only(records: list[Record], **wanted: Any) -> Record:
    (record,) = where(records, **wanted)
    return record


def spread(values: list[float]) -> float:
    return statistics.stdev(values)


def percent(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * spread(values):.1f} %"


def plus_minus(values: list[float], digits: int = 2) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {spread(values):.{digits}f}"


def _if_within_the_spread(a: list[float], b: list[float]) -> str:
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    return ", a difference within the spread" if difference < math.hypot(spread(a), spread(b)) else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line."""
    x_mean, y_mean = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def save_figure(draw: Callable[[Any, list[Record]], None], records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, records)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=85))


def line(axes: Any, xs: list[float], values: list[list[float]], **style: Any) -> None:
    """Means with bars of a standard deviation."""
    means, bars = [statistics.fmean(v) for v in values], [spread(v) for v in values]
    axes.errorbar(xs, means, bars, capsize=2, linewidth=1.4, markersize=4, **style)


def powers_of_two(axis: Any, ticks: list[float]) -> None:
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# ------------------------------------------------------------------------------------------------------------ gradients


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


# --------------------------------------------------------------------------------------------------------- trajectories


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


# ---------------------------------------------------------------------------------------------------------- regulariser


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


# -------------------------------------------------------------------------------------------------------------- scaling

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
        f"{_if_within_the_spread(without, with_)}."
    )


# -------------------------------------------------------------------------------------------------------------- remarks


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


# ---------------------------------------------------------------------------------------------------------------- worst

MEASURES = {
    "accuracy": "average accuracy (%)",
    "worst_class": "accuracy of the worst class (%)",
    "p99": "99th percentile of the losses",
    "max": "largest loss",
}


def with_best_rate(records: list[Record]) -> dict[tuple[float, str], Record]:
    """By accuracy on held-out training images, for each share of noise and each loss."""
    best: dict[tuple[float, str], Record] = {}
    for record in records:
        key = record["noise"], record["loss"]
        if key not in best or statistics.fmean(record["held_out_accuracy"]) > statistics.fmean(best[key]["held_out_accuracy"]):
            best[key] = record
    return best


def _scaled(record: Record, measure: str) -> list[float]:
    return [100 * value for value in record[measure]] if measure in ("accuracy", "worst_class") else record[measure]


def draw_worst(figure: Any, records: list[Record]) -> None:
    figure.set_size_inches(10, 5.4)
    best, losses = with_best_rate(records), distinct(records, "loss")
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
        for noise, style, shift in ((0.0, "C0o-", -0.05), (0.1, "C3s--", 0.05)):
            values = [_scaled(best[noise, loss], measure) for loss in losses]
            line(axes, [x + shift for x in range(len(losses))], values, fmt=style, label=f"{100 * noise:.0f} % label noise")
        axes.set_xticks(range(len(losses)), losses)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend()


def _winner(mine: dict[str, Record], measure: str, best: Callable[..., str], tell: Callable[[list[float]], str]) -> str:
    name = best(mine, key=lambda loss: statistics.fmean(mine[loss][measure]))
    if name == "mean":
        return f"*mean* ({tell(mine[name][measure])})"
    within = _if_within_the_spread(mine[name][measure], mine["mean"][measure])
    return f"*{name}* ({tell(mine[name][measure])}; *mean* {tell(mine['mean'][measure])}{within})"


def tell_worst(records: list[Record]) -> list[str]:
    best = with_best_rate(records)
    sentences, rows = [], []
    for noise in distinct(records, "noise"):
        mine = {loss: record for (share, loss), record in best.items() if share == noise}
        told = [
            f"the smallest largest loss is that of {_winner(mine, 'max', min, plus_minus)}",
            f"the best worst class that of {_winner(mine, 'worst_class', max, percent)}",
            f"the best average accuracy that of {_winner(mine, 'accuracy', max, percent)}",
            f"*max* has {percent(mine['max']['accuracy'])} accuracy and {percent(mine['max']['worst_class'])} in its worst class",
        ]
        sentences.append(f"- With {100 * noise:.0f} % label noise " + "; ".join(told) + ".")
        for loss, record in mine.items():
            cells = [
                percent(record["accuracy"]),
                percent(record["worst_class"]),
                plus_minus(record["p99"]),
                plus_minus(record["max"]),
            ]
            rows.append([f"{100 * noise:.0f} %", loss, f"{record['rate']:g}", *cells])
    head = ["noise", "loss minimised", "rate", *MEASURES.values()]
    return [
        "\n".join(sentences),
        table(head, rows),
        "Measured on the test images, whose labels have no noise. Each loss has the rate, of four, with the best accuracy on "
        "training images held out (true labels); a small largest loss also comes from probabilities that are never sure.",
    ]


SECTIONS: dict[str, tuple[str, Callable[[Any, list[Record]], None], Callable[[list[Record]], list[str]]]] = {
    "gradients": ("1. The gradient of the sum is B times the mean's", draw_gradients, tell_gradients),
    "trajectories": ("2. Same steps at a rate divided by B", draw_trajectories, tell_trajectories),
    "regulariser": ("3. The regulariser does not know B", draw_regulariser, tell_regulariser),
    "scaling": ("4. The linear scaling rule", draw_scaling, tell_scaling),
    "remark1": ("4a. Goyal et al., remark 1: scaling the loss is not scaling the rate", draw_remark1, tell_remark1),
    "remark3": ("4b. Goyal et al., remark 3: normalise by the whole batch", draw_remark3, tell_remark3),
    "worst": ("5. The worst case", draw_worst, tell_worst),
}
