"""Calls that together select every kernel and every branch on a constexpr: what test_compiled.py compiles."""

from typing import Any

import torch
from shard_problems import shard_call

import fusedloss
from fusedloss.backends import triton
from fusedloss.plan import ClassShard

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

ROW_EXTRAS: dict[str, Any] = {"two_labels": True, "sample_weight": True, "z_loss": 1e-3}
# Each case is here for the code it selects; together they reach every branch on a constexpr.
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "single program": ((64, 10), FP32, {}),
    "ticket": ((4096, 10), FP32, {}),
    "ticket, odd batch": ((4095, 10), FP32, {}),
    "ticket, bf16": ((4096, 10), BF16, {"reduction": "sum"}),
    "packed rows, 8 to a thread": ((4096, 7), BF16, {"weight": True, "label_smoothing": 0.1}),
    "packed rows, as many columns as a thread holds": ((4096, 64), FP32, {"weight": True, "label_smoothing": 0.1}),
    "shared tile, 16-byte rows": ((4096, 100), FP32, {}),
    "rows of 8 parts": ((4096, 256), BF16, {"weight": True, "label_smoothing": 0.1}),
    "rows of a padded tensor": ((4096, 100), FP32, {"padded": True}),
    "shared tile, all options": ((4096, 100), FP32, {"weight": True, "label_smoothing": 0.1, "scale": True}),
    "one row a program": ((256, 1000), BF16, {}),
    "one row a program, few rows": ((64, 1000), BF16, {"weight": True}),
    "short ragged rows": ((256, 257), FP32, {}),
    "ragged rows": ((64, 1001), BF16, {}),
    "statistics of short rows": ((256, 300), BF16, {"return_stats": True}),
    "statistics of slices": ((256, 151937), BF16, {"return_stats": True}),
    "statistics of pixels": ((4, 150, 64, 64), FP32, {"return_stats": True}),
    "recompute, statistics": ((256, 1000), BF16, {"reduction": "none", "return_stats": True}),
    "max of short rows": ((256, 1000), BF16, {"reduction": "max"}),
    "fp16, none": ((64, 1001), FP16, {"reduction": "none"}),
    "long rows": ((256, 32000), BF16, {}),
    "rows that begin inside a sector": ((256, 20008), BF16, {"weight": True}),
    # as many columns as fit: 16 warps, each thread with all the blocks that its registers hold
    "rows in registers": ((256, 22528), BF16, {"weight": True}),
    "ragged rows in registers": ((256, 22513), BF16, {"weight": True}),
    "rows in registers, fp32": ((256, 18417), FP32, {"weight": True}),
    "rows in registers, fp64": ((256, 4081), FP64, {"weight": True}),
    "rows in registers, smoothing": ((256, 8177), BF16, {"weight": True, "label_smoothing": 0.1, "scale": True}),
    "rows in registers, smoothing without weights": ((256, 8177), BF16, {"label_smoothing": 0.1}),
    "slices": ((256, 128256), BF16, {}),
    "slices, fp32": ((256, 128256), FP32, {}),
    "slices of ragged rows": ((256, 50257), BF16, {"weight": True}),
    "slices of ragged rows, all options": ((256, 50257), BF16, {"weight": True, "label_smoothing": 0.1, "scale": True}),
    "slices of ragged rows, fp32": ((256, 151937), FP32, {"reduction": "sum"}),
    "slices of ragged rows, fp64": ((256, 50257), FP64, {}),
    "slices, smoothing without weights": ((256, 50257), BF16, {"label_smoothing": 0.1}),
    "slices, fp32, smoothing": ((256, 50257), FP32, {"weight": True, "label_smoothing": 0.1}),
    "slices, fp64, smoothing": ((256, 50257), FP64, {"weight": True, "label_smoothing": 0.1}),
    "slices that fill the GPU": ((1, 128256), BF16, {}),
    "more slices than fit the GPU": ((64, 1 << 20), BF16, {}),
    "max": ((64, 5000), FP32, {"reduction": "max"}),
    "topk": ((64, 5000), FP32, {"reduction": "topk", "top_k": 3}),
    "topk, fp64": ((64, 5000), FP64, {"reduction": "topk", "top_k": 3}),
    "topk of a fraction, shared tile": ((4096, 10), FP32, {"reduction": "topk", "top_k": 0.5}),
    "ragged shared tile": ((4096, 101), FP32, {}),
    "transposed": ((10, 4096), FP32, {"transpose": True}),
    "topk of a fraction, shared tile, ragged": ((4095, 10), BF16, {"reduction": "topk", "top_k": 0.5}),
    "max, shared tile": ((4096, 10), BF16, {"reduction": "max"}),
    "recompute, shared tile": ((4096, 10), BF16, {"reduction": "none"}),
    "recompute, 16-byte rows, all options": ((4096, 100), FP32, {"reduction": "none", "weight": True, "label_smoothing": 0.1}),
    "recompute, long rows": ((64, 32000), BF16, {"reduction": "none"}),
    "recompute, long ragged rows": ((64, 50257), BF16, {"reduction": "none", "weight": True, "label_smoothing": 0.1}),
    "all extras": ((256, 45041), BF16, {"logit_scale": 0.5, **ROW_EXTRAS}),
    "all extras, fp32": ((256, 6129), FP32, {"logit_scale": 0.5, **ROW_EXTRAS}),
    "slices, all extras": ((256, 151937), BF16, {"logit_scale": 0.5, **ROW_EXTRAS}),
    "softcap": ((256, 6129), BF16, {"softcap": 30.0, "return_stats": True}),
    "focal": ((256, 6129), FP32, {"focal_gamma": 2.0, "weight": True}),
    "recompute, tile, focal": ((4, 19, 64, 64), FP32, {"reduction": "none", "focal_gamma": 2.0}),
    "softcap, all extras, smoothing": (
        (256, 50257),
        BF16,
        {"softcap": 30.0, "label_smoothing": 0.1, "weight": True, **ROW_EXTRAS},
    ),
    "softcap, fp32": ((256, 6129), FP32, {"softcap": 30.0, **ROW_EXTRAS}),
    "softcap, fp64": ((256, 2033), FP64, {"softcap": 30.0, **ROW_EXTRAS}),
    "recompute, all extras": (
        (64, 50257),
        BF16,
        {"reduction": "none", "softcap": 30.0, "return_stats": True, **ROW_EXTRAS},
    ),
    "topk, all extras": (
        (64, 5000),
        FP32,
        {"reduction": "topk", "top_k": 3, "softcap": 30.0, "return_stats": True, **ROW_EXTRAS},
    ),
    "recompute, slices": ((1, 128256), BF16, {"reduction": "none"}),
    "recompute, slices, all options": ((3, 50257), FP32, {"reduction": "max", "weight": True, "label_smoothing": 0.1}),
    "recompute, long rows, fp32": ((64, 128256), FP32, {"reduction": "none"}),
    "recompute, long rows, fp64": ((64, 50257), FP64, {"reduction": "none", "weight": True, "label_smoothing": 0.1}),
    "recompute, pixels": ((4, 19, 64, 64), BF16, {"reduction": "none"}),
    "recompute, pixels, all options": ((4, 150, 64, 64), FP32, {"reduction": "none", "weight": True, "label_smoothing": 0.1}),
    "pixels": ((4, 19, 64, 64), BF16, {}),
    "pixels, fp32": ((4, 19, 64, 64), FP32, {"weight": True}),
    "pixels of many classes": ((4, 150, 64, 64), BF16, {}),
    "pixels of more classes than registers hold": ((1, 4000, 16, 16), BF16, {}),
    "pixels, all options": ((4, 150, 64, 64), FP32, {"weight": True, "label_smoothing": 0.1}),
    "pixels, fp64, max": ((4, 19, 64, 64), FP64, {"reduction": "max"}),
    "tile, all extras": ((4096, 10), FP32, {"softcap": 30.0, "logit_scale": 0.5, "return_stats": True, **ROW_EXTRAS}),
    "recompute, tile, all extras": (
        (4, 19, 64, 64),
        FP32,
        {"reduction": "none", "softcap": 30.0, "logit_scale": 0.5, "return_stats": True, **ROW_EXTRAS},
    ),
    "probabilities, single program": ((64, 10), FP32, {"probabilities": FP32}),
    "probabilities, packed rows": ((4096, 10), FP32, {"probabilities": FP32, "label_smoothing": 0.1}),
    "probabilities, packed rows, bf16": ((4096, 10), BF16, {"probabilities": BF16}),
    "probabilities in fp32, packed rows": ((4096, 10), BF16, {"probabilities": FP32, "weight": True}),
    "probabilities, as many columns as a thread holds": ((4096, 64), FP32, {"probabilities": FP32, "weight": True}),
    "probabilities, rows of 8 parts": ((4096, 256), BF16, {"probabilities": BF16, "weight": True, "label_smoothing": 0.1}),
    "probabilities, 16-byte rows, fp64": ((4096, 100), FP64, {"probabilities": FP64}),
    "probabilities, rows of a padded tensor": ((4096, 100), FP32, {"padded": True, "probabilities": FP32}),
    "probabilities, one row a program": ((64, 1000), BF16, {"probabilities": BF16}),
    "probabilities in fp32, one row a program": ((64, 1000), BF16, {"probabilities": FP32, "label_smoothing": 0.1}),
    "probabilities, ragged rows": ((256, 1001), FP32, {"probabilities": FP32}),
    "probabilities, long ragged rows": ((256, 50257), BF16, {"probabilities": BF16}),
    "probabilities, rows in registers": ((256, 8177), BF16, {"probabilities": BF16}),
    "probabilities in fp32, rows in registers": ((256, 8177), BF16, {"probabilities": FP32, "weight": True}),
    "probabilities, rows in registers, fp32": ((256, 8177), FP32, {"probabilities": FP32, "weight": True}),
    "probabilities, slices, all options": (
        (256, 50257),
        BF16,
        {"probabilities": FP32, "weight": True, "label_smoothing": 0.1, "sample_weight": True, "z_loss": 1e-3, "softcap": 30.0},
    ),
    "probabilities, long rows, fp32": ((256, 32000), FP32, {"probabilities": FP32}),
    "probabilities, long rows, fp64": ((64, 8192), FP64, {"probabilities": FP64}),
    "probabilities, recompute, packed rows": ((4096, 10), BF16, {"reduction": "none", "probabilities": BF16}),
    "probabilities, recompute": ((64, 1000), FP16, {"probabilities": FP16, "weight": True, "label_smoothing": 0.1}),
    "probabilities, recompute, long rows": ((64, 50257), BF16, {"reduction": "none", "probabilities": BF16}),
    "probabilities, recompute, slices": (
        (3, 50257),
        FP32,
        {"reduction": "topk", "top_k": 2, "probabilities": FP32, "weight": True},
    ),
    "probabilities, pixels": ((4, 19, 64, 64), BF16, {"probabilities": BF16}),
    "probabilities, pixels, fp32": ((4, 19, 64, 64), FP32, {"probabilities": FP32, "label_smoothing": 0.1, "weight": True}),
    "probabilities, pixels of many classes": ((4, 150, 64, 64), BF16, {"probabilities": FP32}),
    "probabilities, pixels of more classes than registers hold": ((1, 4000, 16, 16), BF16, {"probabilities": BF16}),
    "probabilities, recompute, pixels": ((4, 19, 64, 64), FP32, {"reduction": "max", "probabilities": FP32}),
    "probabilities, recompute, pixels, fp64": ((4, 19, 64, 64), FP64, {"reduction": "none", "probabilities": FP64}),
    "packed rows, fp64, smoothing": ((4096, 64), FP64, {"weight": True, "label_smoothing": 0.1}),
    "single program, fp64, softcap": ((64, 100), FP64, {"weight": True, "label_smoothing": 0.1, "softcap": 30.0}),
    "selection": ((20000, 10), FP32, {"reduction": "topk", "top_k": 0.2}),
    "selection, fp64": ((20000, 10), FP64, {"reduction": "max"}),
    "shard, packed rows, two labels": (
        (4096, 10),
        FP32,
        {"shard": True, "two_labels": True, "weight": True, "label_smoothing": 0.1},
    ),
    "shard, packed rows": ((4096, 10), FP32, {"shard": True, "weight": True, "label_smoothing": 0.1}),
    "shard, shared tile, all extras": ((4096, 100), FP32, {"shard": True, "softcap": 30.0, "z_loss": 1e-3, "two_labels": True}),
    "shard, long rows": ((64, 32000), BF16, {"shard": True}),
    "shard, long ragged rows": ((64, 50257), BF16, {"shard": True, "label_smoothing": 0.1}),
    "shard, long rows, fp64": ((64, 50257), FP64, {"shard": True, "weight": True, "label_smoothing": 0.1}),
    "shard, slices, all extras": (
        (3, 50257),
        FP32,
        {"shard": True, "softcap": 30.0, "z_loss": 1e-3, "two_labels": True, "weight": True, "label_smoothing": 0.1},
    ),
    "shard, statistics of ragged rows": ((64, 50257), BF16, {"shard": True, "return_stats": True, "label_smoothing": 0.1}),
    "shard, statistics of packed rows": ((4096, 10), FP32, {"shard": True, "return_stats": True, "weight": True}),
    "shard, pixels": ((4, 19, 64, 64), FP32, {"shard": True, "weight": True, "label_smoothing": 0.1}),
    "shard, pixels of more classes than registers hold": ((1, 4000, 16, 16), BF16, {"shard": True, "two_labels": True}),
    "shard, probabilities": ((64, 50257), BF16, {"shard": True, "probabilities": BF16, "weight": True, "label_smoothing": 0.1}),
    "shard, probabilities, pixels": ((4, 19, 64, 64), FP32, {"shard": True, "probabilities": FP32, "weight": True}),
    "pixels of many classes, smoothing": ((4, 104, 64, 64), FP32, {"weight": True, "label_smoothing": 0.1}),
    "pixels of many classes, recompute": (
        (4, 104, 64, 64),
        FP32,
        {"weight": True, "label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-3, "reduction": "none"},
    ),
}
# What cannot be read 16 bytes at a time: rows of 101, of which no thread can hold four; 40950 gradients, where they are scaled.
NARROW = {"ragged shared tile", "ticket, odd batch"}
READS_NO_LOGITS = {"denominator_kernel", "finish_kernel", "digit_kernel", "selected_kernel"}


