"""The arithmetic of a GPU in Triton's interpreter: exp and division that are off by a few last places, by which the kernels must
not be thrown.

PTX promises ex2.approx.f32 to 2^-22 and div.full.f32 to 2 ulp, at most the same; numpy, by which the interpreter computes, rounds
both correctly. `pytest --noise 2` adds errors of up to twice what PTX promises to every result. An error is a function of the
result's bits: a GPU makes the same of the same numbers, too.
"""

from typing import Any

import numpy as np
from triton.runtime import interpreter

PROMISED = 2.0**-22  # relative error of exp and division
EXACT = (0.0, 1.0)  # results that a GPU does not miss: exp of what is far below 0, and of 0
LOG2_E = np.float32(1.4426950408889634)


def install(noise: float) -> None:
    """Replaces exp and division of the interpreter, for the rest of the process."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    divide, exp = builder.create_fdiv, builder.create_exp

    def noisy_exp(self: Any, argument: Any) -> Any:
        if argument.data.dtype != np.float32:
            return exp(self, argument)
        rounded = (argument.data * LOG2_E).astype(np.float32)  # a GPU has exp2 only: what it gets is rounded already
        result = np.exp2(rounded.astype(np.float64)).astype(np.float32)
        return handle(with_noise(result, noise * PROMISED), argument.dtype.scalar)

    def noisy_divide(self: Any, numerator: Any, denominator: Any) -> Any:
        result = divide(self, numerator, denominator)
        if result.data.dtype != np.float32:
            return result
        return handle(with_noise(result.data, noise * PROMISED), result.dtype.scalar)

    builder.create_exp, builder.create_fdiv = noisy_exp, noisy_divide


def with_noise(values: np.ndarray, largest: float) -> np.ndarray:
    """float32 values times 1 + error, |error| <= largest."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    mixed = (bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # Fibonacci hashing: 24 bits
    errors = largest * (mixed.astype(np.float64) / 2.0**23 - 1.0)
    kept = np.isin(values, EXACT) | ~np.isfinite(values)
    return np.where(kept, values, (values * (1.0 + errors)).astype(np.float32))
