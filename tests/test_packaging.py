"""Wheel, sdist and installation: kernels/ is installed as fusedloss.kernels and never as a top-level package.

The C++ kernel takes ten seconds to compile, which `make setup` has done already; a stub stands in for the compiler here, whose
library does not load. So the installed package is seen to work without it, too.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCES = (".*", "*.egg-info", "*.so", "__pycache__", "build", "dist", "data", "runs")


def _run(*command: str, cwd: Path, **environment: str) -> str:
    """Runs Python's own tools without network, index or build isolation: what is tested is the project's metadata."""
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


STUB_COMPILER = """#!/bin/sh
while [ "$#" -gt 0 ]; do
  if [ "$1" = -o ]; then echo stub > "$2"; fi
  shift
done
"""


def _build(kind: str, source: Path, into: Path, compiler: str | None = None) -> Path:
    """The wheel or sdist of `source`, by the build backend that pip calls."""
    into.mkdir()
    stub = into.parent / "c++"
    stub.write_text(STUB_COMPILER)
    stub.chmod(0o755)
    compilers = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), compiler or str(stub))
    _run("-c", f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})", cwd=source, **compilers)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "fusedloss"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return _build("sdist", source, source.parent / "sdist")


def _unpacked(sdist: Path, into: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    (project,) = into.iterdir()
    return project


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist -> wheel, which is what a package index makes people do; building in the checkout hides missing files."""
    folder = tmp_path_factory.mktemp("wheel")
    return _build("wheel", _unpacked(sdist, folder / "unpacked"), folder / "wheel")


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a machine without a compiler."""
    folder = tmp_path_factory.mktemp("pure")
    return _build("wheel", _unpacked(sdist, folder / "unpacked"), folder / "wheel", str(folder / "no-compiler"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _sources(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_the_package_and_its_kernels(wheel: Path) -> None:
    names = _names(wheel)
    assert _sources("fusedloss") <= names
    assert {f"fusedloss/{path}" for path in _sources("kernels")} <= names
    assert {"fusedloss/kernels/cpu/fusedloss_cpu.so", "fusedloss/py.typed"} <= names


def test_a_wheel_without_the_cpu_kernel_has_another_name(wheel: Path, pure_wheel: Path) -> None:
    """Nobody takes it for the one with the kernel, and it installs everywhere."""
    assert re.fullmatch(r"fusedloss-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert re.fullmatch(r"fusedloss-[\d.]+-py3-none-any\.whl", pure_wheel.name)
    for built, pure in ((wheel, "false"), (pure_wheel, "true")):
        with zipfile.ZipFile(built) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
            assert f"Root-Is-Purelib: {pure}" in archive.read(name).decode()

    def modules(built: Path) -> set[str]:
        return {name for name in _names(built) if name.endswith(".py")}

    assert modules(pure_wheel) == modules(wheel)


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    """`kernels` on PyPI is another project, which transformers imports."""
    top = {name.split("/")[0] for name in _names(wheel)}
    assert top == {"fusedloss", next(name for name in top if name.endswith(".dist-info"))}


def test_the_wheels_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert "\nName: fusedloss\n" in metadata
    assert "\nRequires-Dist: torch" in metadata
    assert "# fusedloss" in metadata  # the README is the description
    # A package index has none of the repository's files.
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", metadata)
    assert not [line for line in metadata.splitlines() if line.startswith("Requires-Dist: triton")]


def test_the_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert _sources("fusedloss") | _sources("kernels") <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py"} <= names
    compiled = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cpp", ".h")}
    assert compiled <= names


def test_the_sdists_tests_have_what_they_need(source: Path, sdist: Path, tmp_path: Path) -> None:
    """Helpers, benchmarks and Makefile too: a distribution's packager runs the tests from it."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert _sources("tests") | _sources("benchmarks") | {"Makefile", "tests/fuzz_cpu_kernel.cpp"} <= names
    project = _unpacked(sdist, tmp_path / "unpacked")
    collected = _run("-m", "pytest", "--collect-only", "-q", "tests/test_accuracy.py", cwd=project)
    assert "tests/test_accuracy.py" in collected


USER = """
import warnings
import torch, fusedloss
from torch.nn.functional import cross_entropy

logits, target = torch.randn(50, 7, requires_grad=True), torch.randint(7, (50,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}):
        loss = fusedloss.cross_entropy(logits, target, **options)
        expected = cross_entropy(logits, target, **options)
        assert loss.equal(expected) and torch.autograd.grad(loss, logits)[0].equal(torch.autograd.grad(expected, logits)[0])
    fusedloss.cross_entropy(logits, target, reduction="topk", top_k=3)
print(*[f"{warning.filename}: {warning.message}" for warning in caught], sep="\\n")
with fusedloss.backend("reference"), warnings.catch_warnings():
    warnings.simplefilter("error")
    fusedloss.cross_entropy(logits, target)
"""