def call(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    options = dict(options)
    logits = torch.empty(shape, dtype=dtype)  # nobody looks at the values
    if options.pop("transpose", False):
        logits, shape = logits.t(), shape[::-1]
    if options.pop("padded", False):
        logits = torch.empty(shape[0], shape[1] + 28, dtype=dtype)[:, : shape[1]]
    logits.requires_grad_()
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    if options.pop("scale", False):
        options["scale"] = torch.ones(())
    probabilities = options.pop("probabilities", None)  # their dtype
    if probabilities is not None:
        target = torch.empty_like(logits, dtype=probabilities, requires_grad=False)
    is_shard = options.pop("shard", False)
    n_classes = shape[1] * (3 if is_shard else 1)
    weight = torch.ones(n_classes, dtype=dtype) if options.pop("weight", False) else None
    if options.pop("two_labels", False):
        target = (target, target, 0.5)
    if is_shard:
        return _shard(logits.detach(), target, weight, ClassShard(shape[1], n_classes), options)
    if options.pop("sample_weight", False):
        options["sample_weight"] = torch.ones(shape[0])
    result = fusedloss.cross_entropy(logits, target, weight, **options)
    return result[0] if options.get("return_stats") else result


def _shard(
    logits: torch.Tensor, target: Any, weight: torch.Tensor | None, shard: ClassShard, options: dict[str, Any]
) -> torch.Tensor:
    """The second of three shards of the classes: its statistics and its gradient."""
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        target = target.repeat_interleave(3, 1)
    inputs, given = shard_call(logits, target, weight, shard, **options)
    merged = triton.shard_statistics(inputs, given, shard)
    triton.shard_gradient(merged[0], inputs, merged, 1.0, given, shard)
    return torch.zeros((), requires_grad=True)  # whose backward launches nothing
