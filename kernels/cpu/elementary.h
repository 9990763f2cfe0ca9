// exp, log, log1p and tanh of vectors, and what keeps them finite. Included once per instruction set, like simd.h.
//
// exp(x), x <= 0: n = round(x log2 e), r = x - n ln 2 in two parts, |r| <= ln(2)/2, exp(x) = 2^n p(r) with 2^n from the bits of
// n. Near the smallest normal number and below the result is 0. NaN stays NaN.

INLINE F::V exp_nonpositive(F::V x) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-87.33654f), _CMP_NLT_UQ);
  F::V clamped = x;  // whatever comes of smaller values is masked below
#else
  F::V clamped = max_(broadcast(-88.0f), x);  // n = -127, and the bits of 2^n are those of 0
#endif
  F::V shifted = clamped * 1.44269504f + 12583039.0f;  // 1.5 * 2^23 + 127: rounds, and leaves n + 127 in the low bits
  F::V n = shifted - 12583039.0f;
  F::V r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  // Minimax for exp on |r| <= ln(2)/2 with the first two coefficients 1: 3e-9 relative, 0.63 ulp in all once rounded.
  F::V p = r * 1.38145406e-3f + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if FUSEDLOSS_VECTOR_BYTES == 64
  // A subnormal result would cost a microcode assist of 150 cycles: 100 classes took 3 times as long for the padding alone.
  return (F::V)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  return p * bit_cast<F::V>(bit_cast<F::U>(shifted) << 23);
#endif
}

INLINE Simd<double>::V exp_nonpositive(Simd<double>::V x) {
  using D = Simd<double>;
  D::V clamped = max_(broadcast(-709.0), x);                         // n = -1023, and the bits of 2^n are those of 0
  D::V shifted = clamped * 1.4426950408889634 + 6755399441056767.0;  // 1.5 * 2^52 + 1023
  D::V n = shifted - 6755399441056767.0;
  D::V r = clamped - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  // Minimax on |r| <= ln(2)/2 with the first two coefficients 1: 2^-57 relative.
  D::V p = r * 2.5000018833187374e-08 + 2.76303062502936e-07;
  p = p * r + 2.7557586803895326e-06;
  p = p * r + 2.480149294963387e-05;
  p = p * r + 0.00019841269505773776;
  p = p * r + 0.0013888888943759965;
  p = p * r + 0.008333333333494976;
  p = p * r + 0.041666666666529725;
  p = p * r + 0.1666666666666641;
  p = p * r + 0.5000000000000011;
  p = p * (r * r) + r + 1.0;
  return p * bit_cast<D::V>(bit_cast<D::U>(shifted) << 52);
}

