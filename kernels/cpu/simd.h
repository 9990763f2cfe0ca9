// Vectors of the accumulation type A, loads and stores of the four logit types, and exp.
//
// Written with the vector extensions that GCC and Clang share: the compiler lowers them to AVX-512, AVX2, SSE2 or NEON. Where
// GCC 12 makes ten instructions of what is one (maxima, conversions of 16-bit floats), an intrinsic stands beside. Included
// once per instruction set, in a namespace of its own and after the target pragma; nothing here has external linkage, or the
// linker might keep an AVX-512 copy of an inline function for a machine without it.
//
// exp(x), x <= 0: n = round(x log2 e), r = x - n ln 2 in two parts, |r| <= ln(2)/2, exp(x) = 2^n p(r) with 2^n from the bits of
// n. Near the smallest normal number and below the result is 0. NaN stays NaN.

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))
// Before a loop over the lanes of a vector: with -O2, GCC leaves it a loop, through memory.
#define UNROLL _Pragma("GCC unroll 16")

template <class A>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int W = FUSEDLOSS_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef int32_t Int;
  typedef int32_t I __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));
  typedef int64_t Longs __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES * 2)));
};
template <>
struct Simd<double> {
  static constexpr int W = FUSEDLOSS_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef int64_t Int;
  typedef int64_t I __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef I Longs;
  typedef float Floats __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));
};
using F = Simd<float>;

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <class To, class From>
INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
constexpr A kInfinity = A(__builtin_inff());
template <class A>
constexpr A kNaN = A(__builtin_nanf(""));

// ---- conversions, one element or one vector of them: U is uint32_t or a vector of it, S float or a vector of it ----

template <class S, class U>
INLINE S float_from_half_bits(U h) {
  // Moves exponent and mantissa into place and multiplies by 2^112, which also normalises subnormal numbers.
  U shifted = (h & 0x7fffu) << 13;
  S scaled = bit_cast<S>(shifted) * 0x1p112f;
  U infinite = U((h & 0x7fffu) >= 0x7c00u);
  U all = U{} - (infinite & 1u);  // comparisons give 1 for scalars and ~0 for vectors
  return bit_cast<S>(bit_cast<U>(scaled) | ((h & 0x8000u) << 16) | (all & 0x7f800000u));
}

template <class U, class S>
INLINE U half_bits_from_float(S x) {
  // After M. Dukhan's FP16 library: the additions round to nearest even at the half's last bit, subnormals included.
  U bits = bit_cast<U>(x);
  U sign = bits & 0x80000000u;
  S base = bit_cast<S>(U(bits & 0x7fffffffu)) * 0x1p112f * 0x1p-110f;
  U bias = (bits + bits) & 0xff000000u;
  U floor = U{} + 0x71000000u;
  bias = bias < floor ? floor : bias;
  base = bit_cast<S>(U((bias >> 1) + 0x07800000u)) + base;
  U rounded = bit_cast<U>(base);
  U nonsign = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  U nan = U{} + 0x7e00u;
  return (sign >> 16) | ((bits + bits) > 0xff000000u ? nan : nonsign);
}

