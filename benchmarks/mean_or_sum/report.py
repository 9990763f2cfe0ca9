"""Writes EXPERIMENTS.md of the files in results/: no number and no verdict here that is not computed from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.failure import Failure
from training.files import write_atomically

from mean_or_sum.decay import draw_regulariser, draw_remark1, draw_remark3, tell_regulariser, tell_remark1, tell_remark3
from mean_or_sum.records import Record
from mean_or_sum.steps import draw_gradients, draw_scaling, draw_trajectories, tell_gradients, tell_scaling, tell_trajectories
from mean_or_sum.worst import draw_worst, tell_worst


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


def save_figure(draw: Callable[[Any, list[Record]], None], records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, records)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=85))


SECTIONS: dict[str, tuple[str, Callable[[Any, list[Record]], None], Callable[[list[Record]], list[str]]]] = {
    "gradients": ("1. The gradient of the sum is B times the mean's", draw_gradients, tell_gradients),
    "trajectories": ("2. Same steps at a rate divided by B", draw_trajectories, tell_trajectories),
    "regulariser": ("3. The regulariser does not know B", draw_regulariser, tell_regulariser),
    "scaling": ("4. The linear scaling rule", draw_scaling, tell_scaling),
    "remark1": ("4a. Goyal et al., remark 1: scaling the loss is not scaling the rate", draw_remark1, tell_remark1),
    "remark3": ("4b. Goyal et al., remark 3: normalise by the whole batch", draw_remark3, tell_remark3),
    "worst": ("5. The worst case", draw_worst, tell_worst),
}
