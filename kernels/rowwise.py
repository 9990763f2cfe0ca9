"""What every kernel does with a row: its loss from the row's statistics, its coefficient and its factors in the gradient.

For logits x of one row, target t, class weights w, smoothing eps over C classes:

    m    = max_c x_c                          rest = sum_{c != t} exp(x_c - m)
    e_t  = exp(x_t - m)                       d    = rest + e_t           p_c = exp(x_c - m) / d
    nll  = -log p_t = (m - x_t) + log d       log d = log1p(rest) where x_t is the maximum
    loss = (1 - eps) w_t nll + eps/C sum_c w_c nll_c
    dloss/dx_c = (1 - eps) w_t (p_c - [c = t]) + eps/C (W p_c - w_c)          W = sum_c w_c

The extras put a factor and a term around this, s the row's weight: loss' = s (loss + z_loss lse^2), lse = m + log d, whose
gradient is s (dloss/dx_c + 2 z_loss lse p_c). Two labels a and b with shares lam and 1 - lam have w_t nll = lam w_a nll_a +
(1 - lam) w_b nll_b; the one kept out of rest is a. All of this is in terms of z, where the logits are transformed: z_c is
logit_scale x_c, then softcap tanh(z_c / softcap), and dloss/dx_c = dloss/dz_c logit_scale (1 - (z_c / softcap)^2).

A focal loss is that of one label times u^gamma, u = 1 - p_t = rest / d. It is the same with another w_t: w_t u^gamma in the loss,
and in the gradient w_t (u^gamma + gamma u^(gamma - 1) p_t nll) = w_t u^gamma (1 + gamma nll e_t / rest).

Class probabilities q_c as target make a factor for every class of a row, a_c = w_c ((1 - eps) q_c + eps/C), A = sum_c a_c, as
smoothing does with eps/C w_c. There is no t, and rest is d:

    loss = sum_c a_c nll_c = A log d + sum_c a_c (m - x_c)          dloss/dx_c = A p_c - a_c

In statistics weight_total is A, with smoothing W; smooth_sum is sum_c a_c (m - x_c), with smoothing sum_c w_c (m - x_c).

Statistics have the entropy of a row's probabilities, H = -sum_c p_c log p_c. With G = sum_{c != t} exp(x_c - m) (m - x_c),

    H = log d + (G + e_t (m - x_t)) / d

of which no term is negative: nothing cancels, however sure the row is. Under a larger maximum m', G becomes
(G + rest (m' - m)) exp(m - m'). A logit of -inf has no part in it.

Three choices keep it exact. The loss is (m - x_t) + log d, never lse - x_t: a common offset of the logits, say 1e4, would
leave no digits of the difference. The target is kept out of the sum: log1p(rest) is right down to 1e-38 where log(d) is 0.
The gradient of the target is -rest / d for the same reason, where p_t - 1 would be 0.

The gradient, with g the upstream gradient times the row's coefficient, g_t = g (1 - eps) w_t, s_c = g eps/C w_c, S = sum_c s_c:

    dlogits_c = (g_t + S) p_c - s_c           for c != t
    dlogits_t = S p_t - s_t - g_t rest / d    since p_t - 1 = -rest / d without cancellation

A z_loss adds 2 g z_loss lse to S where it multiplies p_c. Of two labels the first is t; the second, with its own g_b, adds that
to S in the same way, and has dlogits_b = (g_t + g_b + S) p_b - s_b - g_b. Class probabilities have no t: s_c = g a_c, whose sum S
the forward has saved for every row. A transform of the logits multiplies all by its derivative.

The buffer `saved` links the kernels. It has the accumulation dtype (float32; float64 for float64 logits), 4 + 3 n_rows values,
with class probabilities 4 + 4 n_rows:

    [0] coefficient of a row's loss in the scaled batch loss: scale, or scale / denominator; for max and topk of a row above [2]
    [1] for max and topk: coefficient of a row that ties with [2]
    [2] for max and topk: the smallest selected loss
    [3] W, with label smoothing
    [4 : 4 + n_rows] m        [4 + n_rows : 4 + 2 n_rows] rest        [4 + 2 n_rows : 4 + 3 n_rows] loss, -inf: does not count
    [4 + 3 n_rows :] A, with class probabilities

What a loss has not is 0. A launch whose caller gets no `saved` is given a head alone, of which it writes [0].
"""

