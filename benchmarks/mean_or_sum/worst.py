"""Plot and sentences on the worst case: claim 5."""

import statistics
from collections.abc import Callable
from typing import Any

from mean_or_sum.records import Record, distinct, if_within_the_spread, line, percent, plus_minus, table

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
    within = if_within_the_spread(mine[name][measure], mine["mean"][measure])
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
