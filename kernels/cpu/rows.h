// Rows whose classes are contiguous, one at a time, in blocks of columns that pass through a scratch block in L1:
//
//     forward    load the block, widened to the accumulation type, and its maximum; overwrite it by exp(x - running maximum)
//                and add up; the running sum is rescaled once per block (Milakov and Gimelshein, arXiv:1805.02867)
//     gradient   the exponentials, kept for rows of up to kKeptBytes, else the logits once more; one write per logit
//
// Only the load and the last step know the logits' type: all else is compiled for float and for double alone. The scratch is
// filled up with -inf to whole vectors. The target is set to -inf in it before the sum, so that `rest` excludes it exactly.
//
// Included once per instruction set, like simd.h.

constexpr int64_t kBlock = 2048;  // 8 KB of float, twice with factors per class: an L1 of 32 KB has room for what comes next

// Vectors added to one partial sum before it goes to the sum of the block: a lane that holds a large value rounds every small one
// added to it, which over a whole block would be 30 roundings more.
constexpr int64_t kFlushVectors = 16;

// Columns of the longest row whose exponentials are kept, in fp32 for 16-bit logits too, rather than computed again.
template <class A>
constexpr int64_t kKeptCols = kKeptBytes / int64_t(sizeof(A));

template <class A>
INLINE int64_t padded(int64_t n) {
  return (n + Simd<A>::W - 1) / Simd<A>::W * Simd<A>::W;
}

// The sum over i = 0, W, 2 W, ... of vectors, as many as lie below n whole.
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
// 4096 x 1000 float32: 25% less time in the forward, the same again with the gradient's place.
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

// q of the classes of a block, 0 from n on; p: probabilities, which may be where q goes, or null. Returns the sum.
template <class A>
A load_q(A* q, const A* p, const A* w, int64_t n, const Terms<A>& terms) {
  using V = Vector<A>;
  const int64_t whole = n / Simd<A>::W * Simd<A>::W, rest = n - whole;
  V sum = sum_whole<A>(n, [&](int64_t i) {
    const V v = terms.q(p ? V(load(p + i)) : V{}, w ? V(load(w + i)) : V{});
    store(q + i, v);
    return v;
  });
  if (rest > 0) {
    const V v = terms.q(p ? load_partial<A, A>(p + whole, rest) : V{}, w ? load_partial<A, A>(w + whole, rest) : V{});
    const V present = iota<A>() < typename Simd<A>::Int(rest) ? v : V{};
    store(q + whole, present), sum += present;
  }
  return horizontal_sum<A>(sum);
}