import triton
import triton.language as tl

from . import constants
from .groups import Factors, Terms
from .keys import sortable_bits
from .label import all_classes, weighted

STATE = tl.constexpr(constants.STATE)


@triton.jit
def load_terms(inputs, numbers, scale, lam, dtype: tl.constexpr):
    """The numbers of the loss, in the dtype of accumulation; the caller's own scale, which may be a tensor, with the rest."""
    return Terms(
        scale=load_scale(inputs, scale, dtype),
        lam=tl.full((), lam, dtype),
        smoothing=_load_number(numbers.smoothing, dtype),
        z_loss=_load_number(numbers.z_loss, dtype),
        logit_scale=_load_number(numbers.logit_scale, dtype),
        softcap=_load_number(numbers.softcap, dtype),
        focal_gamma=_load_number(numbers.focal_gamma, dtype),
    )


@triton.jit
def _load_number(number, dtype: tl.constexpr):
    """0 where the loss has none."""
    if number is None:
        value = tl.full((), 0.0, dtype)
    elif dtype == tl.float64:
        value = tl.cast(tl.cast(number, tl.int64), dtype, bitcast=True)  # small integers arrive as int32
    else:
        value = tl.full((), number, dtype)
    return value


@triton.jit
def load_scale(inputs, scale, dtype: tl.constexpr):
    scale = tl.full((), scale, dtype)
    if inputs.scale is not None:
        scale *= tl.load(inputs.scale).to(dtype)
    return scale


@triton.jit
def transform_logits(x, terms, asks: tl.constexpr):
    """z, see above."""
    if asks.logit_scale:
        x = x * terms.logit_scale
    if asks.softcap:
        x = terms.softcap * tanh(x / terms.softcap)
    return x


@triton.jit
def through_transform(dz, z, terms, asks: tl.constexpr):
    """The gradient of x from that of z."""
    if asks.softcap:
        t = z / terms.softcap
        dz = dz * (1.0 - t * t)
    if asks.logit_scale:
        dz = dz * terms.logit_scale
    return dz


