// Rows whose classes are contiguous, one at a time, in three passes that stay in cache:
//
//     1, 2  blocks of BLOCK logits, read from memory once and from L1 the second time: the block's maximum, then the sum
//           of exp(x - running maximum); the running sum is rescaled once per block (Milakov and Gimelshein, arXiv:1805.02867)
//     3     with a gradient: the row again, from L2 at 128256 float32 logits (513 KB), and one write per logit
//
// The target's vector is summed with 0 in the target's place, so that `rest` excludes it exactly. The ragged end of a row is
// one more vector, filled up with -inf. Sums: in floats within a block, blocks in double.
//
// Included once per instruction set, like simd.h.

constexpr int64_t BLOCK = 4096;  // 16 KB of float32: a third of the smallest L1 of the machines this was written for

// Vectors added to one partial sum before it goes to the sum of the block: a lane that holds a large value rounds every small one
// added to it, which over a whole block would be 30 roundings more.
constexpr int64_t FLUSH_VECTORS = 4;
constexpr int64_t MAX_KEPT_BLOCKS = 64;  // 262144 columns: beyond, exp is computed twice

// Whether exp(x - m) of the sum may be kept in dlogits for the gradient; in 16 bits it would be rounded twice.
template <class T>
constexpr bool kKeeps = sizeof(T) == sizeof(typename Accumulate<T>::type);

template <class T, class A>
INLINE Vector<A> load_padded(const T* x, int64_t n) {  // lanes from n on are -inf
  Vector<A> v = load_partial<A, T>(x, n);
  return iota<A>() < typename Simd<A>::Int(n) ? v : broadcast(-kInfinity<A>);
}

template <class T, class A>
A block_max(const T* x, int64_t n) {
  using V = Vector<A>;
  constexpr int W = Simd<A>::W;
  V m0 = broadcast(-kInfinity<A>), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = max_(V(load(x + i)), m0), m1 = max_(V(load(x + i + W)), m1);
    m2 = max_(V(load(x + i + 2 * W)), m2), m3 = max_(V(load(x + i + 3 * W)), m3);
  }
  for (; i + W <= n; i += W) m0 = max_(V(load(x + i)), m0);
  if (i < n) m1 = max_(load_padded<T, A>(x + i, n - i), m1);
  return horizontal_max<A>(max_(max_(m0, m1), max_(m2, m3)));
}

template <class A>
struct BlockSums {
  A exp, smooth, soft;
};

