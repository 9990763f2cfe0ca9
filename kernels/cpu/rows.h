// Rows whose classes are contiguous, one at a time, in blocks of columns that pass through a scratch block in L1:
//
//     forward    load the block, widened to the accumulation type, and its maximum; overwrite it by exp(x - running maximum)
//                and add up; the running sum is rescaled once per block (Milakov and Gimelshein, arXiv:1805.02867)
//     gradient   the exponentials, kept for rows of up to kKeptBytes, else the logits once more; one write per logit
//
// The steps are those of blocks.h. The target is set to -inf in the scratch before the sum, so that `rest` excludes it exactly.
//
// Included once per instruction set, like simd.h.

template <class A>
struct Scratch {
  // What rows of a group keep for the gradient: exp(x - the running maximum of its block); or with a cap the transformed logits,
  // which its derivative needs. Null: nothing.
  A* kept;
  alignas(64) A z[kBlock], a[kBlock], dz[kBlock];
  A block_maxima[kKeptCols<A> / kBlock];  // of one row; where a group has several, a row is one block
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

// The probabilities of a block; those in the logits' type are widened into a. Null for class indices.
template <class T, class A>
const A* block_probabilities(A* a, const GroupPointers<T, A>& at, const Columns<A>& columns) {
  if (!at.q_as_logits) return columns.of(at.q);
  load_block<T, A>(a, at.q_as_logits + columns.start, columns.n);
  return a;
}

// z = the transformed logits of a block, -inf from columns.n to whole vectors; returns the maximum.
template <class T, class A>
A load_logits(A* z, const T* x, const Columns<A>& columns, const Terms<A>& terms) {
  const A max = load_block<T, A>(z, x + columns.start, columns.n);
  if (!terms.transformed) return max;
  return transform_block(z, columns.n, terms);
}

// Statistics of one row. Leaves in scratch.kept what the gradient needs, and prefetches where that will be written.
template <class T, class A>
void row_stats(const Problem& problem, const Terms<A>& terms, GroupState<A>& s, int lane, Scratch<A>& scratch,
               const GroupPointers<T, A>& at) {
  A* kept = scratch.kept_row(problem, lane);
  A m = -kInfinity<A>, shift = 0;
  double rest = 0, smooth_sum = 0, weight_total = 0, gap_sum = 0;
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
    if (terms.uniform) smooth_sum += double(weighted_sum<A, false>(z, nullptr, columns.n, shift));
    if (terms.per_class) {
      const A* q = block_probabilities(scratch.a, at, columns);
      weight_total += double(load_class_weights<A>(scratch.a, q, columns.of(terms.weight), columns.n, terms));
      smooth_sum += double(weighted_sum<A, true>(z, scratch.a, columns.n, shift));
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
  s.max[lane] = m, s.rest[lane] = A(rest), s.shift[lane] = shift;
  s.smooth_sum[lane] = A(smooth_sum), s.weight_total[lane] = A(weight_total);
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
      load_class_weights<A>(scratch.a, block_probabilities(scratch.a, at, columns), columns.of(terms.weight), columns.n, terms);
    }
    if (terms.per_class || terms.capped) {
      gradient_block<A>(e, terms.per_class ? scratch.a : nullptr, terms.capped ? scratch.dz : nullptr, padded<A>(columns.n),
                        factor, constant, s.smooth[lane]);
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
  GroupSums<A> sums;
  for_groups(problem, begin, end, rows_per_group<A>(problem), [&](int64_t row, int n) {
    const GroupPointers<T, A> at(problem, row);
    s.begin_forward(problem, terms, row, n, Simd<A>::W, A(coefficient));
    for (int lane = 0; lane < n; ++lane)
      if (s.live[lane] != 0) row_stats<T, A>(problem, terms, s, lane, scratch, at.row(lane));  // of others, logits may be NaN
    s.finish_forward(problem, terms, row, n, sums);
    if (!problem.dlogits) return;
    s.factors(terms, n);
    group_gradients<T, A>(problem, terms, s, n, scratch, at);
  });
  return sums.total();
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
    s.factors(terms, n);
    group_gradients<T, A>(problem, terms, s, n, scratch, at);
  });
}
