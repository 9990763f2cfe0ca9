"""Triton's gradient in the logits' own memory, beside one that has memory of its own: they must agree bit for bit."""

from typing import Any

import torch
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

from fusedloss.backends import triton
from fusedloss.plan import Inputs, Options

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.1},
    "extras": {"z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.5, "return_stats": True},
    "two labels": {"target": "two labels"},
    "probabilities": {"target": "probabilities"},
}


def check_in_place(shape: tuple[int, int], dtype: torch.dtype, in_place: bool, **options: Any) -> None:
    """Every output of a forward that may overwrite the logits, of which the ignored rows are NaN, beside one that may not."""
    logits, target = make_logits(*shape, dtype=dtype), make_target(shape[0], n_classes=shape[1], ignored=-100)
    kind, target_b = options.pop("target", "indices"), None
    if kind == "probabilities":
        target = make_probabilities(*shape, dtype=dtype)
    else:
        target_b = target.roll(1) if kind == "two labels" else None
        logits[target == -100] = torch.nan
    lam = torch.linspace(0, 1, shape[0]) if kind == "two labels" else None
    weight = make_weight(shape[1], dtype) if options.pop("weight", False) else None
    inputs, asked = Inputs(logits, target, target_b, lam, weight), Options(**options)
    expected = triton.forward(inputs, asked, torch.float32, True)
    if expected.dlogits is None:
        saved = expected.saved
        expected = expected._replace(dlogits=triton.backward(saved.new_ones(()), inputs, saved, asked))
    found = triton.forward_overwriting(inputs, asked, torch.float32)
    assert (found.dlogits.data_ptr() == logits.data_ptr()) == in_place
    for name in ("loss", "dlogits", "row_stats", "counts"):
        values: list[Tensor | None] = [getattr(outputs, name) for outputs in (found, expected)]
        assert values[0] is values[1] is None or torch.equal(*map(_bits, values)), name


def _bits(values: Any) -> Tensor:
    return (
        values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]) if values.is_floating_point() else values
    )
