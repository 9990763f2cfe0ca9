"""What surrounds linear_cross_entropy: autograd, compilers, autocast, ranks, PyTorch's own function and module, bad input."""

import copy
import pickle
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_problems import gradients, make_labels, make_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss.backends import cpu

HAS_TORCHS = hasattr(F, "linear_cross_entropy")
needs_torchs = pytest.mark.skipif(not HAS_TORCHS, reason="linear_cross_entropy came with PyTorch 2.13")
REDUCTIONS: list[dict[str, Any]] = [{}, {"reduction": "none"}, {"reduction": "topk", "top_k": 3}]


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_a_second_backward_has_the_same_bits(options: dict[str, Any]) -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    loss = fusedloss.linear_cross_entropy(
        layer.input, layer.weight, target, linear_bias=layer.bias, chunk_rows=4, **options
    ).sum()
    first = torch.autograd.grad(3 * loss, layer.parts(), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # it belongs to the caller
    second = torch.autograd.grad(3 * loss, layer.parts())
    for found, expected in zip(second, kept, strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, layer.parts())


def test_a_layer_changed_before_the_backward_is_noticed() -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# make_dual() itself makes PyTorch script its decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_derivatives_of_any_order(options: dict[str, Any]) -> None:
    layer, target = make_layer(5, n_features=2, n_classes=4, dtype=torch.float64).leaves(), make_labels(5, 4)

    def loss(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fusedloss.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=2, **options)

    torch.autograd.gradcheck(loss, tuple(layer), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(loss, tuple(layer))


def test_torch_func() -> None:
    layer, target = make_layer(5), make_labels(5)

    def ours(weight: Tensor) -> Tensor:
        return fusedloss.linear_cross_entropy(layer.input, weight, target)

    def theirs(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(layer.input, weight), target)

    torch.testing.assert_close(torch.func.grad(ours)(layer.weight), torch.func.grad(theirs)(layer.weight))
    weights = torch.stack([layer.weight, 2 * layer.weight])
    torch.testing.assert_close(torch.func.vmap(ours)(weights), torch.func.vmap(theirs)(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    with torch.autocast("cpu", dtype=dtype):
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, chunk_rows=4)
        expected = F.cross_entropy(F.linear(*layer), target)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for found, exact in zip(gradients(loss, layer), gradients(expected, layer), strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_checkpoint(options: dict[str, Any]) -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return fusedloss.linear_cross_entropy(input, weight, target, chunk_rows=4, **options).sum()

    plain = torch.autograd.grad(loss(layer.input, layer.weight), (layer.input, layer.weight))
    again = torch.autograd.grad(checkpoint(loss, layer.input, layer.weight, use_reentrant=False), (layer.input, layer.weight))
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"reduction": "topk", "top_k": 3, "return_stats": True}], ids=str)
def test_compiles_as_one_graph(options: dict[str, Any]) -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)

    def step(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        loss = fusedloss.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=4, **options)
        return loss if isinstance(loss, Tensor) else loss[0]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = step(*layer), compiled(*layer)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, layer), gradients(expected, layer))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*layer), expected.detach())


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_a_compiled_call_keeps_no_memory_between_calls(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """CUDA graph trees own what is allocated while a graph runs, and find what is still alive behind it."""
    keeps = set()

    def spied(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            bound = signature(function).bind(*arguments)
            bound.apply_defaults()
            keeps.add(bound.arguments["keeps_workspace"])
            return function(*arguments)

        return call

    monkeypatch.setattr(cpu, "forward", spied(cpu.forward))
    monkeypatch.setattr(cpu, "forward_overwriting", spied(cpu.forward_overwriting))
    layer, target = make_layer(9).leaves(), make_labels(9)

    def step(input: Tensor, weight: Tensor) -> Tensor:
        return fusedloss.linear_cross_entropy(input, weight, target, **options).sum()

    torch.compiler.reset()
    for call, kept in ((step, {True}), (torch.compile(step, fullgraph=True, backend="aot_eager"), {False})):
        keeps.clear()
        torch.autograd.grad(call(layer.input, layer.weight), (layer.input, layer.weight))
        assert keeps == kept


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_another_scale_in_each_step_is_no_other_graph(options: dict[str, Any]) -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    compilations: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(len(inputs))
        return graph

    def step(scale: float, share: float) -> Tensor:
        labels = (target, target.roll(1), share)
        return fusedloss.linear_cross_entropy(layer.input, layer.weight, labels, scale=scale, chunk_rows=4, **options)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for i in range(6):
        expected, found = step(0.5 + i, 0.1 * i + 0.2), compiled(0.5 + i, 0.1 * i + 0.2)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), (layer.input, layer.weight)) for loss in (found, expected)))
    assert len(compilations) <= 2  # with numbers that are constants, then with others