// Sums over one block, x[target] excluded from exp; target < 0 or >= n: nothing excluded. With KEEP also stores exp to kept.
template <class T, class A, Terms terms, bool KEEP>
BlockSums<A> block_sums(A* kept, const T* x, const A* w, const A* p, int64_t n, int64_t target, A m, A shift, A keep, A add) {
  using V = Vector<A>;
  using Int = typename Simd<A>::Int;
  constexpr int W = Simd<A>::W;
  const V zero = {};
  V e{}, s0{}, q0{}, smooth{}, soft{};
  auto one_vector = [&](int64_t i) INLINE_LAMBDA {
    V v = load(x + i);
    if constexpr (terms == kSmooth) s0 += shift - v;
    if constexpr (terms == kSmoothWeighted) s0 += V(load(w + i)) * (shift - v);
    if constexpr (is_soft(terms)) {
      V q = V(load(p + i)) * keep + add;
      if constexpr (terms == kSoftWeighted) q *= V(load(w + i));
      s0 += q * (shift - v);
      q0 += q;
    }
    V exp = exp_nonpositive(v - m);
    if constexpr (KEEP) store(kept + i, exp);
    return exp;
  };
  auto full_vectors = [&](int64_t i, int64_t end) INLINE_LAMBDA {
    while (i + 4 * W <= end) {
      V e0{}, e1{}, e2{}, e3{};
      for (int64_t stop = i + 4 * FLUSH_VECTORS * W; i < stop && i + 4 * W <= end; i += 4 * W) {
        e0 += one_vector(i), e1 += one_vector(i + W), e2 += one_vector(i + 2 * W), e3 += one_vector(i + 3 * W);
      }
      e += (e0 + e1) + (e2 + e3);
      if constexpr (terms != kPlain) smooth += s0, soft += q0, s0 = q0 = zero;
    }
    for (; i + W <= end; i += W) e += one_vector(i);
    return i;
  };
  auto ragged_vector = [&](int64_t i) INLINE_LAMBDA {  // the one that ends the row
    const Integers<A> present = iota<A>() < Int(n - i);
    V v = load_padded<T, A>(x + i, n - i), d = present ? shift - v : zero;
    if constexpr (terms == kSmooth) s0 += d;
    if constexpr (terms == kSmoothWeighted) s0 += load_partial<A, A>(w + i, n - i) * d;
    if constexpr (is_soft(terms)) {
      V q = load_partial<A, A>(p + i, n - i) * keep + add;
      if constexpr (terms == kSoftWeighted) q *= load_partial<A, A>(w + i, n - i);
      s0 += q * d;
      q0 += present ? q : zero;
    }
    V exp = exp_nonpositive(v - m);
    if constexpr (KEEP) store_partial<A, A>(kept + i, n - i, exp);
    return exp;
  };
  const bool has_target = !is_soft(terms) && target >= 0 && target < n;
  const int64_t target_vector = has_target ? target / W * W : n;
  int64_t i = full_vectors(0, target_vector);
  if (has_target) {
    const Integers<A> at_target = iota<A>() == Int(target - i);
    const V exp = i + W <= n ? one_vector(i) : ragged_vector(i);
    e += at_target ? zero : exp;
    i = full_vectors(i + W, n);
  }
  if (i < n) e += ragged_vector(i);
  return {horizontal_sum<A>(e), horizontal_sum<A>(smooth + s0), horizontal_sum<A>(soft + q0)};
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

// Statistics of one row. With KEEP, kept receives exp(x - block_max[b]) of each block b of columns.
template <class T, class A, Terms terms, bool KEEP>
void row_stats(const Problem& problem, GroupState<A>& s, int lane, const T* x, const A* p, A* kept, A* block_maxima) {
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  const int64_t target = int64_t(s.target[lane]);
  if (!is_soft(terms)) s.x_t[lane] = load1(x + target);  // before anything is written: kept may lie where x does
  A m = -kInfinity<A>, shift = 0;
  double rest = 0, smooth = 0, soft = 0;
  for (int64_t start = 0; start < problem.n_cols; start += BLOCK) {
    const int64_t n = problem.n_cols - start < BLOCK ? problem.n_cols - start : BLOCK;
    const A block = block_max<T, A>(x + start, n);
    const A larger = block > m ? block : m, finite = finite_max(larger);
    if (m == -kInfinity<A>) shift = finite;  // until now every logit was -inf, which sums to inf whatever the shift
    if (larger != m) rest *= double(exp_nonpositive1(m - finite));
    const BlockSums<A> sums = block_sums<T, A, terms, KEEP>(KEEP ? kept + start : nullptr, x + start, w ? w + start : nullptr,
                                                            p ? p + start : nullptr, n, target - start, finite, shift, keep, add);
    rest += double(sums.exp), smooth += double(sums.smooth), soft += double(sums.soft);
    m = larger;
    if constexpr (KEEP) block_maxima[start / BLOCK] = m;
  }
  s.max[lane] = m, s.rest[lane] = A(rest), s.shift[lane] = shift, s.smooth[lane] = A(smooth), s.soft[lane] = A(soft);
}

// Gradient of columns [0, n) but the target's. With KEPT, dx holds exp(x - block maximum), else it is made from x.
template <class T, class A, Terms terms, bool KEPT>
void block_gradient(T* dx, const T* x, const A* w, const A* p, int64_t n, A m, A p_factor, A smooth, A soft, A keep, A add) {
  using V = Vector<A>;
  constexpr int W = Simd<A>::W;
  auto gradient = [&](V v, V wv, V pv) INLINE_LAMBDA {
    V d = (KEPT ? v : exp_nonpositive(v - m)) * p_factor;
    if constexpr (terms == kSmooth) d -= smooth;
    if constexpr (terms == kSmoothWeighted) d -= smooth * wv;
    if constexpr (terms == kSoft) d -= soft * (pv * keep + add);
    if constexpr (terms == kSoftWeighted) d -= soft * ((pv * keep + add) * wv);
    return d;
  };
  auto one_vector = [&](int64_t i) INLINE_LAMBDA {
    V wv{}, pv{};
    if constexpr (has_weights(terms)) wv = load(w + i);
    if constexpr (is_soft(terms)) pv = load(p + i);
    store(dx + i, gradient(load((KEPT ? dx : x) + i), wv, pv));
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) one_vector(i), one_vector(i + W), one_vector(i + 2 * W), one_vector(i + 3 * W);
  for (; i + W <= n; i += W) one_vector(i);
  if (i < n) {
    V wv{}, pv{};
    if constexpr (has_weights(terms)) wv = load_partial<A, A>(w + i, n - i);
    if constexpr (is_soft(terms)) pv = load_partial<A, A>(p + i, n - i);
    store_partial<A, T>(dx + i, n - i, gradient(load_partial<A, T>((KEPT ? dx : x) + i, n - i), wv, pv));
  }
}

// Writes the gradient of one row. block_maxima: of the exponentials that row_stats left in dx, or null.
template <class T, class A, Terms terms>
void row_gradient(const Problem& problem, const GroupState<A>& s, int lane, T* dx, const T* x, const A* p, const A* block_maxima) {
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  const A max = s.max[lane], m = finite_max(max), p_factor = s.p[lane], smooth = s.smooth_factor[lane], soft = s.soft_factor[lane];
  if constexpr (kKeeps<T>) {
    for (int64_t start = 0; block_maxima && start < problem.n_cols; start += BLOCK) {
      const A block_max = problem.n_cols <= BLOCK ? max : block_maxima[start / BLOCK];
      const A factor = block_max == max ? p_factor : p_factor * exp_nonpositive1(block_max - m);
      block_gradient<T, A, terms, true>(dx + start, x + start, w ? w + start : nullptr, p ? p + start : nullptr,
                                        problem.n_cols - start < BLOCK ? problem.n_cols - start : BLOCK, m, factor, smooth, soft,
                                        keep, add);
    }
  }
  if (!block_maxima) block_gradient<T, A, terms, false>(dx, x, w, p, problem.n_cols, m, p_factor, smooth, soft, keep, add);
  if constexpr (!is_soft(terms)) {
    const int64_t target = int64_t(s.target[lane]);
    A at_target = s.at_target[lane];
    if constexpr (terms == kSmooth) at_target -= smooth;
    if constexpr (terms == kSmoothWeighted) at_target -= smooth * w[target];
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

template <class T, class A>
struct RowPointers {
  const T* x;
  T* dx;
  const A* p;
  RowPointers(const Problem& problem, int64_t row)
      : x(static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row)),
        dx(problem.dlogits ? static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row) : nullptr),
        p(problem.target_kind == kProbabilities
              ? static_cast<const A*>(problem.target) + problem.offset(problem.target_strides, row)
              : nullptr) {}
};

// Rows of a group: their logs and divisions share vectors, and their logits and gradients L1 until they are needed again.
template <class A>
INLINE int64_t rows_per_group(const Problem& problem) {
  const int64_t rows = BLOCK / problem.n_cols;
  return rows < 1 ? 1 : rows > Simd<A>::W ? Simd<A>::W : rows;
}

// Gradients of the rows of a group; those of rows that are not live are filled without reading the logits.
template <class T, class A, Terms terms>
INLINE void group_gradients(const Problem& problem, const GroupState<A>& s, int64_t row, int n, const A* block_maxima) {
  for (int lane = 0; lane < n; ++lane) {
    const RowPointers<T, A> at(problem, row + lane);
    if (s.live[lane]) {
      row_gradient<T, A, terms>(problem, s, lane, at.dx, at.x, at.p, block_maxima);
    } else {
      fill_row(at.dx, problem.n_cols, s.at_target[lane]);
    }
  }
}

template <class T, Terms terms>
double forward_rows(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  const int64_t group = rows_per_group<A>(problem);
  const bool keeps = kKeeps<T> && problem.dlogits && problem.n_cols <= MAX_KEPT_BLOCKS * BLOCK;
  A block_maxima[MAX_KEPT_BLOCKS];  // of one row: a group of several has one block each, whose maximum is the row's
  GroupState<A> s;
  double total = 0;
  for (int64_t row = begin; row < end; row += group) {
    const int n = int(end - row < group ? end - row : group);
    for (int lane = 0; lane < Simd<A>::W; ++lane)
      s.template begin_forward<terms>(problem, lane, row + lane, lane < n, A(coefficient));
    for (int lane = 0; lane < n; ++lane) {
      if (!s.live[lane]) continue;  // not read: its logits may be NaN
      const RowPointers<T, A> at(problem, row + lane);
      if constexpr (kKeeps<T>) {
        if (keeps) row_stats<T, A, terms, true>(problem, s, lane, at.x, at.p, at.dx, block_maxima);
      }
      if (!keeps) row_stats<T, A, terms, false>(problem, s, lane, at.x, at.p, nullptr, nullptr);
    }
    total += s.template finish_forward<terms>(problem, row, n, A(weight_total));
    if (!problem.dlogits) continue;
    s.template factors<terms>(problem, n, A(weight_total));
    group_gradients<T, A, terms>(problem, s, row, n, keeps ? block_maxima : nullptr);
  }
  return total;
}

template <class T, Terms terms>
void backward_rows(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const int64_t group = rows_per_group<A>(problem);
  GroupState<A> s;
  for (int64_t row = begin; row < end; row += group) {
    const int n = int(end - row < group ? end - row : group);
    for (int lane = 0; lane < Simd<A>::W; ++lane) {
      s.template begin_backward<terms>(problem, lane, row + lane, lane < n);
      if (!s.live[lane]) continue;
      const RowPointers<T, A> at(problem, row + lane);
      if constexpr (is_soft(terms)) {
        s.soft[lane] = soft_total<A, terms>(problem, at.p, 1);
      } else {
        s.x_t[lane] = load1(at.x + s.target[lane]);
      }
    }
    s.template factors<terms>(problem, n, static_cast<const A*>(problem.saved)[3]);
    group_gradients<T, A, terms>(problem, s, row, n, nullptr);
  }
}