@triton.jit
def tanh(y):
    """Cephes' tanhf and tanh (Moshier 1989): of a small number a polynomial, or nothing would be left of its digits."""
    s = y * y
    if y.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
        q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
        p = p / q
    else:
        p = (-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2
        p = (p * s + 1.33314422036e-1) * s - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
    return tl.where(tl.abs(y) < 0.625, y + y * s * p, tl.where(y < 0, -large, large))


@triton.jit
def class_weights(q, cols, in_row, problem, asks: tl.constexpr):
    """w of each column, or a of class probabilities q; 0 outside of the row."""
    dtype: tl.constexpr = problem.terms.lam.dtype
    w = tl.cast(in_row, dtype)
    if asks.probabilities:
        w = q.to(dtype)
        if asks.smoothing:
            smoothing = problem.terms.smoothing
            w = tl.where(in_row, (1.0 - smoothing) * w + smoothing / all_classes(problem, asks), 0.0)
        if problem.inputs.weight is not None:
            w *= _load_weights(cols, in_row, problem, asks)
    elif problem.inputs.weight is not None:
        w = _load_weights(cols, in_row, problem, asks)
    return w


@triton.jit
def _load_weights(cols, in_row, problem, asks: tl.constexpr):
    classes = cols
    if asks.sharded:
        classes = cols + problem.shard.first_class
    return tl.load(problem.inputs.weight + classes, mask=in_row, other=0.0).to(problem.terms.lam.dtype)


@triton.jit
def finite_max(row_max):
    """The maximum as a shift for exp: all classes seen so far may be -inf, and -inf - -inf would be NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def target_exp(stats, asks: tl.constexpr):
    """e_t; 0 with class probabilities, where rest is all of d."""
    if asks.probabilities:
        e_t = tl.zeros_like(stats.rest)
    else:
        e_t = tl.exp(stats.x_t - stats.max)
    return e_t


@triton.jit
def _log_sum(stats, d):
    """log d."""
    # Where x_t is the maximum, e_t is 1 and the loss log1p(rest): log(d) rest / (d - 1) cancels the rounding of d = 1 + rest
    # (Kahan, HP-15C handbook); it is rest itself once d is 1.
    correction = tl.where(d == 1.0, 1.0, stats.rest / (d - 1.0))
    corrected = tl.where(d == 1.0, stats.rest, tl.log(d) * correction)
    return tl.where((stats.x_t == stats.max) & (d < float("inf")), corrected, tl.log(d))


@triton.jit
def _row_nll(stats, e_t):
    """-log p_t of each row."""
    log_d = _log_sum(stats, stats.rest + e_t)
    # (m - x_t) is 0 at the maximum, and NaN where both are infinite, as PyTorch has it.
    return (stats.max - stats.x_t) + log_d


@triton.jit
def _focal_power(stats, e_t, terms):
    """u^gamma; 0 where rest is 0."""
    return tl.exp(terms.focal_gamma * tl.log(stats.rest / (stats.rest + e_t)))


@triton.jit
def row_loss(stats, label, rows, problem, asks: tl.constexpr):
    """Loss of each row: 0 where it does not count, NaN where a class index is out of range."""
    terms = problem.terms
    e_t = target_exp(stats, asks)
    log_d = tl.log(stats.rest + e_t)
    if asks.probabilities:
        loss = stats.weight_total * log_d + stats.smooth_sum
    else:
        nll = _row_nll(stats, e_t)
        loss = label.weight * nll
        if asks.focal_gamma:
            loss *= _focal_power(stats, e_t, terms)
        if asks.two_labels:  # a label without a share does not enter, though its logit be -inf
            nll_b = (stats.max - stats.x_b) + log_d
            loss = tl.where((label.weight == 0.0) & (nll == float("inf")), 0.0, loss)
            loss += tl.where((label.weight_b == 0.0) & (nll_b == float("inf")), 0.0, label.weight_b * nll_b)
        if asks.smoothing:
            log_sum = (stats.max - stats.shift) + log_d
            smooth_loss = stats.weight_total * log_sum + stats.smooth_sum
            loss = (1.0 - terms.smoothing) * loss + (terms.smoothing / all_classes(problem, asks)) * smooth_loss
    if asks.z_loss:
        lse = stats.max + log_d
        loss += terms.z_loss * lse * lse
    loss = weighted(loss, rows, label, problem.inputs)
    return tl.where(label.valid, loss, tl.where(label.counted, float("nan"), 0.0))


@triton.jit
def row_lse(stats, label, asks: tl.constexpr):
    e_t = target_exp(stats, asks)
    if not asks.probabilities:
        e_t = tl.where(stats.x_t == stats.max, 1.0, e_t)  # though both be infinite
    return tl.where(label.valid, stats.max + tl.log(stats.rest + e_t), float("nan"))


@triton.jit
def gap_terms(e, shift, x):
    """exp(x - m) (m - x), the terms of G; e: the exponential, 0 where x has no part in it. shift: m, finite."""
    return tl.where(e == 0.0, 0.0, e * (shift - x))


@triton.jit
def moved_gap_sum(stats, finite):
    """G under a larger maximum."""
    return (stats.gap_sum + stats.rest * (finite - finite_max(stats.max))) * tl.exp(stats.max - finite)


@triton.jit
def row_entropy(stats, label, asks: tl.constexpr):
    e_t = target_exp(stats, asks)
    d = stats.rest + e_t
    gap_sum = stats.gap_sum
    if asks.probabilities:
        log_d = tl.log(d)
    else:
        log_d = _log_sum(stats, d)
        gap_sum += gap_terms(e_t, stats.max, stats.x_t)
    return tl.where(label.valid, log_d + gap_sum / d, float("nan"))


@triton.jit
def has_largest(stats, label, lse, asks: tl.constexpr):
    """Whether the target, or that of two labels which has the larger share, has the largest logit; a NaN, which the maximum
    passes over and lse does not, would be larger."""
    largest = stats.x_t == stats.max
    if asks.two_labels:
        largest = (largest & (label.lam >= 0.5)) | ((stats.x_b == stats.max) & (label.lam <= 0.5))
    return largest & (lse == lse)


@triton.jit
def row_coefficient(saved_ptr, dloss_ptr, rows, exist, n_rows, asks: tl.constexpr):
    """dL/d(loss of the row), upstream gradient and scale included."""
    dtype: tl.constexpr = saved_ptr.dtype.element_ty
    coefficient = tl.full((), 1.0, dtype) if asks.sharded else tl.load(saved_ptr)
    if asks.reduction == "none":
        coefficient *= tl.load(dloss_ptr + rows, mask=exist, other=0.0).to(coefficient.dtype)
    else:
        upstream = tl.load(dloss_ptr).to(coefficient.dtype)
        coefficient *= upstream
    if asks.reduction == "max" or asks.reduction == "topk":
        loss = tl.load(saved_ptr + STATE + 2 * n_rows + rows, mask=exist, other=float("-inf"))
        key, threshold = sortable_bits(loss), sortable_bits(tl.load(saved_ptr + 2))
        tied = tl.load(saved_ptr + 1) * upstream
        # A row that is not selected has 0, not 0 times an infinite upstream gradient.
        coefficient = tl.where(key > threshold, coefficient, tl.where(key == threshold, tied, 0.0))
    return tl.where(exist, coefficient, 0.0)


@triton.jit
def gradient_factors(stats, label, g, problem, asks: tl.constexpr):
    """What makes the gradient of a row from exp(x_c - m), derivation above; g: its coefficient.

    NaN where the class index is out of range; 0 where the row does not count or g is 0.
    """
    terms = problem.terms
    # 0 times an infinite or NaN statistic would be NaN.
    missing = tl.where(label.counted & (g != 0), float("nan"), 0.0).to(g.dtype)
    live = label.valid & (g != 0)
    e_t = target_exp(stats, asks)
    d = stats.rest + e_t
    g_t, g_b, smooth, everywhere = g * label.weight, g * 0.0, g * 0.0, g * 0.0  # everywhere: S, what the target has, too
    if asks.focal_gamma:
        odds = e_t / stats.rest
        # Where p_t is 1 the limit, and where it is 0, not 0 times infinity.
        slope = tl.where(odds == float("inf"), 1.0, tl.where(odds == 0.0, 0.0, odds * _row_nll(stats, e_t)))
        g_t *= _focal_power(stats, e_t, terms) * (1.0 + terms.focal_gamma * slope)
    if asks.two_labels:
        g_b = g * label.weight_b
    if asks.probabilities:
        g_t, smooth, everywhere = g * 0.0, g, g * stats.weight_total
    elif asks.smoothing:
        g_t, g_b = g_t * (1.0 - terms.smoothing), g_b * (1.0 - terms.smoothing)
        smooth = g * (terms.smoothing / all_classes(problem, asks))
        everywhere = smooth * stats.weight_total
    if asks.z_loss:
        everywhere += 2.0 * g * terms.z_loss * (stats.max + tl.log(d))
    everywhere += g_b
    p = (g_t + everywhere) / d
    if asks.every_class or asks.z_loss or asks.two_labels:
        everywhere *= e_t / d
    # Else S is 0, or NaN of an infinite g, and so is its product with a probability, which would take a division.
    at_target = everywhere - g_t * (stats.rest / d)
    at_b = missing
    if asks.two_labels:
        at_b = tl.where(live, p * tl.exp(stats.x_b - stats.max) - g_b, missing)
    return Factors(
        live=live,
        p=tl.where(live, p, missing),
        at_target=tl.where(live, at_target, missing),
        at_b=at_b,
        smooth=tl.where(live, smooth, missing),
    )