def test_export_has_pytorchs_operators_only() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = fusedloss.LinearCrossEntropyLoss(8, 11)

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target)

    head, layer, target = Head(), make_layer(9), make_labels(9)
    program = torch.export.export(head, (layer.input, target))
    assert not [node for node in program.graph.nodes if "fusedloss" in str(node.target)]
    torch.testing.assert_close(program.module()(layer.input, target), head(layer.input, target))


def test_fake_tensors() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        layer, target = make_layer(9).leaves(), torch.zeros(9, dtype=torch.int64)
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias)
        assert loss.shape == ()
        assert [gradient.shape for gradient in gradients(loss, layer)] == [part.shape for part in layer.parts()]
        with torch.no_grad():
            assert fusedloss.linear_cross_entropy(layer.input, layer.weight, target, reduction="none").shape == (9,)


@needs_torchs
def test_pytorchs_options() -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    for options in (
        nn.LinearCrossEntropyOptions(),
        nn.LinearCrossEntropyOptions(batch_chunk_size=4, acc_policy="accurate"),
        nn.LinearCrossEntropyOptions(acc_dtype=torch.float32),
    ):
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, options=options)
        expected = F.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, layer), gradients(expected, layer))


@needs_torchs
def test_patch_torch_reaches_pytorchs_function_and_module() -> None:
    theirs, target = F.linear_cross_entropy, make_labels(9)
    torch.manual_seed(0)
    module, input = nn.LinearCrossEntropyLoss(8, 11), make_layer(9).input
    expected = module(input, target)
    with fusedloss.patch_torch():
        assert F.linear_cross_entropy is not theirs
        assert F.linear_cross_entropy.__module__ == theirs.__module__
        loss = module(input, target)
        assert type(loss.grad_fn).__name__ == "SummedLossBackward"
        torch.testing.assert_close(loss, expected)
    assert F.linear_cross_entropy is theirs
    assert module(input, target) == expected


@needs_torchs
@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": True},
        {"out_features": (2, 3), "reduction": "none"},
        {"weight": "classes", "label_smoothing": 0.1, "ignore_index": 4, "dtype": torch.float64},
    ],
    ids=str,
)
def test_the_module_is_pytorchs(arguments: dict[str, Any]) -> None:
    if arguments.get("weight") == "classes":
        arguments = {**arguments, "weight": torch.arange(11, dtype=torch.float64)}
    theirs, ours = nn.LinearCrossEntropyLoss(8, 11, **arguments), fusedloss.LinearCrossEntropyLoss(8, 11, **arguments)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    input = make_layer(9, dtype=arguments.get("dtype", torch.float32)).input
    target = torch.arange(9 * 6).reshape(9, 2, 3) % 11 if "out_features" in arguments else torch.arange(9) % 11
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(input, target), theirs(input, target))


def test_the_modules_extras() -> None:
    module = fusedloss.LinearCrossEntropyLoss(8, 11, reduction="topk", top_k=2, z_loss=0.1, chunk_rows=4)
    assert "options=None, top_k=2, z_loss=0.1, chunk_rows=4" in repr(module)
    layer, target, rows = make_layer(9), make_labels(9), torch.linspace(0, 1, 9)
    loss = module(layer.input, target, scale=3.0, sample_weight=rows)
    logits = F.linear(layer.input, module.linear.weight)
    expected = fusedloss.cross_entropy(logits, target, reduction="topk", top_k=2, z_loss=0.1, scale=3.0, sample_weight=rows)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(RuntimeError, match=r"expected weight shape to be \(11,\), got \(3,\)"):
        fusedloss.LinearCrossEntropyLoss(8, 11, weight=torch.ones(3))
    with pytest.raises(RuntimeError, match=r"got 1\.5"):
        fusedloss.LinearCrossEntropyLoss(8, 11, label_smoothing=1.5)


