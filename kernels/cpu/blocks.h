// The steps that rows.h takes a block of columns through. Only the load and the last one know the logits' type: all else is compiled
// for float and for double alone. A scratch is filled up with -inf to whole vectors.
//
// Included once per instruction set, like simd.h.

constexpr int64_t kBlock = 2048;  // 8 KB of float, or 16 with a_c: an L1 of 32 KB has room for what is prefetched

// Vectors added to one partial sum before it goes to the sum of the block: to add a small value to a large sum rounds it, and in
// one sum of the whole block that would happen 30 times more often.
constexpr int64_t kFlushVectors = 16;

// Columns of the longest row whose exponentials are kept, in fp32 for 16-bit logits too, rather than computed again.
template <class A>
constexpr int64_t kKeptCols = kKeptBytes / int64_t(sizeof(A));

template <class A>
INLINE int64_t padded(int64_t n) {
  return (n + Simd<A>::W - 1) / Simd<A>::W * Simd<A>::W;
}

// The sum of vector(i) for i = 0, W, 2 W, ..., as long as i + W <= n.
template <class A, class Vectors>
INLINE Vector<A> sum_whole(int64_t n, const Vectors& vector) {
  constexpr int W = Simd<A>::W;
  Vector<A> sum{};
  int64_t i = 0;
  while (i + 4 * W <= n) {
    Vector<A> part{};
    for (const int64_t stop = i + kFlushVectors * W; i < stop && i + 4 * W <= n; i += 4 * W) {
      const Vector<A> v0 = vector(i), v1 = vector(i + W), v2 = vector(i + 2 * W), v3 = vector(i + 3 * W);
      part += (v0 + v1) + (v2 + v3);
    }
    sum += part;
  }
  for (; i + W <= n; i += W) sum += vector(i);
  return sum;
}

// z = x, -inf from n to padded(n); returns the maximum.
template <class T, class A>
A load_block(A* z, const T* x, int64_t n) {
  using V = Vector<A>;
  constexpr int W = Simd<A>::W;
  V m0 = broadcast(-kInfinity<A>), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const V v0 = load(x + i), v1 = load(x + i + W), v2 = load(x + i + 2 * W), v3 = load(x + i + 3 * W);
    store(z + i, v0), store(z + i + W, v1), store(z + i + 2 * W, v2), store(z + i + 3 * W, v3);
    m0 = max_(v0, m0), m1 = max_(v1, m1), m2 = max_(v2, m2), m3 = max_(v3, m3);
  }
  for (; i + W <= n; i += W) {
    const V v = load(x + i);
    store(z + i, v), m0 = max_(v, m0);
  }
  if (i < n) {
    const V loaded = load_partial<A, T>(x + i, n - i);
    const V v = iota<A>() < typename Simd<A>::Int(n - i) ? loaded : broadcast(-kInfinity<A>);
    store(z + i, v), m1 = max_(v, m1);
  }
  return horizontal_max<A>(max_(max_(m0, m1), max_(m2, m3)));
}

// Memory that the caches fetch while exp_block computes: without, a thread would alternate between waiting for it and computing.
// 4096 x 1000 float32: 25% less time in the forward, and another 25% with the place of the gradient.
struct Prefetch {
  uintptr_t logits, dlogits;  // read next; written next, or null
  uintptr_t item;             // bytes of one value

  INLINE void at(int64_t i) const {  // values i to i + 4 W, in two cache lines of 64 bytes at most
    const uintptr_t offset = uintptr_t(i) * item;
    __builtin_prefetch(reinterpret_cast<const void*>(logits + offset));
    __builtin_prefetch(reinterpret_cast<const void*>(logits + offset + 64));
    if (!dlogits) return;
    __builtin_prefetch(reinterpret_cast<const void*>(dlogits + offset), 1);
    __builtin_prefetch(reinterpret_cast<const void*>(dlogits + offset + 64), 1);
  }
};

// e = exp(z - m), whole vectors, e may be z; returns the sum. GAPS: gap_sum is the sum of e (m - z).
template <class A, bool GAPS = false>
A exp_block(A* e, const A* z, int64_t n, A m, const Prefetch& next, A* gap_sum = nullptr) {
  Vector<A> gaps{}, part{};
  const Vector<A> sum = sum_whole<A>(n, [&](int64_t i) {
    if (i % (4 * Simd<A>::W) == 0) next.at(i);
    const Vector<A> x = load(z + i), v = exp_nonpositive(x - m);
    if constexpr (GAPS) {
      if (i % (kFlushVectors * Simd<A>::W) == 0) gaps += part, part = Vector<A>{};
      part += gap_terms<A>(v, broadcast(m), x);
    }
    store(e + i, v);
    return v;
  });
  if constexpr (GAPS) *gap_sum = horizontal_sum<A>(gaps + part);
  return horizontal_sum<A>(sum);
}

