"""What all sections of the report need: choosing records, and their mean and spread in words and plots."""

import json
import math
import statistics
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def one_record_a_line(measured: Record) -> str:
    """JSON that git and people can compare."""
    head = json.dumps({key: value for key, value in measured.items() if key != "records"}, indent=1)
    records = ",\n".join(json.dumps(record) for record in measured["records"])
    return f'{head[:-2]},\n "records": [\n{records}\n]}}\n'


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


def if_within_the_spread(a: list[float], b: list[float]) -> str:
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    return ", a difference within the spread" if difference < math.hypot(spread(a), spread(b)) else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line."""
    x_mean, y_mean = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def line(axes: Any, xs: list[float], values: list[list[float]], **style: Any) -> None:
    """Means with bars of a standard deviation."""
    means, bars = [statistics.fmean(v) for v in values], [spread(v) for v in values]
    axes.errorbar(xs, means, bars, capsize=2, linewidth=1.4, markersize=4, **style)


def powers_of_two(axis: Any, ticks: list[float]) -> None:
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
