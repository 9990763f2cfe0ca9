// Rows of few classes with one class index or probabilities each, as CIFAR-10 has, or pixels of even fewer: a vector of rows at a
// time, in registers and a tile.
//
// lanes.h can do the same with twice the instructions; and its state of 20 values for each of up to 256 rows drives a training
// step out of the caches, which a batch of 128 x 10 feels more than the instructions.
//
// Included once per instruction set, like simd.h.

// Where they are transposed in registers, the forward of 64 to 127 float32 classes takes a tenth to a third less time than rows.h,
// and the gradient no more; of float64, and of vectors of 16 bytes, it takes more. NARROW: fewer classes, where there are few rows,
// as a vector with a few of them costs as much as a full one; and of probabilities, which need a second tile.
template <class A, bool NARROW>
constexpr int64_t kMaxFewCols = FUSEDLOSS_VECTOR_BYTES >= 32 && sizeof(A) == sizeof(float) && !NARROW ? 127 : 63;
// With AVX-512, a vector is a cache line of every class, and 24 classes of it stay in L1: a quarter less time than lanes.h takes
// at 10 to 16 classes, none at 32. With half a line it is lanes.h that is as fast or faster.
constexpr int64_t kMaxFewColsOfPixels = FUSEDLOSS_VECTOR_BYTES == 64 ? 24 : 8;

template <class A>
INLINE bool takes_few(const Problem& problem) {
  const bool narrow = problem.has_probabilities() || problem.n_inner < 4 * Simd<A>::W;
  const int64_t max = narrow ? kMaxFewCols<A, true> : kMaxFewCols<A, false>;
  const bool are_few = problem.n_cols <= (problem.has_contiguous_classes() ? max : kMaxFewColsOfPixels);
  const bool weighs_all = problem.weight && problem.smoothing > 0 && !problem.has_probabilities();
  return are_few && !weighs_all && !problem.shard_stats && !problem.target_b && !problem.row_stats &&
         !problem.selects_rows() && problem.plain;
}

// Copies logits of at most W rows into a tile of W lanes; and a tile of gradients out of it.
template <class T, class A>
INLINE void load_few(A* tile, const T* from, const Strides& strides, int n_rows, int64_t n_cols) {
  constexpr int W = Simd<A>::W;
  if (strides.row == 1 && n_rows == W) {
    for (int64_t c = 0; c < n_cols; ++c, from += strides.col) store(tile + c * W, Vector<A>(load(from)));
  } else {
    load_tile<T, A>(tile, W, from, strides.row, strides.col, n_rows, n_cols);
  }
}
template <class T, class A>
INLINE void store_few(T* to, const A* tile, const Strides& strides, int n_rows, int64_t n_cols) {
  constexpr int W = Simd<A>::W;
  const int64_t col = strides.col;
  if (strides.row == 1 && n_rows == W) {
    for (int64_t c = 0; c < n_cols; ++c, to += col) store(to, Vector<A>(load(tile + c * W)));
  } else {
    store_tile<T, A>(to, tile, W, strides.row, col, n_rows, n_cols);
  }
}

// Rows [row, row + n), one per lane. What lanes without a row compute is not used.
template <class T, class A, bool SOFT>
struct FewRows {
  static constexpr int W = Simd<A>::W;
  using V = Vector<A>;
  using I = Integers<A>;
  using Int = typename Simd<A>::Int;

  const Problem& problem;
  const int64_t row;
  const int n;
  alignas(64) A tile[kMaxFewCols<A, SOFT> * W];  // class by class: logits, then exponentials, then gradients
  alignas(64) A probabilities[SOFT ? kMaxFewCols<A, SOFT> * W : 1];

  INLINE FewRows(const Problem& problem, int64_t row, int n, const GroupPointers<T, A>& at) : problem(problem), row(row), n(n) {
    load_few<T, A>(tile, at.x, problem.logits_strides, n, problem.n_cols);
    if constexpr (SOFT)
      at.q ? load_few<A, A>(probabilities, at.q, problem.target_strides, n, problem.n_cols)
           : load_few<T, A>(probabilities, at.q_as_logits, problem.target_strides, n, problem.n_cols);
  }