// What log() takes from the bits of x >= 1: x = 2^e m, f = m - 1, m in [sqrt(1/2), sqrt(2)).
template <class A>
struct LogParts;
template <>
struct LogParts<float> {
  F::V e, f, inverse;  // inverse: 2^-e
  explicit INLINE LogParts(F::V x) {
    const F::U offset = bit_cast<F::U>(x) - 0x3f3504f3u;  // of sqrt(1/2)
    e = __builtin_convertvector(bit_cast<F::I>(offset) >> 23, F::V);
    f = bit_cast<F::V>((offset & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    inverse = bit_cast<F::V>(0x3f800000u - (offset & 0xff800000u));
  }
};
template <>
struct LogParts<double> {
  Simd<double>::V e, f, inverse;
  explicit INLINE LogParts(Simd<double>::V x) {
    using D = Simd<double>;
    const D::U offset = bit_cast<D::U>(x) - 0x3fe6a09e667f3bcdull;
    // 2^52 + e from its bits: AVX2 converts no 64-bit integers.
    e = bit_cast<D::V>((offset >> 52) | 0x4330000000000000ull) - 0x1p52;
    f = bit_cast<D::V>((offset & 0xfffffffffffffull) + 0x3fe6a09e667f3bcdull) - 1.0;
    inverse = bit_cast<D::V>(0x3ff0000000000000ull - (offset & 0xfff0000000000000ull));
  }
};

// log(x); NaN stays NaN. After Cephes logf: log m = f - f^2/2 + f^3 p(f).
INLINE F::V log_(F::V x, const LogParts<float>& parts) {
  const F::V f = parts.f, f2 = f * f, f4 = f2 * f2;  // in pairs (Estrin 1960): one term after the other would take twice the time
  F::V p01 = f * -2.4999993993e-1f + 3.3333331174e-1f, p23 = f * -1.6668057665e-1f + 2.0000714765e-1f;
  F::V p45 = f * -1.2420140846e-1f + 1.4249322787e-1f, p67 = f * -1.1514610310e-1f + 1.1676998740e-1f;
  F::V p = (f4 * 7.0376836292e-2f + (p67 * f2 + p45)) * f4 + (p23 * f2 + p01);
  F::V low = p * (f2 * f) - parts.e * 2.12194440e-4f - 0.5f * f2;
  return (low + f + parts.e * 0.693359375f) + (x - x);
}
// The same with the quotient and the polynomial of fdlibm's log: s = f / (2 + f), log m = f - f^2/2 + s (f^2/2 + R(s^2)).
INLINE Simd<double>::V log_(Simd<double>::V x, const LogParts<double>& parts) {
  using D = Simd<double>;
  const D::V e = parts.e, f = parts.f;
  D::V s = f / (f + 2.0), s2 = s * s, s4 = s2 * s2, half = 0.5 * (f * f);
  D::V even = ((s4 * 1.531383769920937332e-1 + 2.222219843214978396e-1) * s4 + 3.999999999940941908e-1) * s4;
  D::V odd = (((s4 * 1.479819860511658591e-1 + 1.818357216161805012e-1) * s4 + 2.857142874366239149e-1) * s4 +
              6.666666666666735130e-1) * s2;
  D::V low = half - (s * (half + (even + odd)) + e * 1.90821492927058770002e-10);
  return (e * 6.93147180369123816490e-1 - (low - f)) + (x - x);
}

template <class A>
INLINE Vector<A> log_(Vector<A> x) {
  return log_(x, LogParts<A>(x));
}
// log(1 + x) for x >= 0 to the last bits: log(u) + lost / u, where lost is what rounding took from u = 1 + x (Knuth's TwoSum). For
// 1 / u three terms of 1 / (1 + f) = 1 - f + f^2 - ... are enough: the fourth is below 1/10, and lost half a last unit.
template <class A>
INLINE Vector<A> log1p_(Vector<A> x) {
  const Vector<A> u = x + A(1), one = u - x, lost = (A(1) - one) + (x - (u - one));
  const LogParts<A> parts(u);
  return log_(u, parts) + lost * parts.inverse * (parts.f * parts.f + (A(1) - parts.f));
}

// tanh after Cephes: an odd polynomial, or quotient of two, keeps the digits of small values; beyond, (1 - e) / (1 + e), e =
// exp(-2 |x|).
INLINE F::V tanh_small(F::V x, F::V x2) {
  F::V p = x2 * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return p * (x2 * x) + x;
}
INLINE Simd<double>::V tanh_small(Simd<double>::V x, Simd<double>::V x2) {
  Simd<double>::V p = x2 * -9.64399179425052238628e-1 - 9.92877231001918586564e1;
  p = p * x2 - 1.61468768441708447952e3;
  Simd<double>::V q = x2 + 1.12811678491632931402e2;
  q = q * x2 + 2.23548839060100448583e3;
  q = q * x2 + 4.84406305325125486048e3;
  return p / q * (x2 * x) + x;
}
template <class A>
INLINE Vector<A> tanh_(Vector<A> x) {
  using U = typename Simd<A>::U;
  const U sign = bit_cast<U>(x) & bit_cast<U>(-Vector<A>{});  // broadcast() adds to 0, which makes 0.0 of -0.0
  const Vector<A> magnitude = bit_cast<Vector<A>>(bit_cast<U>(x) ^ sign), e = exp_nonpositive(magnitude * A(-2));
  const Vector<A> large = bit_cast<Vector<A>>(bit_cast<U>((A(1) - e) / (A(1) + e)) | sign);
  return magnitude < broadcast(A(0.625)) ? tanh_small(x, x * x) : large;
}

template <class A>
INLINE A exp_nonpositive1(A x) {
  return exp_nonpositive(broadcast(x))[0];
}

template <class A>
INLINE A finite_max(A m) {  // all classes may be -inf, and -inf - -inf would be NaN
  return m == -kInfinity<A> ? A(0) : m;
}
template <class A>
INLINE Vector<A> finite_max_vector(Vector<A> m) {
  const Vector<A> zero = {};
  return m == broadcast(-kInfinity<A>) ? zero : m;
}
