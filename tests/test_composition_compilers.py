"""The loss inside compilers: torch.func under torch.compile, export, ONNX, what is compiled anew; F.cross_entropy beside it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import BOTH
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedloss
from fusedloss.plan import Options

# torch.func.jvp makes PyTorch script its decompositions; torch.onnx warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

Call = Callable[..., Any]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Call) -> Call:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def problem(n_rows: int = 6, n_classes: int = 5) -> tuple[Tensor, Tensor]:
    return make_logits(n_rows, n_classes), make_target(n_rows, n_classes=n_classes, ignored=-100)


TRANSFORMS: dict[str, Callable[[Call, Tensor, Tensor], Any]] = {
    "grad": lambda call, x, t: torch.func.grad(call)(x, t),
    "vjp": lambda call, x, t: torch.func.vjp(lambda y: call(y, t), x)[1](torch.tensor(2.0)),
    "jvp": lambda call, x, t: torch.func.jvp(lambda y: call(y, t), (x,), (x.cos(),)),
    "vmap of grad": lambda call, x, t: torch.func.vmap(torch.func.grad(call))(x[:, None], t.clamp(min=0)[:, None]),
    "jacrev": lambda call, x, t: torch.func.jacrev(lambda y: call(y, t, reduction="none"))(x),
    "jacfwd": lambda call, x, t: torch.func.jacfwd(lambda y: call(y, t, reduction="none"))(x),
    "hessian": lambda call, x, t: torch.func.hessian(lambda y: call(y, t))(x),
    "grad of sums without a mean": lambda call, x, t: torch.func.grad(lambda y: call(y, t, reduction="none").sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_under_compile(transform: Callable[[Call, Tensor, Tensor], Any]) -> None:
    def result(call: Call) -> Any:
        return compiled(lambda x, t: transform(call, x, t))(*problem())

    try:
        theirs = result(F.cross_entropy)
    except torch._dynamo.exc.TorchDynamoException as error:  # earlier versions know fewer transforms
        pytest.skip(f"PyTorch cannot compile its own: {error}"[:200])
    ours = result(fusedloss.cross_entropy)
    torch.testing.assert_close(ours, theirs)
    assert max(tensor.abs().max() for tensor in torch.utils._pytree.tree_leaves(ours)) > 1e-3


def test_compile_under_a_transform() -> None:
    """The transform is there before the compiler is."""
    ours, theirs = (torch.func.grad(torch.compile(call, backend="aot_eager"))(*problem()) for call in BOTH)
    torch.testing.assert_close(ours, theirs)


class Model(nn.Module):
    """One that returns its own loss."""

    def __init__(self, call: Call, **options: Any) -> None:
        super().__init__()
        self.factor, self.call, self.options = nn.Parameter(torch.linspace(0.5, 1.5, 5)), call, options

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.call(logits * self.factor, target, **self.options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}], ids=str)
def test_what_is_exported_trains(options: dict[str, Any], strict: bool) -> None:
    """PyTorch's operators only: a process that loads the program need not have fusedloss."""
    results = []
    for call in BOTH:
        program = torch.export.export(Model(call, **options), problem(), strict=strict)
        operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
        assert all(operator.namespace == "aten" for operator in operators if isinstance(operator, torch._ops.OpOverload))
        module = program.module()
        loss = module(*problem())
        loss.backward()
        results.append((loss.detach(), module.factor.grad))
    torch.testing.assert_close(*results)


