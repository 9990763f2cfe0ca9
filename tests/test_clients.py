"""Programs that know PyTorch only, trained with patch_torch(): every step's loss is PyTorch's. `make test-clients` installs them.

Models are built from a configuration with random weights; nothing is downloaded.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import make_logits, make_target
from torch import Tensor, nn

import fusedloss
from fusedloss import serving

Train = Callable[[], list[float]]  # seeds everything itself; returns the loss of every step


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The logits' shapes of what reached fusedloss."""
    seen: list[tuple[int, ...]] = []
    compute, function = serving.compute, serving.KnownCrossEntropyFunction

    def recording(inputs: Any, options: Any, route: Any) -> Any:
        seen.append(tuple(inputs.logits.shape))
        return compute(inputs, options, route)

    def recording_known(logits: Tensor, *arguments: Any) -> Any:
        seen.append(tuple(logits.shape))
        return function.apply(logits, *arguments)

    monkeypatch.setattr(serving, "compute", recording)
    monkeypatch.setattr(serving, "KnownCrossEntropyFunction", SimpleNamespace(apply=recording_known))
    return seen


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Two trainings differ by the loss alone, or by nothing."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def _assert_trains_alike(train: Train, n_steps: int, rel: float = 1e-4) -> None:
    theirs = train()
    with fusedloss.patch_torch():
        ours = train()
    assert len(theirs) == n_steps
    assert ours == pytest.approx(theirs, rel=rel)
    assert theirs[-1] != pytest.approx(theirs[0], rel=10 * rel), "the weights did not move: nothing was compared"


def _steps(model: nn.Module, loss_of_step: Callable[[], Tensor], n_steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = loss_of_step()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_torchvision_segmentation(calls: list[tuple[int, ...]]) -> None:
    """(N, C, H, W), as torchvision's reference script has it: the main head and half of the auxiliary one, 255 is ignored."""
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    images, masks = make_logits(2, 3, 33, 33), make_target(2, 33, 33, n_classes=21, ignored=255)

    def train() -> list[float]:
        torch.manual_seed(0)
        model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
        model.train()

        def loss() -> Tensor:
            out = model(images)["out"]
            return nn.functional.cross_entropy(out, masks, ignore_index=255)

        return _steps(model, loss, n_steps=3, lr=0.01)

    _assert_trains_alike(train, n_steps=3, rel=1e-3)  # batch normalisation over 2 images multiplies every rounding
    assert calls == [(2, 21, 33, 33)] * 3


def test_timm_mixup_and_smoothing(calls: list[tuple[int, ...]]) -> None:
    """timm's SoftTargetCrossEntropy and LabelSmoothingCrossEntropy are written with log_softmax, out of reach of any patch: its
    train script meets F.cross_entropy only without MixUp and smoothing, and in validation. Here nn.CrossEntropyLoss takes their
    places; it has the same values."""
    timm = pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.data.mixup import mixup_target
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    images, target = make_logits(8, 3, 32, 32), make_target(8, n_classes=10)
    mixed: list[tuple[Tensor, Tensor]] = []

    def train(mixup: bool) -> list[float]:
        import numpy

        torch.manual_seed(0)
        numpy.random.seed(0)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, img_size=32, depth=2)
        mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10) if mixup else None
        criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else 0.1)

        def loss() -> Tensor:
            x, y = mix(images.clone(), target) if mix is not None else (images, target)
            logits = model(x)
            mixed.append((logits.detach(), y))
            return criterion(logits, y)

        return _steps(model, loss, n_steps=3, lr=0.01)

    for mixup in (True, False):
        _assert_trains_alike(lambda mixup=mixup: train(mixup), n_steps=3)
    assert calls == [(8, 10)] * 6
    logits, soft = mixed[0]
    torch.testing.assert_close(fusedloss.cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    soft = mixup_target(target, 10, lam=0.3, smoothing=0.1)  # our two labels never build it
    two_labels = fusedloss.cross_entropy(logits, (target, target.flip(0), 0.3), label_smoothing=0.1)
    torch.testing.assert_close(two_labels, SoftTargetCrossEntropy()(logits, soft))
    smoothed = fusedloss.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, LabelSmoothingCrossEntropy(0.1)(logits, target))


@pytest.mark.filterwarnings("default")  # what these libraries deprecate is their affair
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_trainer_with_accumulation(calls: list[tuple[int, ...]], tmp_path: Any, name: str) -> None:
    """A causal language model by Trainer, micro-batches of unequal length: the sum over all of them, divided by their number of
    tokens, and the loss logged at every step."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    configs = {
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=997,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=997, n_embd=32, n_layer=2, n_head=2, n_positions=32),
    }
    tokens = torch.randint(997, (24, 17), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    for row, ids in enumerate(labels):
        ids[3 + row % 13 :] = -100  # unequal numbers of counted tokens
    data = [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(tokens, labels, strict=True)]

    def train() -> list[float]:
        transformers.set_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = transformers.AutoModelForCausalLM.from_config(configs[name]())
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    _assert_trains_alike(train, n_steps=8, rel=1e-3)  # Trainer rounds what it logs
    assert len(calls) == 24
    assert {shape[-1] for shape in calls} == {997}


@pytest.mark.filterwarnings("default")
def test_the_head_of_a_transformers_model_fused_with_its_loss() -> None:
    """Two lines in place of model(tokens, labels=labels).loss: no logits are stored, and every gradient is that of the model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=997, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0)
    config.attn_pdrop = 0
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(997, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :4] = -100
    expected = model(tokens, labels=labels).loss
    hidden = model.transformer(tokens).last_hidden_state
    loss = fusedloss.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:], chunk_rows=16)
    torch.testing.assert_close(loss, expected)
    parameters = tuple(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.filterwarnings("default")
def test_lightning(calls: list[tuple[int, ...]], tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")
    features, target = make_logits(32, 16), make_target(32, n_classes=10, ignored=-100)

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train() -> list[float]:
        torch.manual_seed(0)
        model = Classifier()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, target), batch_size=8)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            default_root_dir=str(tmp_path),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader)
        return model.losses

    _assert_trains_alike(train, n_steps=8)
    assert calls == [(8, 10)] * 8