def test_without_a_compiler_the_first_call_says_so_and_is_pytorchs(pure_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "site")
    (said,) = _run("-c", USER, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert said.startswith("<string>: fusedloss: the compiled CPU kernel is missing")
    assert "install g++ or clang++" in said
    report = _run("-m", "fusedloss", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "cpu       reference path: the compiled CPU kernel is missing" in report


def test_a_checkout_where_nothing_was_built_says_so(source: Path) -> None:
    """The folder that Python runs in comes before what pip installed."""
    report = _run("-m", "fusedloss", cwd=source, PYTHONPATH="")
    assert f"reference path: the compiled CPU kernel is missing: none was built in {source}" in report
    assert "pip install -e ." in report


TYPED = """
import torch
from torch import Tensor
import fusedloss
from fusedloss import CrossEntropyLoss, LossStats, cross_entropy

logits, target = torch.randn(3, 5, requires_grad=True), torch.randint(5, (3,))
loss: Tensor = cross_entropy(logits, target, label_smoothing=0.1)
mixed: Tensor = cross_entropy(logits, (target, target, 0.5), reduction="topk", top_k=2)
pair: tuple[Tensor, LossStats] = cross_entropy(logits, target, return_stats=True)
criterion: CrossEntropyLoss = CrossEntropyLoss(reduction="max")
own: Tensor = criterion(logits, target)
both: tuple[Tensor, LossStats] = CrossEntropyLoss(return_stats=True)(logits, target)


class Mine(CrossEntropyLoss):
    pass


inherited: Tensor = Mine(z_loss=1e-4)(logits, target)
with fusedloss.backend("reference"), fusedloss.patch_torch():
    print(fusedloss.plan(logits, target), inherited + own + both[0] + pair[0])
"""
MISTYPED = """
import torch
import fusedloss
from fusedloss import CrossEntropyLoss, cross_entropy

logits, target = torch.randn(3, 5), torch.randint(5, (3,))
cross_entropy(logits, target, reduction="maen")
CrossEntropyLoss(reduction="maen")
fusedloss.backend("cuda")
cross_entropy(logits, target, return_stats=True).backward()
cross_entropy(logits, target).n_correct
CrossEntropyLoss(return_stats=True)(logits, target).backward()
"""


def test_mypy_understands_a_users_file(pure_wheel: Path, tmp_path: Path) -> None:
    """Strictly, as installed: what is right has no error, and what is wrong has one on its line."""
    pytest.importorskip("mypy")
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "mistyped.py").write_text(MISTYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache" / "users")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([*command, "typed.py", "mistyped.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    wrong = [int(line) for line in re.findall(r"^mistyped\.py:(\d+): error: ", result.stdout, re.MULTILINE)]
    assert sorted(set(wrong)) == [7, 8, 9, 10, 11, 12], result.stdout
    assert "typed.py" not in result.stdout.replace("mistyped.py", "")
    assert not result.stderr
    _run("typed.py", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))  # and it runs


WHERE = """
import fusedloss, fusedloss.kernels.rowwise, fusedloss.kernels.forward, torch
logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
loss = fusedloss.cross_entropy(logits, torch.tensor([1]))
loss.backward()
plan = fusedloss.plan(logits, torch.tensor([1]))
print(plan.backend, "does not load" in plan.reason)
print(fusedloss.__file__, fusedloss.kernels.rowwise.__file__, f"{loss.item():.4f}", logits.grad.tolist(), sep="\\n")
"""


def test_an_installed_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    _run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    plan, package, kernels, loss, gradient = _run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert Path(package) == target / "fusedloss" / "__init__.py"
    assert Path(kernels) == target / "fusedloss" / "kernels" / "rowwise.py"
    assert (loss, gradient) == ("0.6931", "[[0.5, -0.5]]")
    assert plan == "torch True"


def test_a_checkout_works_without_an_installation(source: Path, tmp_path: Path) -> None:
    """`-S -s` would hide torch too, so the copy goes first on the path, before any installed fusedloss."""
    _, package, _, loss, _ = _run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(source)).splitlines()
    assert Path(package) == source / "fusedloss" / "__init__.py"
    assert loss == "0.6931"


def test_import_needs_torch_alone(tmp_path: Path) -> None:
    """Neither triton nor anything else that torch does not import by itself."""
    probe = """
import sys, torch
before = set(sys.modules)
import fusedloss
new = {name.split(".")[0] for name in set(sys.modules) - before} - {"fusedloss"} - set(sys.stdlib_module_names)
print(sorted(new), "triton" in sys.modules)
"""
    assert _run("-c", probe, cwd=tmp_path, PYTHONPATH=str(ROOT)).split() == ["[]", "False"]


AGAIN = """
import sys
import torch
from torch.fx.experimental.proxy_tensor import make_fx
logits, target, losses = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,)), []
for _ in range(3):
    for name in [name for name in sys.modules if name.split(".")[0] == "fusedloss"]:
        del sys.modules[name]
    import fusedloss
    losses.append(fusedloss.cross_entropy)
assert len(set(losses)) == 3
gradients = []
for loss in losses:  # the earlier ones, too, which somebody may hold; traced, it asks for the operators that are registered
    traced = make_fx(lambda *inputs, loss=loss: loss(*inputs), tracing_mode="fake")(logits.detach(), target)
    torch.testing.assert_close(traced(logits.detach(), target), loss(logits, target).detach())
    gradients += torch.autograd.grad(loss(logits, target), logits)
assert gradients[0].equal(gradients[1]) and gradients[0].equal(gradients[2])
"""


def test_importing_again_after_the_modules_were_deleted(tmp_path: Path) -> None:
    """Test runners and notebooks do that. PyTorch's dispatcher knows one definition of an operator."""
    _run("-W", "error", "-c", AGAIN, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_version_comes_from_one_place(wheel: Path) -> None:
    import fusedloss

    assert wheel.name.startswith(f"fusedloss-{fusedloss.__version__}-")
