"""The training script's losses and steps: what they claim to be, and what a run leaves behind."""

import contextlib
import math
import re
from pathlib import Path

import pytest
import torch
from paths import no_waits
from torch.utils._python_dispatch import TorchDispatchMode
from training import files
from training_runs import CPU, MODELS, TINY, checkpoint, config, main, run, train


@pytest.mark.parametrize(
    "reduction", ["mean", "sum", "max", "topk --top-k 3", "topk --top-k 0.5", "mean --accumulate 4 --scale 2", "mean --amp"]
)
def test_fused_and_torch_losses_train_alike(reduction, tmp_path):
    """On the network without batch normalisation, which turns an ulp into a different run where a batch is this small."""
    for loss in ("fused", "torch"):
        options = ["--model", "tutorial", "--limit", "32", "--label-smoothing", "0.1", "--reduction", *reduction.split()]
        assert run(*options, "--epochs", 1, "--loss", loss, "--out", tmp_path / loss) == 0
    fused, torch_ = checkpoint(tmp_path / "fused"), checkpoint(tmp_path / "torch")
    tolerance = 1e-2 if "--amp" in reduction else 1e-4
    torch.testing.assert_close(fused["losses"], torch_["losses"], rtol=tolerance, atol=0)
    torch.testing.assert_close(fused["model"], torch_["model"], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("model", MODELS)
def test_sum_with_the_default_rate_makes_the_steps_of_the_mean(model, tmp_path):
    for reduction in ("mean", "sum"):
        options = ["--epochs", "1", "--limit", "32", "--reduction", reduction]
        assert run(*MODELS[model], *options, "--out", tmp_path / reduction) == 0
    mean, sum_ = checkpoint(tmp_path / "mean"), checkpoint(tmp_path / "sum")
    torch.testing.assert_close(sum_["losses"][:, 0], 16 * mean["losses"][:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(sum_["model"], mean["model"], rtol=1e-4, atol=1e-5)


def test_tutorial_loss_is_the_mean_cross_entropy_plus_l2_of_the_dense_layers():
    options = config("--model", "tutorial", "--batch-size", "16", "--limit", "64")
    run_ = train.start_run(options, CPU, total_steps=2)
    model = run_.model
    with torch.no_grad():
        model.dense1.weight.fill_(0.1)
        model.dense2.weight.fill_(0.2)
        model.classifier[-1].weight.zero_()
    images, labels = torch.randn(16, 3, 24, 24), torch.arange(16) % 10
    train.train_step(run_, options, model, images, labels)
    weight_loss = 0.004 * 0.5 * (0.1**2 * 2304 * 384 + 0.2**2 * 384 * 192)
    expected = torch.tensor([math.log(10), weight_loss, math.log(10) + weight_loss])  # all logits are 0
    torch.testing.assert_close(run_.losses[0], expected.repeat(2), rtol=1e-5, atol=0)  # the averages start with the values
    # Behind an output layer of zeros only the L2 term has a gradient: w - l * 0.004 * w, and none on the convolutions.
    torch.testing.assert_close(model.dense1.weight, torch.full((384, 2304), 0.1 * (1 - 0.1 * 0.004)), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.features[0].weight, train.build_model(options).features[0].weight, rtol=0, atol=0)


def test_tutorial_network_has_tensorflows_shapes():
    model = train.TutorialNet()
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    assert shapes == {(64, 3, 5, 5), (64, 64, 5, 5), (384, 2304), (192, 384), (10, 192)}
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 10)


def test_learning_rates():
    resnet, tutorial = config("--lr", "0.5", "--epochs", "10"), config("--model", "tutorial")
    rates = [train.learning_rate(resnet, step, 20) for step in range(200)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.5, rel=0.02)
    assert 38 <= rates.index(max(rates)) <= 41
    assert [train.learning_rate(tutorial, step, 20) for step in (0, 6999, 7000)] == pytest.approx([0.1, 0.1, 0.01])


def test_weight_average_follows_tensorflows_num_updates():
    averaged, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    averaged.weight.data.fill_(1.0)
    model.weight.data.fill_(2.0)
    train.update_average(averaged, model, 0.9)
    assert averaged.weight.item() == pytest.approx(1.1)


class _NoHostSync(TorchDispatchMode):
    """Raises where a value or a data-dependent shape is asked of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("model", MODELS)
def test_no_step_asks_the_device_for_a_value(model, reduction):
    # The fused loss on a CPU may look at its targets, as torch's does; on a GPU it is tested below.
    options = config("--loss", "torch", *MODELS[model], "--reduction", reduction, "--batch-size", "16")
    data = train.load_data("digits", Path("unused"), 64)
    run_ = train.start_run(options, CPU, total_steps=2)
    with _NoHostSync():
        for step in range(2):
            images = train.augment(data.train_images[:16], data, options.model, train.seeded(0, "augment", step, CPU))
            train.train_step(run_, options, run_.model, images, data.train_labels[:16])
    assert run_.step == 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_steps_are_the_big_batchs(reduction, tmp_path):
    """On the network without batch normalisation, whose statistics are those of a part."""
    for parts in ("1", "4"):
        options = ["--model", "tutorial", "--epochs", "1", "--limit", "32", "--reduction", reduction, "--accumulate", parts]
        assert run(*options, "--out", tmp_path / parts) == 0
    big, accumulated = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "4")
    torch.testing.assert_close(accumulated["losses"], big["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(accumulated["model"], big["model"], rtol=1e-4, atol=1e-5)
    assert accumulated["history"][-1]["train_accuracy"] == big["history"][-1]["train_accuracy"]


def test_curves_scalars_and_table(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train.main([*TINY, "--model", "tutorial", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^loss \(train: mean\) +\d+\.\d{4} +\d+\.\d{4}$", out, re.M)
    assert re.search(r"^accuracy +\d+\.\d\d% +\d+\.\d\d%$", out, re.M)
    assert re.search(r"^time per step +\d+\.\d\d ms$", out, re.M)
    assert re.search(r"^of it in the loss +\d+\.\d{3} ms +\d+\.\d\d%", out, re.M)
    assert re.search(r"^with --loss torch +\d+\.\d{3} ms +\d+\.\d\d%", out, re.M)
    assert (tmp_path / files.CURVES).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / files.TENSORBOARD)).Reload()
    names = [f"step/{name}{kind}" for name in ("cross_entropy", "weight_loss", "total_loss") for kind in ("", "_average")]
    assert set(names) <= set(events.Tags()["scalars"])
    values = {name: [event.value for event in events.Scalars(name)] for name in names}
    assert len(values["step/total_loss"]) == 8
    parts = zip(values["step/cross_entropy"], values["step/weight_loss"], strict=True)
    assert values["step/total_loss"] == pytest.approx([a + b for a, b in parts], rel=1e-6)
    for name in ("cross_entropy", "weight_loss", "total_loss"):  # ExponentialMovingAverage(0.9), from the first value on
        expected, average = [], values[f"step/{name}"][0]
        for value in values[f"step/{name}"]:
            average = 0.9 * average + 0.1 * value
            expected.append(average)
        assert values[f"step/{name}_average"] == pytest.approx(expected, rel=1e-5)


def test_digits_are_learnt(tmp_path):
    """Two epochs at an eighth of the default's cost do not make a good classifier, but a learning one."""
    options = ["--data", "digits", "--device", "cpu", "--width", "8", "--epochs", "3", "--batch-size", "32"]
    assert main(*options, "--out", tmp_path) == 0
    assert checkpoint(tmp_path)["history"][-1]["test_accuracy"] > 0.95


def test_compiled_network_trains(tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))  # the tracing, without a C++ compiler
    assert run("--width", 2, "--epochs", 1, "--compile", "--out", tmp_path) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", ["", "--amp", "--amp fp16", "--accumulate 4", "--reduction topk --top-k 0.5", "--model tutorial"]
)
def test_no_step_waits_for_the_gpu(options, tmp_path, monkeypatch):
    step, augment = train.train_step, train.augment
    waits = contextlib.ExitStack()

    def strict_augment(*arguments):
        if steps:  # the first step loads libraries and compiles kernels
            waits.enter_context(no_waits())
        return augment(*arguments)

    def strict_step(*arguments):
        with waits:
            step(*arguments)
        steps.append(1)

    steps = []
    monkeypatch.setattr(train, "augment", strict_augment)
    monkeypatch.setattr(train, "train_step", strict_step)
    assert run("--device", "cuda", *options.split(), "--out", tmp_path) == 0
    assert len(steps) == 8
