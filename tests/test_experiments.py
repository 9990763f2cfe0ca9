"""benchmarks/experiments.py: a miniature of every experiment, and sentences that say what the numbers say."""

import json
import re
from pathlib import Path

import pytest
import torch
from mean_or_sum import decay, report, task, worst

for _module in ("torchvision", "sklearn", "matplotlib"):
    pytest.importorskip(_module, reason="the experiments need fusedloss[train]")

import experiments  # noqa: E402

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    assert experiments.main(["--quick", "--seeds", "2", "--out", str(out)]) == 0
    return out


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def test_every_experiment_has_numbers_a_plot_sentences_and_its_command(quick):
    text = (quick / "EXPERIMENTS.md").read_text()
    assert list(experiments.EXPERIMENTS) == list(report.SECTIONS)
    for name, (title, _, _) in report.SECTIONS.items():
        assert results(quick, name)["records"]
        assert (quick / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        section = text[text.index(f"## {title}") :].split("\n## ")[0]
        command = f'make experiments ARGS="--only {name} --seeds 2 --quick"'
        assert section.index(f"![{title}](results/{name}.png)") < section.index(command)
    assert "which show nothing" in text
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_the_printed_command_repeats_the_numbers(quick, tmp_path):
    for name in ("regulariser", "trajectories"):
        assert experiments.main(["--only", name, "--seeds", "2", "--quick", "--out", str(tmp_path)]) == 0
        assert results(tmp_path, name)["records"] == results(quick, name)["records"]
    text = (tmp_path / "EXPERIMENTS.md").read_text()
    assert "## 3." in text
    assert "## 5." not in text  # not measured, not reported


def test_what_eight_steps_do_show(quick):
    """Claims 1, 2 and 4 are exact: they need no training to an end."""
    for record in results(quick, "gradients")["records"]:
        assert record["ratio"] == pytest.approx(record["batch"], rel=1e-6)
    for record in results(quick, "trajectories")["records"]:
        if record["optimizer"].startswith("SGD") and record["sum_rate"] == "l/B":
            assert record["ulps"][-1] <= (0 if record["batch"] == 64 else 100)
            assert record["moved"] > 1e5
    last = {
        (record["optimizer"], record["sum_rate"]): record["ulps"][-1] / record["moved"]
        for record in results(quick, "trajectories")["records"]
    }
    assert last["Adam", "l"] < 0.1 < last["Adam", "l/B"]
    scaling = {
        (record["k"], record["warm_up"], record["policy"]): record["accuracy"] for record in results(quick, "scaling")["records"]
    }
    for (k, warm_up, policy), accuracies in scaling.items():
        if policy == "rate x k":
            assert accuracies == scaling[k, warm_up, "sum, rate fixed"]
    for record in results(quick, "remark3")["records"]:
        wrong = record["k"] > 1 and record["variant"] != "sum / global count"
        assert (record["error"] > 0.1) if wrong else (record["error"] < 1e-5)
    for record in results(quick, "remark1")["records"]:
        wrong = record["k"] > 1 and record["variant"] == "loss x k"
        assert (record["distance"] > 1e-3) if wrong else (record["distance"] < 1e-4)


@pytest.mark.parametrize(("exponent", "verdict"), [(0, "stays put"), (1, "moves as B"), (0.5, "moves, though not as B")])
def test_the_sentence_on_weight_decay_follows_the_numbers(exponent, verdict):
    records = [
        {
            "optimizer": "SGD",
            "reduction": reduction,
            "batch": batch,
            "weight_decay": 2.0**n,
            "accuracy": [1 - abs(n - exponent * i) / 10] * 2,
        }
        for reduction in ("mean", "sum")
        for i, batch in enumerate([1, 2, 4])
        for n in range(-1, 4)
    ]
    if exponent != 0.5:  # between two decays of the grid there is no single best one
        assert decay.best_decay(records[:15]) == {1: 1.0, 2: 2.0**exponent, 4: 4.0**exponent}
    told = decay.tell_regulariser(records)[0]
    assert f"the best weight decay {verdict}: it goes as B^({exponent:.2f} ± 0.00)" in told


def test_the_sentence_on_the_worst_case_names_the_winner():
    names = list(experiments.WORST_LOSSES)
    records = [
        {
            "noise": noise,
            "loss": name,
            "rate": rate,
            "held_out_accuracy": [rate, rate],
            "accuracy": [0.9 - i / 100] * 2,
            "worst_class": [0.5 + i / 100] * 2,
            "p99": [3.0] * 2,
            "max": [9.0 - i * (1 - 20 * noise)] * 2,
        }
        for noise in (0.0, 0.1)
        for i, name in enumerate(names)
        for rate in (0.1, 0.2)
    ]
    told = worst.tell_worst(records)
    assert "With 0 % label noise the smallest largest loss is that of *max* (5.00 ± 0.00; *mean* 9.00 ± 0.00)" in told[0]
    assert "With 10 % label noise the smallest largest loss is that of *mean* (9.00 ± 0.00)" in told[0]
    assert "best average accuracy that of *mean* (90.0 ± 0.0 %" in told[0]
    assert "| 0.1 |" not in told[1]  # the rate with the lower accuracy on held-out images


def test_ulps():
    ours, theirs = torch.tensor([1.5, 1e-30]), torch.tensor([1.5 + 2**-22, 2e-30])
    assert task.largest_in_ulps([ours], [theirs]) == 2
    assert task.largest_in_ulps([ours], [torch.tensor([torch.nan, 0])]) == torch.inf


def test_same_stream_of_images_for_every_batch_size():
    labels = torch.arange(10)
    problem = task.Task(labels[:, None], labels, labels[:, None], labels, torch.nn.Identity, 0.1, 0.1, 2, 1)
    small = torch.cat([labels for _, labels in task.batches(problem, 0, 3, 8)])
    large = torch.cat([labels for _, labels in task.batches(problem, 0, 12, 2)])
    assert torch.equal(small, large)
    assert sorted(small[:10].tolist()) == sorted(small[10:20].tolist()) == list(range(10))


def test_the_tutorials_network_takes_part():
    problem = task.make_task("digits", "tutorial", Path("unused"), torch.device("cpu"))
    model = task.fit(problem, 0, 4, 2, task.sgd(problem.rate), task.cross_entropy())
    losses, correct = task.test_losses(model, problem)
    assert losses.shape == correct.shape == (360,)
    start = task.flat(task.network(problem, 0).parameters())
    assert not torch.equal(task.flat(model.parameters()), start)


@pytest.mark.parametrize("options", ["--data cifar10", "--seeds 1", "--only nothing"])
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        experiments.main(options.split())
    assert "experiments.py: error:" in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path, capsys):
    assert experiments.main(["--report", "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_the_committed_report_is_that_of_the_committed_numbers(tmp_path, monkeypatch):
    """Nothing typed in, nothing stale."""
    monkeypatch.setattr(report, "save_figure", lambda *arguments: None)
    (tmp_path / "results").mkdir()
    for path in (BENCHMARKS / "results").glob("*.json"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    report.write(tmp_path)
    assert (tmp_path / "EXPERIMENTS.md").read_text() == (BENCHMARKS / "EXPERIMENTS.md").read_text()
