// Vectors of the accumulation type A, loads and stores of the four logit types.
//
// Written with the vector extensions that GCC and Clang share: the compiler lowers them to AVX-512, AVX2, SSE2 or NEON. Where
// GCC 12 makes ten instructions of what is one (maxima, conversions of 16-bit floats), an intrinsic stands beside. Included
// once per instruction set, in a namespace of its own and after the target pragma; nothing here has external linkage, or the
// linker might keep an AVX-512 copy of an inline function for a machine without it.

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
  // After M. Dukhan's FP16 library: the addition rounds at the half's last bit, subnormals included; to nearest even, but in a
  // thread that rounds otherwise.
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
INLINE F::V widened(const bfloat16*, __m256i bits) { return bit_cast<F::V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
INLINE F::V widened(const float16*, __m256i bits) { return (F::V)_mm512_cvtph_ps(bits); }
INLINE __m256i narrowed(const bfloat16*, F::V v) {
#ifdef FUSEDLOSS_HAS_BF16
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);  // one instruction for ten; flushes subnormal numbers
#else
  return _mm512_cvtepi32_epi16((__m512i)bfloat16_bits_from_float_bits(bit_cast<F::U>(v)));
#endif
}
INLINE __m256i narrowed(const float16*, F::V v) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class T>
INLINE F::V load(const T* p) {
  return widened(p, _mm256_loadu_si256((const __m256i*)p));
}
template <class T>
INLINE void store(T* p, F::V v) {
  _mm256_storeu_si256((__m256i*)p, narrowed(p, v));
}
// The first eight lanes and the last, which lie apart.
INLINE F::V load_halves(const float* first, const float* last) {
  return (F::V)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(first)), _mm256_loadu_ps(last), 1);
}
INLINE void store_halves(float* first, float* last, F::V v) {
  _mm256_storeu_ps(first, _mm512_castps512_ps256((__m512)v)), _mm256_storeu_ps(last, _mm512_extractf32x8_ps((__m512)v, 1));
}
template <class T>
INLINE F::V load_halves(const T* first, const T* last) {
  const __m128i low = _mm_loadu_si128((const __m128i*)first), high = _mm_loadu_si128((const __m128i*)last);
  return widened(first, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}
template <class T>
INLINE void store_halves(T* first, T* last, F::V v) {
  const __m256i bits = narrowed(first, v);
  _mm_storeu_si128((__m128i*)first, _mm256_castsi256_si128(bits));
  _mm_storeu_si128((__m128i*)last, _mm256_extracti128_si256(bits, 1));
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
  return widened(x, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
}
template <>
INLINE Vector<float> load_partial<float, float16>(const float16* x, int64_t n) {
  return widened(x, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
}
template <>
INLINE Vector<double> load_partial<double, double>(const double* x, int64_t n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), x);
}
template <>
INLINE void store_partial<float, float>(float* x, int64_t n, F::V v) {
  _mm512_mask_storeu_ps(x, __mmask16((1u << n) - 1), (__m512)v);
}
template <>
INLINE void store_partial<float, bfloat16>(bfloat16* x, int64_t n, F::V v) {
  _mm256_mask_storeu_epi16(x, __mmask16((1u << n) - 1), narrowed(x, v));
}
template <>
INLINE void store_partial<float, float16>(float16* x, int64_t n, F::V v) {
  _mm256_mask_storeu_epi16(x, __mmask16((1u << n) - 1), narrowed(x, v));
}
template <>
INLINE void store_partial<double, double>(double* x, int64_t n, Vector<double> v) {
  _mm512_mask_storeu_pd(x, __mmask8((1u << n) - 1), (__m512d)v);
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
