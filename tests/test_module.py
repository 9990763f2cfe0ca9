"""Points 19, 30, 36 and 40 of PyTorch's semantics: CrossEntropyLoss as a module, the same code on both classes."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor, nn
from typing_extensions import get_overloads

import fusedloss


class OurSubclass(fusedloss.CrossEntropyLoss):
    pass


class TorchSubclass(nn.CrossEntropyLoss):
    pass


@pytest.fixture(params=[nn.CrossEntropyLoss, fusedloss.CrossEntropyLoss], ids=["torch", "fusedloss"])
def module_class(request: pytest.FixtureRequest) -> type[nn.CrossEntropyLoss]:
    return request.param


def _problem() -> tuple[Tensor, Tensor]:
    return make_logits(6, 5), make_target(6, n_classes=5)


def _reloaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_19_repr(module_class: type[nn.CrossEntropyLoss]) -> None:
    assert repr(module_class(make_weight(5), label_smoothing=0.1)) == "CrossEntropyLoss()"


def test_repr_shows_the_extras_that_are_set() -> None:
    module = fusedloss.CrossEntropyLoss(reduction="topk", top_k=0.1, z_loss=1e-4, scale=torch.tensor(0.5))
    assert repr(module) == "CrossEntropyLoss(reduction='topk', scale=tensor(0.5000), top_k=0.1, z_loss=0.0001)"
    assert repr(fusedloss.CrossEntropyLoss(reduction="sum", scale=2.0, softcap=None)) == "CrossEntropyLoss(scale=2.0)"


@pytest.mark.parametrize("new", [fusedloss.CrossEntropyLoss, partial(fusedloss.LinearCrossEntropyLoss, 2, 5)])
def test_a_scale_that_is_a_tensor_follows_the_module(new: Callable[..., Any]) -> None:
    module = new(scale=torch.tensor(0.5))
    assert module.double().scale.dtype == torch.float64
    module.scale = 2.0  # and a number may take its place, which no buffer allows
    assert module.to(torch.float32).scale == 2.0
    module.scale = torch.tensor(0.25)  # and it the number's
    container = nn.Sequential(module).to("meta")
    assert container[0].scale.is_meta
    assert not any("scale" in name for name in container.state_dict())
    learned = new()
    del learned.scale
    learned.scale = nn.Parameter(torch.tensor(3.0))
    assert isinstance(learned.double().scale, nn.Parameter)
    assert learned.scale.dtype == torch.float64


def test_the_docstring_names_every_argument() -> None:
    import inspect

    for documented in (fusedloss.CrossEntropyLoss, fusedloss.cross_entropy):
        for name in inspect.signature(documented).parameters:
            assert re.search(rf"^ +{name}: ", documented.__doc__ or "", re.MULTILINE), name


def test_19_constants(module_class: type[nn.CrossEntropyLoss]) -> None:
    assert module_class.__constants__ == ["ignore_index", "reduction", "label_smoothing"]


def test_19_it_is_a_cross_entropy_loss(module_class: type[nn.CrossEntropyLoss]) -> None:
    assert isinstance(module_class(), nn.CrossEntropyLoss)


def test_19_second_positional_argument_is_size_average(module_class: type[nn.CrossEntropyLoss]) -> None:
    with pytest.warns(UserWarning, match="please use reduction='sum' instead"):
        module = module_class(None, False)
    assert module.reduction == "sum"


def test_19_all_positional_arguments(module_class: type[nn.CrossEntropyLoss]) -> None:
    weight = make_weight(5)
    module = module_class(weight, None, 3, None, "sum", 0.2)
    assert module.weight is weight
    assert (module.ignore_index, module.reduction, module.label_smoothing) == (3, "sum", 0.2)


def test_18_the_constructor_accepts_what_the_call_refuses(module_class: type[nn.CrossEntropyLoss]) -> None:
    for module, error in (
        (module_class(reduction="nonsense"), ValueError),
        (module_class(label_smoothing=1.5), RuntimeError),
        (module_class(make_weight(4)), RuntimeError),
    ):
        with pytest.raises(error):
            module(*_problem())


def test_36_attributes_are_read_at_the_call(module_class: type[nn.CrossEntropyLoss]) -> None:
    module, (logits, target) = module_class(), _problem()
    module.reduction, module.ignore_index, module.label_smoothing = "sum", int(target[0]), 0.2
    module.weight = make_weight(5)
    expected = nn.functional.cross_entropy(logits, target, make_weight(5), None, int(target[0]), None, "sum", 0.2)
    torch.testing.assert_close(module(logits, target), expected)


def test_40_the_weight_is_a_buffer(module_class: type[nn.CrossEntropyLoss]) -> None:
    weighted, plain = module_class(make_weight(5)), module_class()
    assert list(weighted.state_dict()) == ["weight"]
    assert dict(weighted.named_buffers())["weight"].equal(make_weight(5))
    assert list(plain.state_dict()) == []
    assert "weight" in plain._buffers
    assert weighted.double().weight.dtype == torch.float64
    assert weighted.to("meta").weight.is_meta


def test_40_state_dict(module_class: type[nn.CrossEntropyLoss]) -> None:
    weighted = module_class(make_weight(5))
    other = module_class(torch.ones(5))
    other.load_state_dict(weighted.state_dict())
    assert other.weight.equal(make_weight(5))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        module_class().load_state_dict(weighted.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        weighted.load_state_dict({})


def test_40_state_dicts_are_exchanged_with_torch() -> None:
    ours, theirs = fusedloss.CrossEntropyLoss(make_weight(5)), nn.CrossEntropyLoss(torch.ones(5))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.weight.equal(make_weight(5))
    ours.load_state_dict(nn.CrossEntropyLoss(torch.ones(5)).state_dict())
    assert ours.weight.equal(torch.ones(5))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _reloaded])
@pytest.mark.parametrize("cls", [nn.CrossEntropyLoss, fusedloss.CrossEntropyLoss, TorchSubclass, OurSubclass])
def test_30_40_copies(cls: type[nn.CrossEntropyLoss], again: Any) -> None:
    module = cls(make_weight(5), label_smoothing=0.1, ignore_index=2)
    twin = again(module)
    assert type(twin) is cls
    assert twin(*_problem()).item() == module(*_problem()).item()


def test_30_copies_keep_the_extras() -> None:
    module = fusedloss.CrossEntropyLoss(reduction="topk", top_k=2, scale=torch.tensor(0.5))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin.top_k, twin.scale.item()) == (2, 0.5)
        assert twin(*_problem()).item() == module(*_problem()).item()


def test_pickles_from_before_the_extras_load() -> None:
    module = fusedloss.CrossEntropyLoss()
    state = {name: value for name, value in module.__dict__.items() if name not in ("top_k", "scale")}
    old = fusedloss.CrossEntropyLoss.__new__(fusedloss.CrossEntropyLoss)
    old.__setstate__(state)
    assert old(*_problem()).item() == module(*_problem()).item()


def test_the_module_takes_every_argument_of_torchs() -> None:
    """A parameter that a newer PyTorch adds must not be missing here."""
    import inspect

    for ours, theirs in (
        (fusedloss.CrossEntropyLoss.__init__, nn.CrossEntropyLoss.__init__),
        (fusedloss.CrossEntropyLoss.forward, nn.CrossEntropyLoss.forward),
        (fusedloss.cross_entropy, nn.functional.cross_entropy),
    ):
        expected = list(inspect.signature(theirs).parameters.values())
        found = list(inspect.signature(ours).parameters.values())
        for mine, torchs in zip(found, expected, strict=False):
            assert (mine.name, mine.default, mine.kind) == (torchs.name, torchs.default, torchs.kind)
        # Of the function, which has no time for the `*`, the overloads: those that type checkers read.
        for signature in [inspect.signature(each) for each in get_overloads(ours)] or [inspect.signature(ours)]:
            extras = list(signature.parameters.values())[len(expected) :]
            assert all(extra.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD) for extra in extras)
            assert len(extras) > 0
    with pytest.raises(ValueError, match="top_k"):
        fusedloss.cross_entropy(*_problem(), None, None, -100, None, "mean", 0.0, 1)  # type: ignore[call-overload]


def test_attributes_are_read_at_every_call() -> None:
    module = fusedloss.CrossEntropyLoss()
    options: dict[str, Any] = {}
    for name, value in {"ignore_index": 1, "label_smoothing": 0.1, "z_loss": 0.2, "logit_scale": 2.0, "softcap": 3.0}.items():
        for _ in range(3):  # known by then
            module(*_problem())
        setattr(module, name, value)
        options[name] = value
        assert torch.equal(module(*_problem()), fusedloss.cross_entropy(*_problem(), **options))


def test_an_extra_may_be_a_property_of_a_subclass() -> None:
    class Annealed(fusedloss.CrossEntropyLoss):
        step = 0.1

        @property
        def z_loss(self) -> float:
            return self.step

        @z_loss.setter
        def z_loss(self, value: float) -> None:
            self.step = value

    module = Annealed(z_loss=0.3, softcap=5.0)
    for module.z_loss in (0.3, 0.1):
        expected = fusedloss.cross_entropy(*_problem(), z_loss=module.z_loss, softcap=5.0)
        assert torch.equal(module(*_problem()), expected)


def test_scale_at_the_call_replaces_the_constructors(any_path: Path) -> None:
    module = fusedloss.CrossEntropyLoss(scale=3.0)
    once = fusedloss.cross_entropy(*_problem()).item()
    assert module(*_problem()).item() == pytest.approx(3 * once, rel=1e-6)
    assert module(*_problem(), scale=0.5).item() == pytest.approx(0.5 * once, rel=1e-6)
    assert module(*_problem(), scale=torch.tensor(0.0)).item() == 0


def test_in_a_sequence_of_modules(module_class: type[nn.CrossEntropyLoss]) -> None:
    """Hooks, train/eval and zero_grad see a module like any other."""
    module, seen = module_class(), []
    module.register_forward_hook(lambda module, inputs, loss: seen.append(loss.item()))
    container = nn.ModuleDict({"loss": module}).eval()
    loss = container["loss"](*_problem())
    assert seen == [loss.item()]
    assert not module.training


class Tagged(Tensor):
    """A subclass that survives operations, as those of logging or unit libraries do."""

    calls: list[str] = []  # noqa: RUF012 (one list for the test to read)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "target", "weight"])
def test_40_torch_function(any_path: Path, which: str) -> None:
    logits, target = _problem()
    arguments = {"input": logits, "target": target, "weight": make_weight(5)}
    arguments[which] = arguments[which].as_subclass(Tagged)
    for call in (nn.functional.cross_entropy, fusedloss.cross_entropy):
        Tagged.calls.clear()
        loss = call(**arguments, label_smoothing=0.1)
        assert isinstance(loss, Tagged)
        assert Tagged.calls[0] == "cross_entropy"
        expected = nn.functional.cross_entropy(logits, target, make_weight(5), label_smoothing=0.1)
        torch.testing.assert_close(loss.as_subclass(Tensor), expected)


class Opaque:
    """Not a tensor, yet it answers: what lazy arrays and tracers do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, args, kwargs