  // The class indices: -1 where a row is ignored; n_cols, the index of no class, for probabilities, and for an index that was
  // changed to one out of range since the first look.
  INLINE I targets() const {
    if constexpr (SOFT) return iota<A>() < Int(n) ? I{} + Int(problem.n_cols) : I{} - 1;
    typename Simd<A>::Longs all;
    Labels parts[sizeof all / sizeof(Labels)];  // not one vector wider than the machine's: GCC would make scalars of it
    const bool are_bytes = problem.target_kind == kUint8, is_full = n == W;
    int64_t copies[W];
    for (int i = 0; i < W && !is_full; ++i) copies[i] = i < n ? problem.label(problem.target, row + i) : problem.ignore_index;
    UNROLL for (int i = 0; i < int(sizeof all / sizeof(Labels)); ++i) {
      const int at = i * Simd<double>::W;
      const Labels t = !is_full    ? load_labels(copies + at)
                       : are_bytes ? load_labels(static_cast<const uint8_t*>(problem.target) + row + at)
                                   : load_labels(static_cast<const int64_t*>(problem.target) + row + at);
      const Labels in_range = (t >= 0) & (t < problem.n_cols), ignored = t == problem.ignore_index;
      parts[i] = ignored ? Labels{} - 1 : in_range ? t : Labels{} + problem.n_cols;
    }
    __builtin_memcpy(&all, parts, sizeof all);
    return __builtin_convertvector(all, I);
  }
  // x_t and e_t before a class is the target: NaN where none will be, so that loss and gradient are NaN.
  INLINE V not_found(I target) const { return !SOFT && target >= Int(problem.n_cols) ? broadcast(kNaN<A>) : V{}; }
  // a of a class, of all rows.
  INLINE V class_weight(const Terms<A>& terms, int64_t c) const {
    return terms.class_weight(V(load(probabilities + c * W)), broadcast(terms.weight ? terms.weight[c] : A(1)));
  }
  // The targets' class weights; 1 without weights, and where there is no class.
  INLINE V weights(const Terms<A>& terms, I target) const {
    V w = broadcast(A(1));
    if (SOFT || !terms.weight) return w;
    for (int64_t c = 0; c < problem.n_cols; ++c) w = target == Int(c) ? broadcast(terms.weight[c]) : w;
    return w;
  }
  INLINE V of_rows(const A* values) const { return load_rows<A>(values, 0, n); }  // values: of the first row
  INLINE void keep(A* values, V v) const { n == W ? store(values, v) : store_partial<A, A>(values, n, v); }

  // Overwrites the exponentials with the gradients, 0 in rows that are not live, and copies them out.
  INLINE void store_gradients(T* dx, const Terms<A>& terms, RowFactors<A> f, I target, I live) {
    const int64_t n_cols = problem.n_cols;  // here and below: a store might change what is read through a reference
    for (int64_t c = 0; c < n_cols; ++c) {
      const V p = V(load(tile + c * W)) * f.p;
      const V d = SOFT ? p - class_weight(terms, c) * f.smooth : target == Int(c) ? f.at_t : p - f.constant;
      store(tile + c * W, live ? d : V{});  // not times 0: a statistic may be infinite
    }
    store_few<T, A>(dx, tile, problem.dlogits_strides, n, n_cols);
  }
};

template <class A>
INLINE RowStats<A> few_stats(Vector<A> max, Vector<A> rest, Vector<A> x_t, Vector<A> e_t, Vector<A> w_t, Vector<A> shift,
                             Vector<A> smooth_sum, Vector<A> weight_total) {
  const Vector<A> zero{};
  return {max, rest, x_t, zero, e_t, w_t, zero, w_t, zero, shift, smooth_sum, weight_total};
}

// Calls body for rows [begin, end), a vector at a time, with where its gradients go.
template <class T, bool SOFT, class Body>
INLINE void for_few(const Problem& problem, int64_t begin, int64_t end, const Body& body) {
  using A = typename Accumulate<T>::type;
  using Rows = FewRows<T, A, SOFT>;
  for_groups(problem, begin, end, problem.n_inner, [&](int64_t first, int n_rows) {
    GroupPointers<T, A> at(problem, first);
    for (int i = 0; i < n_rows; i += Rows::W) {
      Rows rows(problem, first + i, n_rows - i < Rows::W ? n_rows - i : Rows::W, at);
      body(rows, at.dx);
      at = at.row(Rows::W);
    }
  });
}

