// Rows whose classes are contiguous, one at a time, in three passes that stay in cache:
//
//     1, 2  blocks of BLOCK logits, read from memory once and from L1 the second time: the block's maximum, then the sum
//           of exp(x - running maximum); the running sum is rescaled once per block (Milakov and Gimelshein, arXiv:1805.02867)
//     3     with a gradient: the row again, from L2 at 128256 float32 logits (513 KB), and one write per logit
//
// The target's vector is summed with -inf in the target's place, so that `rest` excludes it exactly. The ragged end of a row is
// one more vector, filled up with -inf on the stack. Sums: 4 vectors of partial sums within a block, blocks in double.
//
// Included once per instruction set, like simd.h.

constexpr int64_t BLOCK = 4096;  // 16 KB of float32: a third of the smallest L1 of the machines this was written for

template <class T, class A>
struct PaddedVector {
  A values[Simd<A>::W];
  PaddedVector(const T* x, int64_t n) {
    for (int i = 0; i < Simd<A>::W; ++i) values[i] = i < n ? load1(x + i) : -kInfinity<A>;
  }
  INLINE typename Simd<A>::V vector() const { return load(values); }
};

template <class A>
INLINE A horizontal_sum(typename Simd<A>::V v) {
  A lanes[Simd<A>::W];
  store(lanes, v);
  for (int width = Simd<A>::W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class T, class A>
A block_max(const T* x, int64_t n) {
  using V = typename Simd<A>::V;
  constexpr int W = Simd<A>::W;
  V m0 = broadcast(-kInfinity<A>), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    V a = load(x + i), b = load(x + i + W), c = load(x + i + 2 * W), d = load(x + i + 3 * W);
    m0 = a > m0 ? a : m0, m1 = b > m1 ? b : m1, m2 = c > m2 ? c : m2, m3 = d > m3 ? d : m3;
  }
  for (; i + W <= n; i += W) {
    V a = load(x + i);
    m0 = a > m0 ? a : m0;
  }
  if (i < n) {
    V a = PaddedVector<T, A>(x + i, n - i).vector();
    m1 = a > m1 ? a : m1;
  }
  m0 = m1 > m0 ? m1 : m0, m2 = m3 > m2 ? m3 : m2, m0 = m2 > m0 ? m2 : m0;
  A lanes[W];
  store(lanes, m0);
  for (int width = W / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
  return lanes[0];
}

template <class A>
struct BlockSums {
  A exp, smooth, soft;
};

// Sums over one block, x[target] excluded from exp; target < 0 or >= n: nothing excluded.
template <class T, class A, Terms terms>
BlockSums<A> block_sums(const T* x, const A* w, const A* p, int64_t n, int64_t target, A m, A shift, A keep, A add) {
  using V = typename Simd<A>::V;
  constexpr int W = Simd<A>::W;
  V e0{}, e1{}, e2{}, e3{}, s0{}, s1{}, q0{};
  int64_t target_vector = target < 0 || target >= n ? n : target / W * W;
  auto terms_of = [&](V v, V wv, V pv) INLINE_LAMBDA {
    if constexpr (terms == kSmooth) s0 += shift - v;
    if constexpr (terms == kSmoothWeighted) s0 += wv * (shift - v);
    if constexpr (is_soft(terms)) {
      V q = pv * keep + add;
      if constexpr (terms == kSoftWeighted) q *= wv;
      s1 += q * (shift - v);
      q0 += q;
    }
  };
  auto optional = [](const A* values, int64_t i, bool present) INLINE_LAMBDA { return present ? load(values + i) : V{}; };
  auto one_vector = [&](int64_t i) INLINE_LAMBDA {
    V v = load(x + i);
    terms_of(v, optional(w, i, has_weights(terms)), optional(p, i, is_soft(terms)));
    return exp_nonpositive(v - m);
  };
  auto full_vectors = [&](int64_t begin, int64_t end) INLINE_LAMBDA {
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      e0 += one_vector(i), e1 += one_vector(i + W), e2 += one_vector(i + 2 * W), e3 += one_vector(i + 3 * W);
    }
    for (; i + W <= end; i += W) e0 += one_vector(i);
    return i;
  };
  auto ragged_vector = [&](int64_t i) {  // holds the target, or ends the row, or both
    int64_t count = n - i < W ? n - i : W;
    PaddedVector<T, A> v(x + i, count);
    if constexpr (terms != kPlain) {
      for (int64_t j = 0; j < count; ++j) {
        A d = shift - v.values[j];
        if constexpr (terms == kSmooth) s0[0] += d;
        if constexpr (terms == kSmoothWeighted) s0[0] += w[i + j] * d;
        if constexpr (is_soft(terms)) {
          A q = p[i + j] * keep + add;
          if constexpr (terms == kSoftWeighted) q *= w[i + j];
          s1[0] += q * d;
          q0[0] += q;
        }
      }
    }
    if (!is_soft(terms) && target_vector == i) v.values[target - i] = -kInfinity<A>;
    e1 += exp_nonpositive(v.vector() - m);
    return i + count;
  };
  int64_t i = full_vectors(0, target_vector < n ? target_vector : n);
  if (target_vector < n) i = full_vectors(ragged_vector(i), n);
  if (i < n) ragged_vector(i);
  return {horizontal_sum<A>((e0 + e1) + (e2 + e3)), horizontal_sum<A>(s0 + s1), horizontal_sum<A>(q0)};
}

// Q of one row, its classes `stride` elements apart.
template <class A, Terms terms>
A soft_total(const Problem& problem, const A* p, int64_t stride) {
  const A* w = static_cast<const A*>(problem.weight);
  const double keep = 1 - problem.smoothing, add = problem.smoothing / double(problem.n_cols);
  double total = 0;
  for (int64_t c = 0; c < problem.n_cols; ++c) {
    double q = double(p[c * stride]) * keep + add;
    total += has_weights(terms) ? q * double(w[c]) : q;
  }
  return A(total);
}

template <class T, class A, Terms terms>
RowStats<A> row_stats(const Problem& problem, const T* x, const A* p, int64_t target) {
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  A m = -kInfinity<A>, shift = 0;
  double rest = 0, smooth = 0, soft = 0;
  for (int64_t start = 0; start < problem.n_cols; start += BLOCK) {
    int64_t n = problem.n_cols - start < BLOCK ? problem.n_cols - start : BLOCK;
    A block = block_max<T, A>(x + start, n);
    A larger = block > m ? block : m, finite = finite_max(larger);
    if (m == -kInfinity<A>) shift = finite;  // until now every logit was -inf, which sums to inf whatever the shift
    BlockSums<A> sums =
        block_sums<T, A, terms>(x + start, w ? w + start : nullptr, p ? p + start : nullptr, n, target - start, finite, shift, keep, add);
    if (larger != m) rest *= double(exp_nonpositive1(m - finite));
    rest += double(sums.exp), smooth += double(sums.smooth), soft += double(sums.soft);
    m = larger;
  }
  return {m, A(rest), target >= 0 ? load1(x + target) : A(0), shift, A(smooth), A(soft)};
}

// Writes the gradient of one row.
template <class T, class A, Terms terms>
void row_gradient(const Problem& problem, T* dx, const T* x, const A* p, int64_t target, A m, const RowFactors<A>& f) {
  using V = typename Simd<A>::V;
  constexpr int W = Simd<A>::W;
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  auto gradient = [&](V v, V wv, V pv) INLINE_LAMBDA {
    V d = exp_nonpositive(v - m) * f.p;
    if constexpr (terms == kSmooth) d -= f.smooth;
    if constexpr (terms == kSmoothWeighted) d -= f.smooth * wv;
    if constexpr (terms == kSoft) d -= f.soft * (pv * keep + add);
    if constexpr (terms == kSoftWeighted) d -= f.soft * ((pv * keep + add) * wv);
    return d;
  };
  auto optional = [](const A* values, int64_t i, bool present) INLINE_LAMBDA { return present ? load(values + i) : V{}; };
  auto one_vector = [&](int64_t i) INLINE_LAMBDA {
    store(dx + i, gradient(load(x + i), optional(w, i, has_weights(terms)), optional(p, i, is_soft(terms))));
  };
  int64_t i = 0, n = problem.n_cols;
  for (; i + 4 * W <= n; i += 4 * W) one_vector(i), one_vector(i + W), one_vector(i + 2 * W), one_vector(i + 3 * W);
  for (; i + W <= n; i += W) one_vector(i);
  if (i < n) {
    A ragged[W];
    V wv = has_weights(terms) ? PaddedVector<A, A>(w + i, n - i).vector() : V{};
    V pv = is_soft(terms) ? PaddedVector<A, A>(p + i, n - i).vector() : V{};
    store(ragged, gradient(PaddedVector<T, A>(x + i, n - i).vector(), wv, pv));
    for (int64_t j = i; j < n; ++j) store1(dx + j, ragged[j - i]);
  }
  if constexpr (!is_soft(terms)) {
    A at_target = f.target;
    if constexpr (terms == kSmooth) at_target -= f.smooth;
    if constexpr (terms == kSmoothWeighted) at_target -= f.smooth * w[target];
    store1(dx + target, at_target);
  }
}

template <class T>
void fill_row(T* dx, int64_t n, typename Accumulate<T>::type value) {
  if (value == 0) {
    __builtin_memset(dx, 0, size_t(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) store1(dx + i, value);
  }
}

template <class T, Terms terms>
double forward_rows(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row);
    T* dx = static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row);
    const A* p = is_soft(terms) ? static_cast<const A*>(problem.target) + problem.offset(problem.target_strides, row) : nullptr;
    int64_t target = is_soft(terms) ? -1 : load_target(problem, row);
    if (!is_soft(terms) && target == problem.ignore_index) {  // not read: its logits may be NaN
      total += store_row<A>(problem, row, false, 0, 0, 0);
      if (problem.dlogits) fill_row(dx, problem.n_cols, A(0));
      continue;
    }
    RowStats<A> stats = row_stats<T, A, terms>(problem, x, p, target);
    A loss = row_loss<A, terms>(stats, problem, target, A(weight_total));
    total += store_row<A>(problem, row, true, loss, stats.max, stats.rest);
    if (problem.dlogits)
      row_gradient<T, A, terms>(problem, dx, x, p, target, finite_max(stats.max),
                                row_factors<A, terms>(stats, problem, target, A(weight_total), A(coefficient)));
  }
  return total;
}

template <class T, Terms terms>
void backward_rows(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const A* saved = static_cast<const A*>(problem.saved);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row);
    T* dx = static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row);
    const A* p = is_soft(terms) ? static_cast<const A*>(problem.target) + problem.offset(problem.target_strides, row) : nullptr;
    int64_t target = is_soft(terms) ? -1 : load_target(problem, row);
    A g = row_coefficient<A>(problem, row);
    if (g == 0) {  // not read
      fill_row(dx, problem.n_cols, A(0));
      continue;
    }
    if (!is_soft(terms) && (target < 0 || target >= problem.n_cols)) {  // changed since the forward: never an address
      fill_row(dx, problem.n_cols, kNaN<A>);
      continue;
    }
    RowStats<A> stats = {saved[kState + row], saved[kState + problem.n_rows() + row], 0, 0, 0, 0};
    if constexpr (is_soft(terms)) {
      stats.soft_total = soft_total<A, terms>(problem, p, 1);
    } else {
      stats.x_t = load1(x + target);
    }
    row_gradient<T, A, terms>(problem, dx, x, p, target, finite_max(stats.max),
                              row_factors<A, terms>(stats, problem, target, saved[3], g));
  }
}