// a_c of a block, 0 from n on, or w_c without probabilities q, which may lie where a goes. Returns the sum.
template <class A>
A load_class_weights(A* a, const A* q, const A* w, int64_t n, const Terms<A>& terms) {
  using V = Vector<A>;
  const int64_t whole = n / Simd<A>::W * Simd<A>::W, rest = n - whole;
  V sum = sum_whole<A>(n, [&](int64_t i) {
    const V v = terms.class_weight(q ? V(load(q + i)) : V{}, w ? V(load(w + i)) : V{});
    store(a + i, v);
    return v;
  });
  if (rest > 0) {
    const V v = terms.class_weight(q ? load_partial<A, A>(q + whole, rest) : V{}, w ? load_partial<A, A>(w + whole, rest) : V{});
    const V present = iota<A>() < typename Simd<A>::Int(rest) ? v : V{};
    store(a + whole, present), sum += present;
  }
  return horizontal_sum<A>(sum);
}

// sum of a_c (shift - z_c); without PER_CLASS: of shift - z_c.
template <class A, bool PER_CLASS>
A weighted_sum(const A* z, const A* a, int64_t n, A shift) {
  using V = Vector<A>;
  const int64_t whole = n / Simd<A>::W * Simd<A>::W;
  auto vector = [&](int64_t i) {
    const V d = shift - V(load(z + i));
    return PER_CLASS ? d * V(load(a + i)) : d;
  };
  V sum = sum_whole<A>(n, vector);
  if (whole < n) sum += iota<A>() < typename Simd<A>::Int(n - whole) ? vector(whole) : V{};  // there z is filled up with -inf
  return horizontal_sum<A>(sum);
}

// z = the transformed logits, -inf again from n to whole vectors; returns the maximum.
template <class A>
A transform_block(A* z, int64_t n, const Terms<A>& terms) {
  const Vector<A> minus_infinity = broadcast(-kInfinity<A>);
  Vector<A> m = minus_infinity;
  for (int64_t i = 0; i < n; i += Simd<A>::W) {
    const Vector<A> v = terms.transform(load(z + i));
    const Vector<A> present = iota<A>() < typename Simd<A>::Int(n - i) ? v : minus_infinity;
    store(z + i, present), m = max_(present, m);
  }
  return horizontal_max<A>(m);
}

// dz/dx of transformed logits, whole vectors.
template <class A>
void derivative_block(A* dz, const A* z, int64_t n, const Terms<A>& terms) {
  for (int64_t i = 0; i < n; i += Simd<A>::W) store(dz + i, terms.derivative(load(z + i)));
}

// e = (e p - constant - smooth a_c) dz, whole vectors; without a or dz as if they were 0 and 1.
template <class A>
void gradient_block(A* e, const A* a, const A* dz, int64_t n, A p, A constant, A smooth) {
  for (int64_t i = 0; i < n; i += Simd<A>::W) {
    Vector<A> d = Vector<A>(load(e + i)) * p - constant;
    if (a) d -= Vector<A>(load(a + i)) * smooth;
    if (dz) d *= Vector<A>(load(dz + i));
    store(e + i, d);
  }
}

// dx = e p - constant
template <class T, class A>
void store_gradient(T* dx, const A* e, int64_t n, A p, A constant) {
  using V = Vector<A>;
  constexpr int W = Simd<A>::W;
  int64_t i = 0;
  auto gradient = [&](int64_t i) { return V(load(e + i)) * p - constant; };
  for (; i + 4 * W <= n; i += 4 * W) {
    store(dx + i, gradient(i)), store(dx + i + W, gradient(i + W));
    store(dx + i + 2 * W, gradient(i + 2 * W)), store(dx + i + 3 * W, gradient(i + 3 * W));
  }
  for (; i + W <= n; i += W) store(dx + i, gradient(i));
  if (i < n) store_partial<A, T>(dx + i, n - i, gradient(i));
}

template <class T, class A>
void fill_row(T* dx, int64_t n, A value) {
  if (value == 0) {
    __builtin_memset(dx, 0, size_t(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) store1(dx + i, value);
  }
}