// sum of q_c (shift - z_c); without PER_CLASS: of shift - z_c.
template <class A, bool PER_CLASS>
A sum_q(const A* z, const A* q, int64_t n, A shift) {
  using V = Vector<A>;
  const int64_t whole = n / Simd<A>::W * Simd<A>::W;
  auto vector = [&](int64_t i) {
    const V d = shift - V(load(z + i));
    return PER_CLASS ? d * V(load(q + i)) : d;
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

// e = (e p - constant - q q_c) dz, whole vectors; without q_c or dz as if they were 0 and 1.
template <class A>
void gradient_block(A* e, const A* q_c, const A* dz, int64_t n, A p, A constant, A q) {
  for (int64_t i = 0; i < n; i += Simd<A>::W) {
    Vector<A> d = Vector<A>(load(e + i)) * p - constant;
    if (q_c) d -= Vector<A>(load(q_c + i)) * q;
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

template <class A>
struct Scratch {
  // Of the rows of a group, for the gradient: exp(x - the running maximum of its block), or with a cap, whose derivative is one
  // of the transformed logits, those. Null: not kept.
  A* kept;
  alignas(64) A z[kBlock], q[kBlock], dz[kBlock];
  A block_maxima[kKeptCols<A> / kBlock];  // of one row: a group of several has one block each, whose maximum is the row's
  GroupState<A> state;
  alignas(64) A kept_rows[kKeptCols<A>];

  A* kept_row(const Problem& problem, int lane) { return kept ? kept + lane * padded<A>(problem.n_cols) : nullptr; }
};

template <class A>
struct Columns {
  int64_t start, n;
  Columns(const Problem& problem, int64_t start)
      : start(start), n(problem.n_cols - start < kBlock ? problem.n_cols - start : kBlock) {}
  const A* of(const A* row) const { return row ? row + start : nullptr; }
  bool has(int64_t col) const { return col >= start && col < start + n; }
};

template <class T>
INLINE Prefetch ahead(const T* logits, T* dlogits) {
  return {reinterpret_cast<uintptr_t>(logits), reinterpret_cast<uintptr_t>(dlogits), sizeof(T)};
}

// The probabilities of a block; those in the logits' type are widened into q. Null for class indices.
template <class T, class A>
const A* block_probabilities(A* q, const GroupPointers<T, A>& at, const Columns<A>& columns) {
  if (!at.p_as_logits) return columns.of(at.p);
  load_block<T, A>(q, at.p_as_logits + columns.start, columns.n);
  return q;
}

// z = the transformed logits of a block, -inf from columns.n to whole vectors; returns the maximum.
template <class T, class A>
A load_logits(A* z, const T* x, const Columns<A>& columns, const Terms<A>& terms) {
  const A max = load_block<T, A>(z, x + columns.start, columns.n);
  if (!terms.transformed) return max;
  return transform_block(z, columns.n, terms);
}

// Statistics of one row. What scratch.kept is for stays there, and dx is where the gradient will go.
template <class T, class A>
void row_stats(const Problem& problem, const Terms<A>& terms, GroupState<A>& s, int lane, Scratch<A>& scratch,
               const GroupPointers<T, A>& at) {
  A* kept = scratch.kept_row(problem, lane);
  A m = -kInfinity<A>, shift = 0;
  double rest = 0, q_sum = 0, q_total = 0, gap_sum = 0;
  for (int64_t start = 0; start < problem.n_cols; start += kBlock) {
    const Columns<A> columns(problem, start);
    A* z = kept ? kept + start : scratch.z;
    const A block = load_logits(z, at.x, columns, terms);
    const A larger = block > m ? block : m, finite = finite_max(larger);
    if (start == 0) shift = finite;
    if (rest != 0 && larger != m) {
      const double factor = double(exp_nonpositive1(m - finite));
      if (terms.entropy) gap_sum = factor == 0 ? 0 : (gap_sum + rest * double(finite - finite_max(m))) * factor;
      rest *= factor;
    }
    if (terms.uniform) q_sum += double(sum_q<A, false>(z, nullptr, columns.n, shift));
    if (terms.per_class) {
      const A* p = block_probabilities(scratch.q, at, columns);
      q_total += double(load_q<A>(scratch.q, p, columns.of(terms.weight), columns.n, terms));
      q_sum += double(sum_q<A, true>(z, scratch.q, columns.n, shift));
    }
    if (terms.two_labels && columns.has(s.target_b[lane])) s.x_b[lane] = z[s.target_b[lane] - start];
    if (columns.has(s.target[lane])) {
      A& z_t = z[s.target[lane] - start];
      s.x_t[lane] = z_t, z_t = -kInfinity<A>;
    }
    const Prefetch next = ahead(at.x + start + columns.n, kept ? at.dx + start : nullptr);
    A *e = terms.capped ? scratch.z : z, gaps;
    if (terms.entropy) {
      rest += double(exp_block<A, true>(e, z, padded<A>(columns.n), finite, next, &gaps)), gap_sum += double(gaps);
    } else {
      rest += double(exp_block<A>(e, z, padded<A>(columns.n), finite, next));
    }
    m = larger;
    if (kept) scratch.block_maxima[start / kBlock] = m;
  }
  s.max[lane] = m, s.rest[lane] = A(rest), s.shift[lane] = shift, s.q_sum[lane] = A(q_sum), s.q_total[lane] = A(q_total);
  if (terms.entropy) s.gap_sum[lane] = A(gap_sum);
}

// Writes the gradient of one row, from what row_stats kept or from the logits.
template <class T, class A>
void row_gradient(const Problem& problem, const Terms<A>& terms, const GroupState<A>& s, int lane, Scratch<A>& scratch,
                  const GroupPointers<T, A>& at) {
  A* kept = scratch.kept_row(problem, lane);
  const A max = s.max[lane], m = finite_max(max);
  for (int64_t start = 0; start < problem.n_cols; start += kBlock) {
    const Columns<A> columns(problem, start);
    A *z = kept ? kept + start : scratch.z, *e = z;
    A factor = s.p[lane], constant = s.constant[lane];
    if (!kept) load_logits(z, at.x, columns, terms);
    if (terms.capped) derivative_block(scratch.dz, z, padded<A>(columns.n), terms);
    if (!kept || terms.capped) {
      e = scratch.z;
      exp_block<A>(e, z, padded<A>(columns.n), m, ahead(at.x + start + columns.n, at.dx + start));
    } else if (problem.n_cols > kBlock && scratch.block_maxima[start / kBlock] != max) {
      factor *= exp_nonpositive1(scratch.block_maxima[start / kBlock] - m);
    }
    if (terms.per_class) {
      load_q<A>(scratch.q, block_probabilities(scratch.q, at, columns), columns.of(terms.weight), columns.n, terms);
    }
    if (terms.per_class || terms.capped) {
      gradient_block<A>(e, terms.per_class ? scratch.q : nullptr, terms.capped ? scratch.dz : nullptr, padded<A>(columns.n),
                        factor, constant, s.q[lane]);
      factor = 1, constant = 0;
    }
    store_gradient<T, A>(at.dx + start, e, columns.n, factor, constant);
  }
  if (terms.soft) return;
  if (s.is_here(problem, s.target[lane])) store1(at.dx + s.target[lane], s.at_t[lane]);
  if (terms.two_labels && s.is_here(problem, s.target_b[lane])) store1(at.dx + s.target_b[lane], s.at_b[lane]);
}

// Rows of a group: their logs and divisions share vectors, and their exponentials stay in L1 until they are needed again.
template <class A>
INLINE int64_t rows_per_group(const Problem& problem) {
  const int64_t rows = kBlock / padded<A>(problem.n_cols);
  return rows < 1 ? 1 : rows > Simd<A>::W ? Simd<A>::W : rows;
}

// Gradients of the rows of a group; those of rows that are not live are filled without reading the logits.
template <class T, class A>
void group_gradients(const Problem& problem, const Terms<A>& terms, const GroupState<A>& s, int n, Scratch<A>& scratch,
                     const GroupPointers<T, A>& at) {
  for (int lane = 0; lane < n; ++lane) {
    if (s.live[lane] != 0) {
      row_gradient<T, A>(problem, terms, s, lane, scratch, at.row(lane));
    } else {
      fill_row<T, A>(at.row(lane).dx, problem.n_cols, s.at_t[lane]);
    }
  }
}

template <class T>
RowSums forward_rows(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  const Terms<A> terms(problem, weight_total);
  Scratch<A>& scratch = thread_scratch_as<Scratch<A>>();
  scratch.kept = problem.dlogits && problem.n_cols <= kKeptCols<A> ? scratch.kept_rows : nullptr;
  GroupState<A>& s = scratch.state;
  RowSums sums = {};
  for_groups(problem, begin, end, rows_per_group<A>(problem), [&](int64_t row, int n) {
    const GroupPointers<T, A> at(problem, row);
    s.begin_forward(problem, terms, row, n, Simd<A>::W, A(coefficient));
    for (int lane = 0; lane < n; ++lane)
      if (s.live[lane] != 0) row_stats<T, A>(problem, terms, s, lane, scratch, at.row(lane));  // else its logits may be NaN
    s.finish_forward(problem, terms, row, n, sums);
    if (!problem.dlogits) return;
    s.factors(problem, terms, n);
    group_gradients<T, A>(problem, terms, s, n, scratch, at);
  });
  return sums;
}

template <class T>
void backward_rows(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const Terms<A> terms(problem, static_cast<const A*>(problem.saved)[3]);
  Scratch<A>& scratch = thread_scratch_as<Scratch<A>>();
  scratch.kept = nullptr;
  GroupState<A>& s = scratch.state;
  for_groups(problem, begin, end, rows_per_group<A>(problem), [&](int64_t row, int n) {
    const GroupPointers<T, A> at(problem, row);
    s.begin_backward(problem, terms, at.x, row, n, Simd<A>::W);
    s.factors(problem, terms, n);
    group_gradients<T, A>(problem, terms, s, n, scratch, at);
  });
}