HOW: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Call]] = {
    "plain": lambda model, arguments: model,
    "compiled": lambda model, arguments: compiled(model),
    "exported": lambda model, arguments: torch.export.export(model, arguments).module(),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_single_example(reduction: str, how: Callable[[nn.Module, tuple[Tensor, Tensor]], Call]) -> None:
    """(C,) and (), whose loss is 0-d under every reduction; and whose class may be ignored."""
    for label in (3, 3, 3, -100):  # the later ones are calls like an earlier one
        results = []
        for call in BOTH:
            model, arguments = Model(call, reduction=reduction, label_smoothing=0.1), (make_logits(5), torch.tensor(label))
            loss = how(model, arguments)(*arguments)
            assert loss.shape == ()
            (gradient,) = torch.autograd.grad(loss, list(model.parameters()), torch.tensor(2.0))
            results.append((loss.detach(), gradient))
        torch.testing.assert_close(*results, equal_nan=True)  # a mean of none


LOADED = """
import sys, torch
path, *problem = sys.argv[1], *torch.load(sys.argv[1] + ".problem")
loss = torch.export.load(path).module()(*problem)
loss.backward()
assert "fusedloss" not in sys.modules
print(loss.item())
"""


def test_a_saved_program_needs_no_fusedloss(tmp_path: Path) -> None:
    path, model = tmp_path / "model.pt2", Model(fusedloss.cross_entropy, label_smoothing=0.1)
    torch.export.save(torch.export.export(model, problem()), path)
    torch.save(problem(), f"{path}.problem")
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(path)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert float(printed) == pytest.approx(model(*problem()).item(), rel=1e-6)


def test_joint_export() -> None:
    """Forward and backward in one program: the gradients it names are the same as with PyTorch's loss."""
    export = pytest.importorskip("torch.export.experimental")._export_forward_backward
    graphs = []
    for call in BOTH:
        signature = export(torch.export.export(Model(call), problem()), 0).graph_signature.backward_signature
        assert signature.loss_output
        graphs.append(set(signature.gradients_to_parameters.values()))
    assert graphs == [{"factor"}, {"factor"}]


@pytest.mark.sweep  # C++ is compiled for it
def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    model = Model(fusedloss.cross_entropy, label_smoothing=0.1)
    program = torch.export.export(model, problem())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*problem()), model(*problem()).detach())


CACHED = """
import torch, fusedloss
from torch._dynamo.utils import counters
logits, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
torch.compile(lambda x, t: fusedloss.cross_entropy(2 * x, t))(logits, target).backward()
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.sweep  # two processes that compile
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", CACHED]
    printed = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert [int(each) for each in printed] == [0, 1]


@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"reduction": "topk", "top_k": 2}, {"softcap": 3.0, "scale": 0.5}], ids=str)
def test_what_is_exported_with_extras_trains(options: dict[str, Any]) -> None:
    model = Model(fusedloss.cross_entropy, **options)
    module = torch.export.export(model, problem()).module()
    results = []
    for each in (model, module):
        loss = each(*problem())
        results.append((loss.detach(), torch.autograd.grad(loss, each.factor)[0]))
    torch.testing.assert_close(*results)


def test_onnx_export() -> None:
    pytest.importorskip("onnxscript")
    programs = [torch.onnx.export(Model(call), problem(), dynamo=True, verbose=False) for call in BOTH]
    ours, theirs = ([node.op_type for node in program.model.graph] for program in programs)
    assert ours == theirs


THEIRS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "scale": lambda x, t, number: number * F.cross_entropy(x, t),
    "lam": lambda x, t, number: number * F.cross_entropy(x, t) + (1 - number) * F.cross_entropy(x, t.flip(0)),
    "ignore_index": lambda x, t, number: F.cross_entropy(x, t, ignore_index=number),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_new_number_in_every_step_compiles_twice(name: str) -> None:
    ours: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
        "scale": lambda x, t, number: fusedloss.cross_entropy(x, t, scale=number),
        "lam": lambda x, t, number: fusedloss.cross_entropy(x, (t, t.flip(0), number)),
        "ignore_index": lambda x, t, number: fusedloss.cross_entropy(x, t, ignore_index=number),
    }
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(ours[name], fullgraph=True, backend=counter)
    logits, target = problem()[0].requires_grad_(), make_target(6, n_classes=5)
    for number in range(5):
        value = number if name == "ignore_index" else 0.15 + number / 10
        loss, expected = call(logits, target, value), THEIRS[name](logits, target, value)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    assert counter.frame_count <= 2


def test_a_scale_under_compile_does_not_overflow_before_it_is_applied() -> None:
    """Sum of 2**17 in float16, times 2**-10: PyTorch's sum would be infinite."""
    logits = torch.zeros(2**15, 64, dtype=torch.float16)
    target = torch.zeros(2**15, dtype=torch.int64)
    loss = compiled(lambda x, t: fusedloss.cross_entropy(x, t, reduction="sum", scale=2.0**-10))(logits, target)
    torch.testing.assert_close(loss, fusedloss.cross_entropy(logits, target, reduction="sum", scale=2.0**-10))
    assert loss.isfinite()