@needs_torchs
@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "linear_bias", "weight", "probabilities"])
@pytest.mark.filterwarnings("ignore:.*(in beta state|is in prototype stage|quantized tensor creation functions):UserWarning")
def test_tensors_without_strides_are_pytorchs(name: str) -> None:
    arguments: dict[str, Any] = {"input": torch.randn(4, 5), "linear_weight": torch.randn(3, 5), "target": torch.arange(4) % 3}
    values = {"linear_bias": torch.randn(3), "weight": torch.ones(3), "probabilities": torch.rand(4, 3).softmax(1), **arguments}
    value, name = values[name], name.replace("probabilities", "target")
    forms = [value.to_sparse(), torch.nested.nested_tensor([value])]
    if value.is_floating_point():
        forms += [value.to_mkldnn(), torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)]
    if value.dim() == 2:
        forms += [value.to_sparse_csr(), value.to_sparse_csc()]
    for form in forms:
        results: list[Any] = []
        for function in (F.linear_cross_entropy, fusedloss.linear_cross_entropy):
            try:
                results.append(function(**{**arguments, name: form}))
            except Exception as error:
                results.append(type(error))
        if isinstance(results[0], Tensor):
            torch.testing.assert_close(results[1], results[0])
        else:
            assert results[1] is results[0], form.layout


INDICES = torch.zeros(4, dtype=torch.int64)
BAD: list[tuple[Any, Any, Any, dict[str, Any]]] = [
    (torch.ones(()), torch.ones(3, 5), INDICES, {}),
    (torch.ones(4, 6), torch.ones(3, 5), INDICES, {}),
    (torch.ones(4, 5), torch.ones(5), INDICES, {}),
    (torch.ones(4, 5), torch.ones(0), INDICES, {}),
    (torch.ones(5), torch.ones(3, 2, 5), torch.zeros(2, dtype=torch.int64), {}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES, {"linear_bias": torch.ones(4)}),
    (torch.ones(4, 5), torch.ones(3, 5), torch.ones(4, 3), {"ignore_index": 1}),
    (torch.ones(4, 5), torch.ones(3, 5, dtype=torch.float64), INDICES, {}),
    (torch.ones(4, 5), torch.ones(3, 5), torch.zeros(3, dtype=torch.int64), {}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES + 3, {}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES.int(), {}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES, {"weight": torch.ones(4)}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES, {"reduction": "maen"}),
    (torch.ones(4, 5), torch.ones(3, 5), INDICES, {"label_smoothing": 1.5}),
]


@needs_torchs
@pytest.mark.parametrize(("input", "linear_weight", "target", "options"), BAD)
def test_bad_input_raises_as_in_pytorch(input: Any, linear_weight: Any, target: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.linear_cross_entropy(input, linear_weight, target, **options)
    with pytest.raises(type(theirs.value)) as ours:
        fusedloss.linear_cross_entropy(input, linear_weight, target, **options)
    assert type(ours.value) is type(theirs.value)


def test_bad_input_of_our_own() -> None:
    layer, target = make_layer(2, 4), make_labels(8).reshape(2, 4)
    loss = fusedloss.linear_cross_entropy
    with pytest.raises(RuntimeError, match=r"shape \[0\] has no elements: a parameter that is sharded"):
        loss(layer.input, torch.ones(0), target)
    with pytest.raises(ValueError, match=r"Expected target of shape \[2, 4\].*\[2, 4, 8\].*got \[8\]"):
        loss(layer.input, layer.weight, target.reshape(8))
    with pytest.raises(ValueError, match=r"sample_weight must have one value per row, shape \[2, 4\], but got \[2\]"):
        loss(layer.input, layer.weight, target, sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, but got 0"):
        loss(layer.input, layer.weight, target, chunk_rows=0)
    with pytest.raises(TypeError, match="'chunk_rows' must be int, not float"):
        loss(layer.input, layer.weight, target, chunk_rows=1.5)
    with pytest.raises(TypeError, match="'options' must be LinearCrossEntropyOptions, not dict"):
        loss(layer.input, layer.weight, target, options={})
    with pytest.raises(TypeError, match="'linear_weight' must be Tensor, not list"):
        loss(layer.input, [[1.0]], target)
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        loss(layer.input, layer.weight, torch.full((2, 4), 11))
    if HAS_TORCHS:
        with pytest.raises(ValueError, match=r"batch_chunk_size \(4\) and chunk_rows \(5\) differ"):
            loss(layer.input, layer.weight, target, options=nn.LinearCrossEntropyOptions(batch_chunk_size=4), chunk_rows=5)
