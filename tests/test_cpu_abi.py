"""How Python calls the CPU kernel: the same fields on both sides, and arguments that are wrong."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from fusedloss.kernels.constants import FRACTION_BITS, STATE

from fusedloss.backends import cpu, cpu_abi
from fusedloss.backends.cpu_call import prepack
from fusedloss.plan import NUMBERS, Inputs, Options


def _body(source: str, start: str) -> str:
    return source.split(start, 1)[1].split("}", 1)[0]


def _fields(source: str, struct: str) -> list[tuple[str, str]]:
    """Names and types of a C++ struct's fields in order, as cpu_abi.py has them."""
    code = re.sub(r"//[^\n]*", "", _body(source, f"struct {struct} {{"))
    code = re.sub(r"void \(\*(\w+)\)\([^;]*;", r"void* \1;", code)
    pointer = "Address" if struct == "Kind" else "torch.Tensor | None"
    fields = []
    for declaration in filter(None, map(str.strip, code.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        for name in map(str.strip, names.split(",")):
            if kind == "Strides":
                fields += [(f"{name.removesuffix('_strides')}_{dim}", "int") for dim in ("outer", "middle", "row", "col")]
            else:
                fields.append((name, {"double": "float", "int64_t": "int"}.get(kind, pointer)))
    return fields


def test_python_and_the_header_agree() -> None:
    """One order of fields and of names on both sides: nothing else would notice."""
    folder = Path(__file__).parent.parent / "kernels" / "cpu"
    source, taken = (folder / "problem.h").read_text(), (folder / "python.cpp").read_text()
    for fields in (cpu_abi.Call, cpu_abi.Extras, cpu_abi.Kind):
        here = [(name, str(getattr(kind, "__name__", kind))) for name, kind in get_type_hints(fields).items()]
        assert here == _fields(source, fields.__name__)
    assert [(name, "float") for name in NUMBERS] == _fields(source, "Numbers")
    assert list(cpu_abi.Call._fields) == re.findall(r"\bcall\.(\w+)", taken)
    assert list(cpu_abi.Extras._fields) == re.findall(r"\brest\.(\w+)", taken.split("if (n == N_LONG)")[1])
    enumerators = {
        "Dtype": [str(dtype).removeprefix("torch.") for dtype in cpu_abi.DTYPES],
        "Reduction": cpu_abi.REDUCTIONS,
        "TargetKind": cpu_abi.TARGET_KINDS,
        "Isa": ("best", *cpu_abi.ISA_NAMES[1:]),
    }
    for name, here in enumerators.items():
        there = [word.strip().removeprefix("k").lower() for word in _body(source, f"enum {name} : int64_t {{").split(",")]
        assert there == [word.replace("_", "") for word in here]
    constants = {"Abi": cpu_abi.ABI, "State": STATE, "FractionBits": FRACTION_BITS}
    for name, value in constants.items():
        assert f"constexpr int64_t k{name} = {value};" in source


@pytest.mark.skipif(cpu.LIBRARY is None, reason="the compiled CPU kernel is missing")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"logits": 3}, AttributeError),
        ({"scale": "1"}, TypeError),
        ({"n_examples": 2.5}, TypeError),
        ({"n_examples": None, "scale": None}, TypeError),
        ({"row_stats": torch.zeros(2), "n_threads": "1"}, TypeError),
        ({"surplus": 0}, TypeError),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(change: dict[str, Any], error: type[Exception]) -> None:
    """Nothing is computed with them."""
    logits, target, loss = torch.zeros(2, 5), torch.tensor([1, 2]), torch.full((), 7.0)
    kind = prepack(Inputs(logits, target), None, torch.float32, Options(), cpu.library())
    call = dict.fromkeys(cpu_abi.Call._fields) | {"loss": loss, "logits": logits, "target": target}
    call |= {"scale": 1.0, "n_threads": 1, "n_examples": 2}
    forward = cpu.library().functions.forward
    with pytest.raises(error):
        forward(kind.packed, True, *(call | change).values())
    assert loss.item() == 7
    assert forward(kind.packed, True, *call.values()) == 0
    assert loss.item() == pytest.approx(torch.tensor(5.0).log().item())
