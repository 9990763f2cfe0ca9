"""What every kernel does with one row: its target, its loss from the row's statistics, its coefficient in the gradient.

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

Class probabilities q_c as target make a factor for every class of a row, a_c = w_c ((1 - eps) q_c + eps/C), A = sum_c a_c, as
smoothing does with eps/C w_c. There is no t, and rest is d:

    loss = sum_c a_c nll_c = A log d + sum_c a_c (m - x_c)          dloss/dx_c = A p_c - a_c

Three choices keep it exact. The loss is (m - x_t) + log d, never lse - x_t: a common offset of the logits, say 1e4, would
leave no digits of the difference. The target is kept out of the sum: log1p(rest) is right down to 1e-38 where log(d) is 0.
The gradient of the target is -rest / d for the same reason, where p_t - 1 would be 0.

The buffer `saved` links the kernels. It has the accumulation dtype (float32; float64 for float64 logits), 4 + 3 n_rows values,
with class probabilities 4 + 4 n_rows:

    [0] coefficient of a row's loss in the scaled batch loss: scale, or scale / denominator; for max and topk of a row above [2]
    [1] for max and topk: coefficient of a row that ties with [2]
    [2] for max and topk: the smallest selected loss
    [3] W, with label smoothing
    [4 : 4 + n_rows] m        [4 + n_rows : 4 + 2 n_rows] rest        [4 + 2 n_rows : 4 + 3 n_rows] loss, for max and topk
    [4 + 3 n_rows :] A, with class probabilities
"""

import triton
import triton.language as tl

STATE = tl.constexpr(4)  # scalars at the head of `saved`