template <class T, bool SOFT>
RowSums forward_few(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  using V = Vector<A>;
  using Rows = FewRows<T, A, SOFT>;
  using I = typename Rows::I;
  const Terms<A> terms(problem, weight_total);
  A* saved = problem.saved ? static_cast<A*>(problem.saved) + kState : nullptr;
  LossSum<A> sum;
  for_few<T, SOFT>(problem, begin, end, [&](Rows& rows, T* dx) {
    const I target = rows.targets(), counted = I(target >= 0);
    const int64_t n_cols = problem.n_cols;
    const bool uniform = terms.uniform;
    V max = broadcast(-kInfinity<A>), x_t = rows.not_found(target), e_t = x_t, rest{}, smooth_sum{}, row_total{};
    for (int64_t c = 0; c < n_cols; ++c) max = max_(V(load(rows.tile + c * Rows::W)), max);
    const V shift = finite_max_vector<A>(max);
    for (int64_t flush = 0; flush < n_cols; flush += kFlush) {
      V part{}, smooth_part{}, total_part{};
      for (int64_t c = flush; c < n_cols && c < flush + kFlush; ++c) {
        const V z = load(rows.tile + c * Rows::W);
        const I is_target = SOFT ? I{} : I(target == typename Rows::Int(c));
        const V exp_z = exp_nonpositive(z - shift), e = is_target ? V{} : exp_z;
        x_t = is_target ? z : x_t, e_t = is_target ? exp_z : e_t;
        part += e;
        if constexpr (SOFT) {
          const V a = rows.class_weight(terms, c);
          smooth_part += a * (shift - z), total_part += a;
        } else if (uniform) {
          smooth_part += shift - z;
        }
        store(rows.tile + c * Rows::W, e);
      }
      rest += part, smooth_sum += smooth_part, row_total += total_part;
    }

    const int64_t row = rows.row;
    const RowStats<A> s = few_stats<A>(max, rest, x_t, e_t, rows.weights(terms, target), shift, smooth_sum, row_total);
    V g = broadcast(A(coefficient)), losses = row_loss<A>(s, terms, log_sum(s, terms));
    if (terms.sample_weight) {
      const V factor = rows.of_rows(terms.sample_weight + row);
      g *= factor, losses *= factor;
    }
    alignas(64) A loss[Rows::W];
    store(loss, V(counted ? losses : V{}));
    problem.reduction == kNone ? store_losses(problem, row, loss, rows.n) : sum.add(load(loss));
    if (saved) {
      const int64_t n_rows = problem.n_rows();
      rows.keep(saved + row, max), rows.keep(saved + n_rows + row, rest);
      rows.keep(saved + 2 * n_rows + row, V(counted ? losses : broadcast(-kInfinity<A>)));
      if (SOFT) rows.keep(saved + 3 * n_rows + row, row_total);
    }
    if (dx) rows.store_gradients(dx, terms, row_factors<A>(s, terms, g), target, counted);
  });
  return {sum.total(), 0};
}

template <class T, bool SOFT>
void backward_few(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vector<A>;
  using Rows = FewRows<T, A, SOFT>;
  using I = typename Rows::I;
  const A *head = static_cast<const A*>(problem.saved), *saved = head + kState;
  const Terms<A> terms(problem, head[3]);
  for_few<T, SOFT>(problem, begin, end, [&](Rows& rows, T* dx) {
    const int64_t row = rows.row;
    const I target = rows.targets(), counted = I(target >= 0);
    V g = head[0] * load_dloss<T, A>(problem, row, 0, rows.n);
    if (terms.sample_weight) g *= rows.of_rows(terms.sample_weight + row);
    g = counted ? g : V{};  // not times 0: the upstream gradient may be infinite
    const I live = counted & I(g != V{});
    const V max = live ? rows.of_rows(saved + row) : V{}, shift = finite_max_vector<A>(max);
    const V rest = live ? rows.of_rows(saved + problem.n_rows() + row) : broadcast(A(1));
    V row_total{};
    if constexpr (SOFT) row_total = live ? rows.of_rows(saved + 3 * problem.n_rows() + row) : V{};
    const int64_t n_cols = problem.n_cols;
    V x_t = rows.not_found(target), e_t = x_t;
    for (int64_t c = 0; c < n_cols; ++c) {
      const I is_target = I(target == typename Rows::Int(c));
      const V z = load(rows.tile + c * Rows::W), e = exp_nonpositive(z - shift);
      x_t = is_target ? z : x_t, e_t = is_target ? e : e_t;
      store(rows.tile + c * Rows::W, e);
    }
    const RowStats<A> s = few_stats<A>(max, rest, x_t, e_t, rows.weights(terms, target), shift, V{}, row_total);
    const RowFactors<A> f = row_factors<A>(s, terms, g);
    rows.store_gradients(dx, terms, f, target, live);
  });
}