def _masked(call: Call, x: Tensor, t: Tensor) -> Tensor:
    return call(x[t != -100], t[t != -100])


def _item(call: Call, x: Tensor, t: Tensor) -> Tensor:
    return call(x, t.clamp(min=0), ignore_index=t.max().item())


@pytest.mark.parametrize("function", [_masked, _item])
def test_sizes_and_numbers_that_only_the_data_tell(function: Callable[[Call, Tensor, Tensor], Tensor]) -> None:
    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for call in reversed(BOTH):
            logits, target = problem()[0].requires_grad_(), problem()[1]
            try:
                loss = compiled(lambda x, t, call=call: function(call, x, t))(logits, target)
            except torch._dynamo.exc.UserError:
                if call is F.cross_entropy:
                    pytest.skip("this PyTorch cannot, either")
                raise
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results)


def _layer(x: Tensor, t: Tensor, **options: Any) -> Any:
    return fusedloss.linear_cross_entropy(x, torch.eye(x.shape[1]), t, **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "topk", "top_k": 0.5}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("call", [fusedloss.cross_entropy, _layer])
def test_several_losses_whose_sizes_and_numbers_are_unknown(call: Call, options: dict[str, Any]) -> None:
    """dynamic=True takes every number that is no literal for one that changes, those in defaults and closures, too."""
    theirs = fusedloss.cross_entropy if options.keys() & {"top_k", "softcap"} else F.cross_entropy

    def step(call: Call, x: Tensor, t: Tensor) -> Tensor:
        return call(x.sin(), t, **options).sum() + 2 * call(x, t, **options).sum()

    ours = torch.compile(lambda x, t: step(call, x, t), fullgraph=True, dynamic=True, backend="aot_eager")
    for n_rows in (4, 7):
        logits, target = problem(n_rows)[0].requires_grad_(), problem(n_rows)[1]
        found, expected = ours(logits, target), step(theirs, logits, target)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_autograd(reduction: str) -> None:
    results = []
    with torch._dynamo.config.patch(compiled_autograd=True):
        for call in BOTH:
            logits, target = problem()[0].requires_grad_(), problem()[1]

            @torch.compile(backend="aot_eager")
            def step(logits: Tensor, target: Tensor, call: Call = call) -> Tensor:
                loss = call(logits, target, reduction=reduction).sum()
                loss.backward()
                return loss.detach()

            results.append((step(logits, target), logits.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("n_rows", [16, 40000], ids=["small logits are kept", "large ones are forgotten"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_backward_of_eager_calls(reduction: str, n_rows: int) -> None:
    """The first such calls, and those that are known."""
    logits, target = torch.randn(n_rows, 7, requires_grad=True), torch.randint(7, (n_rows,))
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction=reduction).sum(), logits)
    for _ in range(3):
        loss, logits.grad = fusedloss.cross_entropy(logits, target, reduction=reduction).sum(), None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            loss.backward()
        torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_differentiates_itself(reduction: str) -> None:
    """Whoever calls it directly has a right gradient, or an error; one of second order is an error."""
    logits, target = problem()[0].requires_grad_(), problem()[1]
    arguments = (logits, target, None, None, None, None, None, *Options(reduction), torch.float32)
    backend = "cpu" if fusedloss.plan(logits, target).backend == "cpu" else pytest.skip("no C++ kernel")
    loss = torch.ops.fusedloss.forward(*arguments, True, backend)[0].sum()
    torch.testing.assert_close(
        *(
            torch.autograd.grad(each, logits, retain_graph=True)
            for each in (loss, F.cross_entropy(*arguments[:2], reduction=reduction).sum())
        )
    )
    with pytest.raises(RuntimeError, match="gradient of first order"):
        torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="needs_grad=True"):
        torch.ops.fusedloss.forward(*arguments, False, backend)[0].sum().backward()


def test_probabilities_and_weights_under_compile() -> None:
    results = []
    for call in BOTH:
        tensors = [tensor.requires_grad_() for tensor in (make_logits(4, 5), make_probabilities(4, 5), make_weight(5))]
        loss = compiled(call)(*tensors)
        results.append((loss.detach(), torch.autograd.grad(loss, tensors)))
    torch.testing.assert_close(*results)