@triton.jit
def float_from_bits(bits, dtype: tl.constexpr):
    """A host float passed as the int64 of its bits: Triton rounds float arguments to float32, too coarse for float64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def load_scale(scale_ptr, scale_bits, dtype: tl.constexpr):
    scale = float_from_bits(scale_bits, dtype)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr).to(dtype)
    return scale


@triton.jit
def load_target(target_ptr, rows, mask, ignore_index, n_cols):
    """Class index of each row, whether the row counts, and whether its index may be used as an address."""
    target = tl.load(target_ptr + rows, mask=mask, other=0).to(tl.int64)  # uint8 156 stays 156, it is not -100
    counted, valid = check_target(target, ignore_index, n_cols)
    return target, mask & counted, mask & valid


@triton.jit
def check_target(target, ignore_index, n_cols):
    """Whether a row counts, and whether its class index may be used as an address."""
    counted = target != ignore_index
    return counted, counted & (target >= 0) & (target < n_cols)


@triton.jit
def load_target_weight(weight_ptr, target, counted, valid, dtype: tl.constexpr):
    """w[t] of each row that counts, else 0."""
    if weight_ptr is not None:
        return tl.load(weight_ptr + target, mask=valid, other=0.0).to(dtype)
    return counted.to(dtype)


@triton.jit
def class_factors(q, cols, in_row, weight_ptr, smoothing, n_cols, dtype: tl.constexpr):
    """a_c of class probabilities, 0 outside of the row."""
    a = q.to(dtype)
    if smoothing is not None:
        a = tl.where(in_row, (1.0 - smoothing) * a + smoothing / n_cols, 0.0)
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(dtype)
    return a


@triton.jit
def load_second_label(
    target_b_ptr, lam_ptr, lam_bits, weight_ptr, rows, mask, target, counted, valid, target_weight, ignore_index, n_cols
):
    """The second of two labels, with what it makes of the first: (target_b, counted, valid, lam w_a, (1 - lam) w_b, lam).

    Where both labels are the same the first has all, and the second has the weight 0.
    """
    dtype: tl.constexpr = target_weight.dtype
    target_b, counted_b, valid_b = load_target(target_b_ptr, rows, mask, ignore_index, n_cols)
    counted = counted & counted_b
    valid = valid & valid_b
    lam = float_from_bits(lam_bits, dtype)
    if lam_ptr is not None:
        lam = tl.load(lam_ptr + rows, mask=mask, other=1.0).to(dtype)
    weight_a = tl.where(valid, lam * target_weight, 0.0)
    weight_b = (1.0 - lam) * load_target_weight(weight_ptr, target_b, counted, valid, dtype)
    same = target_b == target
    return target_b, counted, valid, tl.where(same, weight_a + weight_b, weight_a), tl.where(same, 0.0, weight_b), lam


@triton.jit
def load_sample_weight(sample_weight_ptr, rows, counted, dtype: tl.constexpr):
    """The factor of each row that counts: what the others have, NaN perhaps, must not enter."""
    return tl.load(sample_weight_ptr + rows, mask=counted, other=0.0).to(dtype)


@triton.jit
def transform_logits(x, logit_scale, softcap):
    """z, see above."""
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def through_transform(dz, z, logit_scale, softcap):
    """The gradient of x from that of z."""
    if softcap is not None:
        t = z / softcap
        dz = dz * (1.0 - t * t)
    if logit_scale is not None:
        dz = dz * logit_scale
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
def prove_alignment(n_inner, n_cols, outer_stride, row_stride, col_stride, ROWS_CONTIGUOUS: tl.constexpr, VECTOR: tl.constexpr):
    """The same values, as multiples of VECTOR that the compiler can see.

    Triton looks at an argument's divisibility by 16 only: 1000 columns of bfloat16 are whole 16-byte groups, but without the
    proof each would be loaded on its own. Masks need it too: they must be constant over a group.
    """
    outer_stride = (outer_stride // VECTOR) * VECTOR
    if ROWS_CONTIGUOUS:
        n_inner = (n_inner // VECTOR) * VECTOR
        col_stride = (col_stride // VECTOR) * VECTOR
    else:
        n_cols = (n_cols // VECTOR) * VECTOR
        row_stride = (row_stride // VECTOR) * VECTOR
    return n_inner, n_cols, outer_stride, row_stride, col_stride


@triton.constexpr_function
def elements_in_sector(ptr):
    """Elements in the 32 bytes that travel together between L2 and an SM."""
    return 256 // ptr.dtype.element_ty.primitive_bitwidth


@triton.jit
def finite_max(row_max):
    """The maximum as a shift for exp: all classes seen so far may be -inf, and -inf - -inf would be NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def row_nll(row_max, rest, x_t, e_t):
    """-log p_t of each row."""
    d = rest + e_t
    # Where x_t is the maximum, e_t is 1 and the loss log1p(rest): log(d) rest / (d - 1) cancels the rounding of d = 1 + rest
    # (Kahan, HP-15C handbook); it is rest itself once d is 1.
    correction = tl.where(d == 1.0, 1.0, rest / (d - 1.0))
    corrected = tl.where(d == 1.0, rest, tl.log(d) * correction)
    log_d = tl.where((x_t == row_max) & (d < float("inf")), corrected, tl.log(d))
    # (m - x_t) is 0 at the maximum, and NaN where both are infinite, as PyTorch has it.
    return (row_max - x_t) + log_d


@triton.jit
def row_loss(
    row_max,
    rest,
    x_t,  # None: class probabilities, whose a_c takes the place of w_c, and m that of the shift
    e_t,
    target_weight,
    shift,
    weight_total,
    smooth_sum,  # sum_c w_c (shift - x_c)
    smoothing,  # None: the three before are not read, of a class index
    n_cols,
    x_b=None,  # the second label's logit; None: there is one label
    weight_b=None,
    z_loss=None,
    sample_weight=None,
):
    """Loss of each row."""
    if x_t is not None:
        nll = row_nll(row_max, rest, x_t, e_t)
        loss = target_weight * nll
    log_d = tl.log(rest + e_t)
    if x_b is not None:  # a label without a share does not enter, though its logit be -inf
        nll_b = (row_max - x_b) + log_d
        loss = tl.where((target_weight == 0.0) & (nll == float("inf")), 0.0, loss)
        loss += tl.where((weight_b == 0.0) & (nll_b == float("inf")), 0.0, weight_b * nll_b)
    if x_t is None:
        loss = weight_total * log_d + smooth_sum
    elif smoothing is not None:
        log_sum = (row_max - shift) + log_d
        loss = (1.0 - smoothing) * loss + (smoothing / n_cols) * (weight_total * log_sum + smooth_sum)
    if z_loss is not None:
        lse = row_max + log_d
        loss += z_loss * lse * lse
    if sample_weight is not None:
        loss = sample_weight * loss
    return loss