def test_40_torch_function_may_answer_itself() -> None:
    logits, _ = _problem()
    func, args, kwargs = fusedloss.cross_entropy(logits, Opaque(), reduction="topk", top_k=2, scale=0.5)
    assert func is fusedloss.cross_entropy
    assert args[0] is logits
    assert (kwargs["reduction"], kwargs["top_k"], kwargs["scale"]) == ("topk", 2, 0.5)


def test_parameters_as_logits(any_path: Path) -> None:
    logits = nn.Parameter(make_logits(6, 5))
    fusedloss.CrossEntropyLoss()(logits, _problem()[1]).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


def test_inference_mode(path: Path) -> None:
    logits, target = _problem()
    with torch.inference_mode():
        loss = fusedloss.cross_entropy(logits.clone(), target)
    assert loss.is_inference()
    torch.testing.assert_close(loss.clone(), nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_enable_grad_inside_inference_mode(any_path: Path, reduction: str) -> None:
    """Makes no gradient, as the mode around it says."""
    logits, target = _problem()
    logits.requires_grad_()
    for _ in range(3):
        with torch.inference_mode(), torch.enable_grad():
            ours = fusedloss.cross_entropy(logits, target, reduction=reduction)
            layer = fusedloss.linear_cross_entropy(logits, torch.eye(logits.shape[1]), target, reduction=reduction)
            theirs = nn.functional.cross_entropy(logits, target, reduction=reduction)
        assert [(loss.requires_grad, loss.is_inference()) for loss in (ours, layer, theirs)] == [(False, True)] * 3
        torch.testing.assert_close((ours.clone(), layer.clone()), (theirs.clone(),) * 2)


def test_no_gradient_is_asked_of_detached_logits(path: Path) -> None:
    logits, target = _problem()
    assert not fusedloss.cross_entropy(logits, target).requires_grad
    logits.requires_grad_()
    assert fusedloss.cross_entropy(logits, target).requires_grad
    with torch.no_grad():
        assert not fusedloss.cross_entropy(logits, target).requires_grad


def test_probabilities_through_the_module(module_class: type[nn.CrossEntropyLoss]) -> None:
    logits, target = make_logits(6, 5), make_probabilities(6, 5)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module_class()(logits, target), expected)