template <class U>
INLINE U bfloat16_bits_from_float_bits(U bits) {
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  U nan = U{} + 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

INLINE float load1(const float* p) { return *p; }
INLINE double load1(const double* p) { return *p; }
INLINE float load1(const bfloat16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
INLINE float load1(const float16* p) { return float_from_half_bits<float, uint32_t>(p->bits); }
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(double* p, double x) { *p = x; }
INLINE void store1(bfloat16* p, float x) { p->bits = uint16_t(bfloat16_bits_from_float_bits(bit_cast<uint32_t>(x))); }
INLINE void store1(float16* p, float x) { p->bits = uint16_t(half_bits_from_float<uint32_t, float>(x)); }

INLINE F::V load(const float* p) {
  F::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE Simd<double>::V load(const double* p) {
  Simd<double>::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, F::V v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(double* p, Simd<double>::V v) { __builtin_memcpy(p, &v, sizeof v); }
#if FUSEDLOSS_VECTOR_BYTES == 64
INLINE F::V load(const bfloat16* p) {
  return bit_cast<F::V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F::V load(const float16* p) { return (F::V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(bfloat16* p, F::V v) {
#ifdef FUSEDLOSS_HAS_BF16
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);  // one instruction for ten; flushes subnormal numbers
#else
  const __m256i half = _mm512_cvtepi32_epi16((__m512i)bfloat16_bits_from_float_bits(bit_cast<F::U>(v)));
#endif
  _mm256_storeu_si256((__m256i*)p, half);
}
INLINE void store(float16* p, F::V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
INLINE F::V load(const bfloat16* p) {
  return bit_cast<F::V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F::V load(const float16* p) { return (F::V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(bfloat16* p, F::V v) {
  const __m256i bits = (__m256i)bfloat16_bits_from_float_bits(bit_cast<F::U>(v));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
INLINE void store(float16* p, F::V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE F::V load(const bfloat16* p) {
  F::Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return bit_cast<F::V>(__builtin_convertvector(h, F::U) << 16);
}
INLINE F::V load(const float16* p) {
  F::Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return float_from_half_bits<F::V, F::U>(__builtin_convertvector(h, F::U));
}
INLINE void store(bfloat16* p, F::V v) {
  F::Half h = __builtin_convertvector(bfloat16_bits_from_float_bits(bit_cast<F::U>(v)), F::Half);
  __builtin_memcpy(p, &h, sizeof h);
}
INLINE void store(float16* p, F::V v) {
  F::Half h = __builtin_convertvector(half_bits_from_float<F::U, F::V>(v), F::Half);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

template <class A>
INLINE typename Simd<A>::V broadcast(A a) {
  return typename Simd<A>::V{} + a;
}

// ---- selects, and the ragged end of a row ----

template <class A>
using Vector = typename Simd<A>::V;
template <class A>
using Integers = typename Simd<A>::I;

// a > b ? a : b, which is b where either is NaN. GCC 12 makes a comparison and a blend of the ternary.
#if FUSEDLOSS_VECTOR_BYTES == 64
INLINE F::V max_(F::V a, F::V b) { return (F::V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Simd<double>::V max_(Simd<double>::V a, Simd<double>::V b) {
  return (Simd<double>::V)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
INLINE F::V max_(F::V a, F::V b) { return (F::V)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Simd<double>::V max_(Simd<double>::V a, Simd<double>::V b) {
  return (Simd<double>::V)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#else
template <class V>
INLINE V max_(V a, V b) {
  return a > b ? a : b;
}
#endif

template <class A>
INLINE Integers<A> iota() {
  static constexpr typename Simd<A>::Int lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Integers<A> v;
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}

template <class A, class T>
INLINE Vector<A> load_partial(const T* x, int64_t n) {  // lanes from n on are 0
  T values[Simd<A>::W] = {};
  __builtin_memcpy(values, x, size_t(n) * sizeof(T));
  return load(values);
}

template <class A, class T>
INLINE void store_partial(T* x, int64_t n, Vector<A> v) {
  T values[Simd<A>::W];
  store(values, v);
  __builtin_memcpy(x, values, size_t(n) * sizeof(T));
}

template <class A>
INLINE A horizontal_sum(Vector<A> v) {
  A lanes[Simd<A>::W];
  store(lanes, v);
  for (int width = Simd<A>::W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class A>
INLINE A horizontal_max(Vector<A> v) {
  A lanes[Simd<A>::W];
  store(lanes, v);
  for (int width = Simd<A>::W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

#if FUSEDLOSS_VECTOR_BYTES == 64
template <>
INLINE Vector<float> load_partial<float, float>(const float* x, int64_t n) {
  return (F::V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x);
}
template <>
INLINE Vector<float> load_partial<float, bfloat16>(const bfloat16* x, int64_t n) {
  __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x);
  return bit_cast<F::V>(__builtin_convertvector((F::Half)half, F::U) << 16);
}
template <>
INLINE void store_partial<float, float>(float* x, int64_t n, F::V v) {
  _mm512_mask_storeu_ps(x, __mmask16((1u << n) - 1), (__m512)v);
}
template <>
INLINE float horizontal_sum<float>(F::V v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
INLINE float horizontal_max<float>(F::V v) {
  return _mm512_reduce_max_ps((__m512)v);
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
// Through memory, as above, these cost more than the sums of a row of 100 classes.
INLINE __m256i first_lanes(int64_t n) { return (__m256i)(iota<float>() < int32_t(n)); }
template <>
INLINE Vector<float> load_partial<float, float>(const float* x, int64_t n) {
  return (F::V)_mm256_maskload_ps(x, first_lanes(n));
}
template <>
INLINE void store_partial<float, float>(float* x, int64_t n, F::V v) {
  _mm256_maskstore_ps(x, first_lanes(n), (__m256)v);
}
template <>
INLINE float horizontal_sum<float>(F::V v) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}
template <>
INLINE float horizontal_max<float>(F::V v) {  // of no NaN: max_ has left them out
  const __m128 halves = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pairs = _mm_max_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_max_ss(pairs, _mm_movehdup_ps(pairs)));
}
#endif

// ---- exp, log ----

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
  // Taylor to degree 13: the remainder, 0.347^14 / 14!, is below 2^-57.
  D::V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  return p * bit_cast<D::V>(bit_cast<D::U>(shifted) << 52);
}

// log(x) for x >= 1; NaN stays NaN. After Cephes logf: x = 2^e m, m in [sqrt(1/2), sqrt(2)), log m = f - f^2/2 + f^3 p(f).
INLINE F::V log_(F::V x) {
  F::U bits = bit_cast<F::U>(x);
  F::U offset = bits - 0x3f3504f3u;  // of sqrt(1/2)
  F::V e = __builtin_convertvector(bit_cast<F::I>(offset) >> 23, F::V);
  F::V f = bit_cast<F::V>((offset & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  F::V f2 = f * f, f4 = f2 * f2;  // in pairs (Estrin 1960): one term after the other would take twice the time
  F::V p01 = f * -2.4999993993e-1f + 3.3333331174e-1f, p23 = f * -1.6668057665e-1f + 2.0000714765e-1f;
  F::V p45 = f * -1.2420140846e-1f + 1.4249322787e-1f, p67 = f * -1.1514610310e-1f + 1.1676998740e-1f;
  F::V p = (f4 * 7.0376836292e-2f + (p67 * f2 + p45)) * f4 + (p23 * f2 + p01);
  F::V low = p * (f2 * f) - e * 2.12194440e-4f - 0.5f * f2;
  return (low + f + e * 0.693359375f) + (x - x);
}
INLINE Simd<double>::V log_(Simd<double>::V x) {
  for (int i = 0; i < Simd<double>::W; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// log(1 + x) for x >= 0 to the last bits: log(u) x / (u - 1) cancels the rounding of u = 1 + x (HP-15C handbook, Kahan).
INLINE F::V log1p_(F::V x) {
  F::V u = x + 1.0f, excess = u - 1.0f;
  F::I tiny = excess == F::V{};
  F::V one = F::V{} + 1.0f;
  return tiny ? x : log_(u) * (x / (tiny ? one : excess));
}
INLINE Simd<double>::V log1p_(Simd<double>::V x) {
  for (int i = 0; i < Simd<double>::W; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
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