@triton.jit
def has_largest(x_t, row_max, lse, x_b=None, lam=None):
    """Whether the target, or that of two labels which has the larger share, has the largest logit; a NaN, which `row_max` passes
    over and `lse` does not, would be larger."""
    largest = x_t == row_max
    if x_b is not None:
        largest = (largest & (lam >= 0.5)) | ((x_b == row_max) & (lam <= 0.5))
    return largest & (lse == lse)


@triton.jit
def sortable_bits(loss):
    """Unsigned integers in the order of the losses; every NaN is the greatest, -0.0 equals 0.0."""
    loss += 0.0
    if loss.dtype == tl.float64:
        bits = loss.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits | -0x8000000000000000).to(tl.uint64, bitcast=True)
        return tl.where(loss != loss, tl.full(loss.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64), key)
    else:
        bits = loss.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
        return tl.where(loss != loss, tl.full(loss.shape, 0xFFFFFFFF, tl.uint32), key)


@triton.jit
def loss_from_sortable_bits(key):
    """The inverse of sortable_bits."""
    if key.dtype == tl.uint64:
        bits = key.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits & 0x7FFFFFFFFFFFFFFF, ~bits).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits & 0x7FFFFFFF, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def row_coefficient(saved_ptr, dloss_ptr, rows, mask, n_rows, REDUCTION: tl.constexpr):
    """dL/d(loss of the row), upstream gradient and scale included."""
    coefficient = tl.load(saved_ptr)
    if REDUCTION == "none":
        upstream = tl.load(dloss_ptr + rows, mask=mask, other=0.0).to(coefficient.dtype)
    else:
        upstream = tl.load(dloss_ptr).to(coefficient.dtype)
    if REDUCTION == "max" or REDUCTION == "topk":
        loss = tl.load(saved_ptr + STATE + 2 * n_rows + rows, mask=mask, other=float("-inf"))
        key, threshold = sortable_bits(loss), sortable_bits(tl.load(saved_ptr + 2))
        tied = tl.load(saved_ptr + 1)
        coefficient = tl.where(key > threshold, coefficient, tl.where(key == threshold, tied, 0.0))
    return tl.where(mask, coefficient * upstream, 0.0)


@triton.jit
def gradient_factors(
    target_weight,  # None: class probabilities
    valid,
    counted,
    g,
    rest,
    e_t,
    smoothing,
    weight_total,
    n_cols,
    row_max=None,  # read with z_loss
    e_b=None,  # exp(x_b - m); None: there is one label
    weight_b=None,
    z_loss=None,
):
    """What multiplies exp(x_c - m), the target's own gradient before s_t, what multiplies w_c or a_c, and the second label's own.

    Derivation in backward.py. NaN where the class index is out of range; 0 where the row does not count or g is 0.
    """
    # 0 times an infinite or NaN statistic would be NaN.
    missing = tl.where(counted & (g != 0), float("nan"), 0.0).to(g.dtype)
    live = valid & (g != 0)
    factor_a = g * target_weight if target_weight is not None else g * 0.0
    factor_b = g * 0.0
    if e_b is not None:
        factor_b = g * weight_b
    smooth_factor = g * 0.0
    everywhere = g * 0.0  # what has p_c as its gradient at the target, too
    if target_weight is None:
        smooth_factor = g
        everywhere = g * weight_total
    elif smoothing is not None:
        factor_a *= 1.0 - smoothing
        factor_b *= 1.0 - smoothing
        smooth_factor = g * (smoothing / n_cols)
        everywhere = smooth_factor * weight_total
    d = rest + e_t
    if z_loss is not None:
        everywhere += 2.0 * g * z_loss * (row_max + tl.log(d))
    everywhere += factor_b
    p_factor = (factor_a + everywhere) / d
    at_target = everywhere * (e_t / d) - factor_a * (rest / d)
    at_b = missing
    if e_b is not None:
        at_b = tl.where(live, p_factor * e_b - factor_b, missing)
    return (
        tl.where(live, p_factor, missing),
        tl.where(live, at_target, missing),
        tl.where(live, smooth_factor, missing),
        at_b,
    )
