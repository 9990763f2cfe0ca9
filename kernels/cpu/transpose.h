// Rows whose classes are contiguous, turned into lanes of a tile and back, in registers: value by value, the backward of 512 x 100
// took 1.5 times as long, and with bfloat16 twice.
//
// Included once per instruction set, like simd.h.

#if FUSEDLOSS_VECTOR_BYTES >= 32
// v[i][j] becomes v[j][i]; of AVX-512 in each half of the vectors.
INLINE void transpose(F::V (&v)[8]) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  using M = __m512;
#define MM(name) _mm512_##name
#else
  using M = __m256;
#define MM(name) _mm256_##name
#endif
  M pairs[8], quads[8];
  UNROLL for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = MM(unpacklo_ps)((M)v[2 * i], (M)v[2 * i + 1]);
    pairs[2 * i + 1] = MM(unpackhi_ps)((M)v[2 * i], (M)v[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = MM(shuffle_ps)(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = MM(shuffle_ps)(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
#undef MM
  UNROLL for (int i = 0; i < 4; ++i) {
#if FUSEDLOSS_VECTOR_BYTES == 64
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    v[i] = (F::V)_mm512_permutex2var_pd((__m512d)quads[i], low, (__m512d)quads[i + 4]);
    v[i + 4] = (F::V)_mm512_permutex2var_pd((__m512d)quads[i], high, (__m512d)quads[i + 4]);
#else
    v[i] = (F::V)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    v[i + 4] = (F::V)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
#endif
  }
}

// Eight classes of a row; of AVX-512 those of the eighth row after it in the second half.
#if FUSEDLOSS_VECTOR_BYTES == 64
template <class T>
INLINE F::V load_eight(const T* at, int64_t row) {
  return load_halves(at, at + 8 * row);
}
template <class T>
INLINE void store_eight(T* at, int64_t row, F::V v) {
  store_halves(at, at + 8 * row, v);
}
#else
template <class T>
INLINE F::V load_eight(const T* at, int64_t) {
  return load(at);
}
template <class T>
INLINE void store_eight(T* at, int64_t, F::V v) {
  store(at, v);
}
#endif

// A whole vector of rows whose classes are contiguous, eight or more, into lanes of a tile and out of them. Where 8 does not divide
// n_cols, the last eight overlap those before.
template <class T>
INLINE void load_transposed(float* tile, int lanes, const T* from, int64_t row, int64_t n_cols) {
  for (int64_t c = 0; c < n_cols; c += 8) {
    if (c > n_cols - 8) c = n_cols - 8;
    F::V v[8];
    UNROLL for (int i = 0; i < 8; ++i) v[i] = load_eight(from + c + i * row, row);
    transpose(v);
    UNROLL for (int i = 0; i < 8; ++i) store(tile + (c + i) * lanes, v[i]);
  }
}
template <class T>
INLINE void store_transposed(T* to, const float* tile, int lanes, int64_t row, int64_t n_cols) {
  for (int64_t c = 0; c < n_cols; c += 8) {
    if (c > n_cols - 8) c = n_cols - 8;
    F::V v[8];
    UNROLL for (int i = 0; i < 8; ++i) v[i] = load(tile + (c + i) * lanes);
    transpose(v);
    UNROLL for (int i = 0; i < 8; ++i) store_eight(to + c + i * row, row, v[i]);
  }
}
#else
template <class T>
INLINE void load_transposed(float*, int, const T*, int64_t, int64_t) {}
template <class T>
INLINE void store_transposed(T*, const float*, int, int64_t, int64_t) {}
#endif
// float64 has no transposing load or store; never called.
template <class T>
INLINE void load_transposed(double*, int, const T*, int64_t, int64_t) {}
template <class T>
INLINE void store_transposed(T*, const double*, int, int64_t, int64_t) {}

// Whether the next vector of lanes goes that way.
template <class A>
INLINE bool is_transposed(int64_t col, int64_t n_lanes, int64_t n_cols) {
  return FUSEDLOSS_VECTOR_BYTES >= 32 && sizeof(A) == sizeof(float) && col == 1 && n_lanes >= Simd<A>::W && n_cols >= 8;
}
