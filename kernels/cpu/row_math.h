// What the kernels do with one row's statistics: loss, coefficient, gradient factors. Derivation in kernels/rowwise.py.
//
// For class probabilities p, with q_c = w_c ((1 - eps) p_c + eps/C) and Q = sum_c q_c:
//
//     loss = sum_c q_c (shift - x_c) + Q ((m - shift) + log d)        d = rest, the sum over all classes
//     dloss/dx_c = Q exp(x_c - m) / d - q_c
//
// Two labels a and b with shares lam and 1 - lam: each with its part of the loss and of the gradient, `rest` excluding a alone.
// With k_a = lam (1 - eps) w_a, k_b likewise and Z = 2 z_loss lse:
//
//     loss = k_a nll_a + k_b nll_b + eps/C sum_c w_c nll_c + z_loss lse^2
//     dloss/dx_c = (k_a + k_b + eps/C W + Z) p_c - eps/C w_c - k_a [c = a] - k_b [c = b]
//
// A focal loss has k_t u^gamma for k_t, u = 1 - p_t, and in the gradient what rowwise.py says.
//
// Statistics have the entropy of a row, log d + G' / d with G' = sum_c exp(x_c - m) (m - x_c), summed without the target as `rest` is.
//
// All of it is of the transformed logits, z = cap tanh(logit_scale x / cap): the loops see no others, but for the gradient's
// factor dz/dx = logit_scale (1 - (z / cap)^2).
//
// Included once per instruction set, like simd.h.

// What the loss has besides the logarithm of the target's probability, the same for all rows of a problem.
//
// Every class c has a factor q_c: it is 0 for plain index targets; 1, times smoothing / C, for smoothing; the class weight w_c,
// times the same, for both; and for probabilities as above. The loops know three cases: none, all alike, one per class.
template <class A>
struct Terms {
  bool soft;       // class probabilities as target
  bool uniform;    // the same q for every class
  bool per_class;
  bool two_labels;
  bool transformed;  // the logits are scaled or capped
  bool capped;
  bool entropy;  // is asked for
  const A *weight, *sample_weight, *lam;
  A smoothing, smoothing_per_class;
  A weight_total;  // sum of the class weights, n_cols without them
  A z_loss, lam_factor, logit_scale, softcap, per_softcap, focal_gamma;

  Terms(const Problem& problem, double weight_total)
      : soft(problem.has_probabilities()),
        uniform(!soft && problem.smoothing > 0 && !problem.weight),
        per_class(soft || (problem.smoothing > 0 && problem.weight)),
        two_labels(problem.target_b),
        transformed(problem.logit_scale != 1 || problem.softcap > 0),
        capped(problem.softcap > 0),
        entropy(problem.statistics),
        weight(problem.weight ? static_cast<const A*>(problem.weight) + problem.first_class : nullptr),
        sample_weight(static_cast<const A*>(problem.sample_weight)),
        lam(static_cast<const A*>(problem.lam)),
        smoothing(A(problem.smoothing)),
        smoothing_per_class(A(problem.smoothing) / A(problem.n_row_cols())),
        weight_total(A(weight_total)),
        z_loss(A(problem.z_loss)),
        lam_factor(A(problem.lam_factor)),
        logit_scale(A(problem.logit_scale)),
        softcap(A(problem.softcap)),
        per_softcap(capped ? A(1) / A(problem.softcap) : A(0)),
        focal_gamma(A(problem.focal_gamma)) {}

  INLINE A share(int64_t row) const { return lam ? lam[row] : lam_factor; }  // of the first label

  INLINE Vector<A> transform(Vector<A> x) const {
    const Vector<A> scaled = x * logit_scale;
    return capped ? softcap * tanh_<A>(scaled * per_softcap) : scaled;
  }
  INLINE Vector<A> derivative(Vector<A> z) const {  // dz/dx where there is a cap, or else logit_scale for all
    const Vector<A> t = z * per_softcap;
    return logit_scale * (A(1) - t * t);
  }

  // q of class c where it is one per class; p: its probability, for soft targets.
  template <class X>
  INLINE X q(X p, X w) const {
    if (!soft) return w;
    const X mixed = p * (A(1) - smoothing) + smoothing_per_class;
    return weight ? mixed * w : mixed;
  }
};

// One row per lane. Of a single row only lane 0 counts.
template <class A>
struct RowStats {
  Vector<A> max, rest;
  Vector<A> x_t, x_b;  // the targets' logits; soft: undefined
  Vector<A> e_t;       // exp(x_t - m)
  Vector<A> w_t, w_b;  // the targets' class weights, 1 without weights
  Vector<A> k_t, k_b;  // the same times the label's share
  Vector<A> shift;     // a fixed finite logit of the row, for q_sum
  Vector<A> q_sum;     // sum_c q_c (shift - x_c)
  Vector<A> q_total;   // soft: Q
};

template <class A>
struct RowFactors {
  Vector<A> p;            // of exp(x_c - m)
  Vector<A> constant;     // subtracted
  Vector<A> q;            // of q_c, subtracted
  Vector<A> at_t, at_b;   // the whole gradient of the target classes
};

// log of the sum over all classes of exp(x_c - m).
template <class A>
INLINE Vector<A> log_sum(const RowStats<A>& s, const Terms<A>& terms) {
  if (terms.soft) return log_(s.rest);
  // Where the target is not the largest, that one has put 1 into rest: one logarithm serves both.
  return log1p_<A>(s.x_t == s.max ? s.rest : (s.rest - A(1)) + s.e_t);
}

// What a focal loss multiplies k_t by: in the loss u^gamma, in the gradient u^gamma (1 + gamma nll e_t / rest).
template <class A>
struct Focal {
  Vector<A> of_loss, of_gradient;
  Focal(const RowStats<A>& s, const Terms<A>& terms, Vector<A> log_d) {
    const Vector<A> odds = s.e_t / s.rest, nll = (s.max - s.x_t) + log_d;
    const auto sure = odds == kInfinity<A>;  // p_t is 1: both are 0
    of_loss = sure ? Vector<A>{} : exp_nonpositive(-terms.focal_gamma * log1p_<A>(odds));
    const Vector<A> slope = (sure | (odds == A(0))) ? Vector<A>{} : odds * nll;  // nll may be infinite
    of_gradient = of_loss * (A(1) + terms.focal_gamma * slope);
  }
};

// exp(x - m) (m - x), the terms of a row's entropy; 0 where the exponential e is, though x be -inf.
template <class A>
INLINE Vector<A> gap_terms(Vector<A> e, Vector<A> m, Vector<A> x) {
  return e == A(0) ? Vector<A>{} : e * (m - x);
}

template <class A>
INLINE Vector<A> row_loss(const RowStats<A>& s, const Terms<A>& terms, Vector<A> log_d) {
  Vector<A> loss;
  if (terms.soft) {
    loss = s.q_sum + s.q_total * ((s.max - s.shift) + log_d);
  } else {
    // (m - x_t) is added at the maximum too: it is 0 there, and NaN where both are infinite, as PyTorch has it.
    const Vector<A> nll = (s.max - s.x_t) + log_d;
    loss = s.k_t * nll;
    if (terms.two_labels) {  // a label without a share does not enter, though its logit be -inf
      const Vector<A> nll_b = (s.max - s.x_b) + log_d;
      loss = ((s.k_t == A(0)) & (nll == kInfinity<A>)) ? Vector<A>{} : loss;
      loss += ((s.k_b == A(0)) & (nll_b == kInfinity<A>)) ? Vector<A>{} : s.k_b * nll_b;
    }
    if (terms.smoothing > 0) {
      Vector<A> all = terms.weight_total * ((s.max - s.shift) + log_d) + s.q_sum;
      loss = (A(1) - terms.smoothing) * loss + terms.smoothing_per_class * all;
    }
  }
  if (terms.z_loss != 0) loss += terms.z_loss * ((s.max + log_d) * (s.max + log_d));
  return loss;
}

template <class A>
INLINE RowFactors<A> row_factors(const RowStats<A>& s, const Terms<A>& terms, Vector<A> g) {
  Vector<A> z_factor{};
  if (terms.z_loss != 0) z_factor = g * (A(2) * terms.z_loss) * (s.max + log_sum(s, terms));
  if (terms.soft) return {(g * s.q_total + z_factor) / s.rest, Vector<A>{}, g, Vector<A>{}, Vector<A>{}};
  const Vector<A> d = s.rest + s.e_t;
  Vector<A> keep = g * (A(1) - terms.smoothing), smooth = g * terms.smoothing_per_class;
  Vector<A> k_t = keep * s.k_t, others = smooth * terms.weight_total + z_factor, k_b{};
  if (terms.two_labels) k_b = keep * s.k_b, others += k_b;
  // The target's probability less 1 is -rest / d, without cancellation.
  RowFactors<A> f = {(k_t + others) / d, terms.uniform ? smooth : Vector<A>{}, smooth,
                     others / d * s.e_t - k_t * (s.rest / d) - smooth * s.w_t, Vector<A>{}};
  if (terms.two_labels) f.at_b = f.p * exp_nonpositive(s.x_b - s.max) - k_b - smooth * s.w_b;
  return f;
}

// Values of rows from lane on, 0 from row n on; values: that of row 0.
template <class A>
INLINE Vector<A> load_rows(const A* values, int lane, int n) {
  return lane + Simd<A>::W <= n ? Vector<A>(load(values + lane)) : load_partial<A, A>(values + lane, n - lane);
}

// Losses of n rows, for reduction "none".
template <class T, class A>
INLINE void store_losses_as(const Problem& problem, int64_t row, const A* losses, int n) {
  using Wide = typename Accumulate<T>::type;
  T* to = static_cast<T*>(problem.loss) + row;
  const A scale = A(problem.scale);
  int lane = 0;
  if constexpr (sizeof(Wide) == sizeof(A))
    for (; lane + Simd<A>::W <= n; lane += Simd<A>::W) store(to + lane, Vector<A>(scale * load(losses + lane)));
  for (; lane < n; ++lane) store1(to + lane, Wide(scale * losses[lane]));
}
template <class A>
void store_losses(const Problem& problem, int64_t row, const A* losses, int n) {
  switch (problem.loss_dtype) {
    case kFloat32: return store_losses_as<float>(problem, row, losses, n);
    case kFloat64: return store_losses_as<double>(problem, row, losses, n);
    case kBfloat16: return store_losses_as<bfloat16>(problem, row, losses, n);
    default: return store_losses_as<float16>(problem, row, losses, n);
  }
}

// Of float32 losses a double has 29 bits to spare. Those of lanes without a row are 0.
template <class A>
INLINE void add_losses(CompensatedSum& sum, const A* losses, int n) {
  if constexpr (sizeof(A) == sizeof(double)) {
    for (int lane = 0; lane < n; ++lane) sum.add(losses[lane]);
  } else {
    using D = Simd<double>;
    D::V parts{};
    for (int lane = 0; lane < n; lane += D::W) {
      D::Floats floats;
      __builtin_memcpy(&floats, losses + lane, sizeof floats);
      parts += __builtin_convertvector(floats, D::V);
    }
    double total = 0;
    UNROLL for (int i = 0; i < D::W; ++i) total += parts[i];
    sum.sum += total;
  }
}

// The same per row of a group, one row per lane: what the two layouts share. Lanes without a row, or whose row does not count,
// compute something harmless.
constexpr int kMaxLanes = 256;

template <class A>
struct GroupState {
  static constexpr int N = kMaxLanes, W = Simd<A>::W;
  static constexpr int64_t kNoCol = INT64_MIN;
  using V = Vector<A>;

  alignas(64) A max[N], rest[N], x_t[N], x_b[N], w_t[N], w_b[N], k_t[N], k_b[N], shift[N], q_sum[N], q_total[N];
  alignas(64) A g[N], loss[N], lse[N], p[N], constant[N], q[N], at_t[N], at_b[N];
  alignas(64) A gap_sum[N], gap_max[N];  // for the entropy; lanes.h: the maximum that the sum is relative to
  alignas(64) A live[N];           // 1: the row counts, and in the backward has a coefficient other than 0; else 0
  // Columns of the labels, which may lie outside a slice; kNoCol: none, for soft targets and lanes that are not live.
  int64_t target[N], target_b[N];

  // Lanes [0, lanes) for rows [row, row + n): their targets and coefficients.
  void begin_forward(const Problem& problem, const Terms<A>& terms, int64_t row, int n, int lanes, A coefficient) {
    read_targets(problem, terms, row, n, lanes);
    for (int lane = 0; lane < lanes; lane += W) {
      V factor = broadcast(coefficient);
      if (terms.sample_weight) factor *= load_rows<A>(terms.sample_weight + row, lane, n);
      store(g + lane, factor), store(max + lane, broadcast(-kInfinity<A>)), store(rest + lane, V{});
      if (terms.entropy) store(gap_sum + lane, V{}), store(gap_max + lane, broadcast(-kInfinity<A>));
    }
    weigh_targets(terms, row, lanes);
  }
  // The same, and the statistics of the forward; x: the logits of the first row.
  template <class T>
  void begin_backward(const Problem& problem, const Terms<A>& terms, const T* x, int64_t row, int n, int lanes) {
    const int64_t n_rows = problem.n_rows(), col = problem.logits_strides.col;
    const A *head = static_cast<const A*>(problem.saved), *whole_rows = static_cast<const A*>(problem.slice_stats);
    const A* saved = (whole_rows ? whole_rows : head + kState) + row;
    const A* dloss = static_cast<const A*>(problem.dloss);
    read_targets(problem, terms, row, n, lanes);
    for (int lane = 0; lane < lanes; lane += W) {
      V factor = broadcast(head[0]);
      if (problem.selects_rows()) factor = selected(saved + 2 * n_rows, lane, n, head);
      factor *= problem.reduction == kNone ? load_rows<A>(dloss + row, lane, n) : broadcast(dloss[0]);
      if (terms.sample_weight) factor *= load_rows<A>(terms.sample_weight + row, lane, n);
      const V counted = load(live + lane);
      factor = counted != V{} ? factor : V{};  // not times 0: the upstream gradient may be infinite
      store(g + lane, factor), store(live + lane, factor != V{} ? counted : V{});
    }
    for (int lane = 0; lane < lanes && !terms.soft; ++lane) {  // an index that changed since the forward is never an address
      if (!is_class(problem, target[lane]) || (terms.two_labels && !is_class(problem, target_b[lane]))) live[lane] = 0;
      if (live[lane] == 0) target[lane] = target_b[lane] = kNoCol;
    }
    for (int lane = 0; lane < lanes; lane += W) {
      const auto is_live = V(load(live + lane)) != V{};
      store(max + lane, is_live ? load_rows<A>(saved, lane, n) : V{});
      store(rest + lane, is_live ? load_rows<A>(saved + n_rows, lane, n) : broadcast(A(1)));
      if (terms.soft) store(q_total + lane, is_live ? load_rows<A>(saved + 3 * n_rows, lane, n) : V{});
    }
    weigh_targets(terms, row, lanes);
    if (whole_rows && !terms.soft) {
      copy(x_t, saved + 2 * n_rows, n);
      if (terms.two_labels) copy(x_b, saved + 5 * n_rows, n);
      return;
    }
    for (int lane = 0; lane < n; ++lane, x += problem.logits_strides.row) {
      if (is_here(problem, target[lane])) x_t[lane] = logit(terms, x + target[lane] * col);
      if (terms.two_labels && is_here(problem, target_b[lane])) x_b[lane] = logit(terms, x + target_b[lane] * col);
    }
  }

  // Whether this slice of the row, which is all of it but for sharded classes, has that column.
  static INLINE bool is_here(const Problem& problem, int64_t col) { return col >= 0 && col < problem.n_cols; }

  INLINE RowStats<A> stats(const Terms<A>& terms, int lane) const {
    auto of_b = [&](const A* values) { return terms.two_labels ? Vector<A>(load(values + lane)) : Vector<A>{}; };
    const V m = load(max + lane), x = load(x_t + lane), e = terms.soft ? V{} : exp_nonpositive(x - m);
    return {m,         load(rest + lane), x,         of_b(x_b),          e, load(w_t + lane),
            of_b(w_b), load(k_t + lane),  of_b(k_b), load(shift + lane), load(q_sum + lane), load(q_total + lane)};
  }
  // Losses of all rows from their statistics, and what else the caller wants to know of them.
  void finish_forward(const Problem& problem, const Terms<A>& terms, int64_t row, int n, RowSums& sums) {
    if (problem.slice_stats) return store_slice(problem, terms, row, n);
    for (int lane = 0; lane < n; lane += W) {
      RowStats<A> s = stats(terms, lane);
      const V log_d = log_sum(s, terms), counted = load(live + lane);
      if (terms.focal_gamma != 0) s.k_t *= Focal<A>(s, terms, log_d).of_loss;
      V losses = row_loss<A>(s, terms, log_d);
      if (terms.sample_weight) losses *= load_rows<A>(terms.sample_weight + row, lane, n);
      store(loss + lane, counted != V{} ? losses : V{}), store(lse + lane, counted != V{} ? s.max + log_d : V{});
      if (terms.entropy) store(gap_sum + lane, counted != V{} ? entropy(s, load(gap_sum + lane), log_d) : V{});
    }
    store_rows(problem, row, n);
    if (problem.reduction != kNone) add_losses(sums.loss, loss, n);
    if (!problem.row_stats) return;
    A* row_stats = static_cast<A*>(problem.row_stats) + row;
    copy(row_stats, lse, n), copy(row_stats + problem.n_rows(), loss, n), copy(row_stats + 2 * problem.n_rows(), gap_sum, n);
    for (int lane = 0; lane < n; ++lane) sums.n_correct += live[lane] != 0 && is_correct(terms, lane, row + lane);
  }
  // Factors of all gradients. Of rows that are not live at_t is the whole gradient: 0, or NaN for an index that changed.
  void factors(const Problem& problem, const Terms<A>& terms, int n) {
    for (int lane = 0; lane < n; lane += Simd<A>::W) {
      RowStats<A> s = stats(terms, lane);
      if (terms.focal_gamma != 0) s.k_t *= Focal<A>(s, terms, log_sum(s, terms)).of_gradient;
      RowFactors<A> f = row_factors<A>(s, terms, load(g + lane));
      if (terms.capped) {
        f.at_t *= terms.derivative(s.x_t), f.at_b *= terms.derivative(s.x_b);
      } else if (terms.transformed) {
        f.p *= terms.logit_scale, f.constant *= terms.logit_scale, f.q *= terms.logit_scale;
        f.at_t *= terms.logit_scale, f.at_b *= terms.logit_scale;
      }
      const V dead = problem.dloss ? (V(load(g + lane)) != V{} ? broadcast(kNaN<A>) : V{}) : V{};
      store(p + lane, f.p), store(constant + lane, f.constant), store(q + lane, f.q);
      store(at_t + lane, V(load(live + lane)) != V{} ? f.at_t : dead);
      if (terms.two_labels) store(at_b + lane, f.at_b);
    }
  }

 private:
  static INLINE V entropy(const RowStats<A>& s, V gap_sum, V log_d) {
    return log_d + (gap_sum + gap_terms<A>(s.e_t, s.max, s.x_t)) / (s.rest + s.e_t);
  }

  static INLINE void copy(A* to, const A* from, int n) { __builtin_memcpy(to, from, size_t(n) * sizeof(A)); }

  // The coefficients of rows that max and topk selected by their losses; head: of saved.
  static V selected(const A* losses, int lane, int n, const A* head) {
    V factor{};
    const auto threshold = sortable_bits(head[2]);
    for (int i = 0; i < W && lane + i < n; ++i) {
      const auto key = sortable_bits(losses[lane + i]);
      factor[i] = key > threshold ? head[0] : key == threshold ? head[1] : A(0);
    }
    return factor;
  }

  static bool is_class(const Problem& problem, int64_t col) {
    return uint64_t(col) + uint64_t(problem.first_class) < uint64_t(problem.n_row_cols());
  }
  template <class T>
  static A logit(const Terms<A>& terms, const T* x) {
    return terms.transformed ? terms.transform(broadcast(A(load1(x))))[0] : A(load1(x));
  }

  // The labels, and which rows count; zeros where statistics are added up, or are not known.
  void read_targets(const Problem& problem, const Terms<A>& terms, int64_t row, int n, int lanes) {
    if (terms.soft) {
      for (int lane = 0; lane < n; ++lane) target[lane] = kNoCol, live[lane] = 1;
    } else {
      problem.target_kind == kUint8 ? read_labels<uint8_t>(problem, row, n) : read_labels<int64_t>(problem, row, n);
    }
    for (int lane = n; lane < lanes; ++lane) target[lane] = target_b[lane] = kNoCol, live[lane] = 0;
    for (int lane = 0; lane < lanes; lane += W)
      store(q_sum + lane, V{}), store(q_total + lane, V{}), store(x_t + lane, V{}), store(shift + lane, V{});
  }
  template <class Label>
  void read_labels(const Problem& problem, int64_t row, int n) {
    const Label* a = static_cast<const Label*>(problem.target) + row;
    const int64_t ignored = problem.ignore_index, first = problem.first_class;
    for (int lane = 0; lane < n; ++lane) {
      const int64_t t = int64_t(a[lane]);
      target[lane] = t == ignored ? kNoCol : t - first, live[lane] = A(t != ignored);
    }
    if (!problem.target_b) return;
    const Label* b = static_cast<const Label*>(problem.target_b) + row;
    for (int lane = 0; lane < n; ++lane) {
      const int64_t t = int64_t(b[lane]);
      target_b[lane] = t - first;
      if (t == ignored) live[lane] = 0;
      if (live[lane] == 0) target[lane] = target_b[lane] = kNoCol;
    }
  }
  // The labels' class weights and shares.
  void weigh_targets(const Terms<A>& terms, int64_t row, int lanes) {
    const V one = broadcast(A(1));
    for (int lane = 0; lane < lanes; lane += W) store(w_t + lane, one), store(k_t + lane, one);
    if (terms.weight)
      for (int lane = 0; lane < lanes; ++lane)
        if (target[lane] != kNoCol) w_t[lane] = k_t[lane] = terms.weight[target[lane]];
    if (!terms.two_labels) return;
    for (int lane = 0; lane < lanes; ++lane) {
      x_b[lane] = k_b[lane] = 0, w_b[lane] = 1;
      if (target_b[lane] == target[lane]) {  // one label: its whole share counts for a, whose gradient does not cancel
        target_b[lane] = kNoCol;
        continue;
      }
      const A share = terms.share(row + lane);
      w_b[lane] = terms.weight ? terms.weight[target_b[lane]] : A(1);
      k_b[lane] = w_b[lane] * (A(1) - share), k_t[lane] *= share;
    }
  }

  // What is kept of the rows for the backward, and for reductions that select among them; or their losses.
  void store_rows(const Problem& problem, int64_t row, int n) const {
    const int64_t n_rows = problem.n_rows();
    if (problem.saved) {
      A* saved = static_cast<A*>(problem.saved) + kState + row;
      copy(saved, max, n), copy(saved + n_rows, rest, n);
      for (int lane = 0; lane < n; ++lane) saved[2 * n_rows + lane] = live[lane] != 0 ? loss[lane] : -kInfinity<A>;
      if (problem.has_probabilities()) copy(saved + 3 * n_rows, q_total, n);
    }
    if (problem.reduction == kNone) store_losses(problem, row, loss, n);
  }
  // The statistics of a slice, q_sum around its own maximum, as fusedloss/slices.py merges them.
  void store_slice(const Problem& problem, const Terms<A>& terms, int64_t row, int n) {
    const int64_t n_rows = problem.n_rows();
    A* to = static_cast<A*>(problem.slice_stats) + row;
    for (int lane = 0; lane < n; lane += W) {
      const V total = terms.uniform ? broadcast(A(problem.n_cols)) : V(load(q_total + lane));
      store(q_total + lane, total);
      store(q_sum + lane, V(load(q_sum + lane)) + total * (finite_max_vector<A>(load(max + lane)) - V(load(shift + lane))));
    }
    copy(to, max, n), copy(to + n_rows, rest, n), copy(to + 2 * n_rows, x_t, n);
    if (terms.uniform || terms.per_class || terms.two_labels) copy(to + 3 * n_rows, q_total, n), copy(to + 4 * n_rows, q_sum, n);
    if (terms.two_labels) copy(to + 5 * n_rows, x_b, n);
    const int64_t n_of_loss = terms.two_labels ? 6 : terms.uniform || terms.per_class ? 5 : 3;
    if (terms.entropy) copy(to + n_of_loss * n_rows, gap_sum, n);
  }
  // Whether the label with the larger share has the largest logit. A NaN is in `rest`, which infinite logits make NaN too.
  bool is_correct(const Terms<A>& terms, int lane, int64_t row) const {
    if (rest[lane] != rest[lane] && max[lane] < kInfinity<A>) return false;
    const bool two = terms.two_labels && target_b[lane] != kNoCol;
    const A share = two ? terms.share(row) : A(1);
    return (x_t[lane] == max[lane] && share >= A(0.5)) || (two && x_b[lane] == max[lane] && share <= A(0.5));
  }
};

// Cuts rows [begin, end) into groups of at most n rows that do not cross an outer block: one stride leads from each to the next.
template <class Body>
INLINE void for_groups(const Problem& problem, int64_t begin, int64_t end, int64_t n, const Body& body) {
  for (int64_t row = begin; row < end;) {
    const int64_t outer_end = (row / problem.n_inner + 1) * problem.n_inner;
    int64_t last = row + n < outer_end ? row + n : outer_end;
    if (last > end) last = end;
    body(row, int(last - row));
    row = last;
  }
}

// Where the classes of a group's rows lie.
template <class T, class A>
struct GroupPointers {
  const T* x;
  T* dx;                 // null without a gradient
  const A* p;            // probabilities, or
  const T* p_as_logits;  // probabilities in the logits' type; both null for class indices
  int64_t x_stride, dx_stride, p_stride;

  GroupPointers(const Problem& problem, int64_t row)
      : x(static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row)),
        dx(problem.dlogits ? static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row) : nullptr),
        p(probabilities<A>(problem, kProbabilities, row)),
        p_as_logits(probabilities<T>(problem, kProbabilitiesAsLogits, row)),
        x_stride(problem.logits_strides.row),
        dx_stride(problem.dlogits_strides.row),
        p_stride(problem.target_strides.row) {}

  GroupPointers row(int lane) const {  // beginning at that row
    GroupPointers other = *this;
    other.x += lane * x_stride;
    if (dx) other.dx += lane * dx_stride;
    if (p) other.p += lane * p_stride;
    if (p_as_logits) other.p_as_logits += lane * p_stride;
    return other;
  }

 private:
  template <class P>
  static const P* probabilities(const Problem& problem, TargetKind kind, int64_t row) {
    if (problem.target_kind != kind) return nullptr;
    return static_cast<const P*>(problem.target) + problem.offset(problem.target_strides, row);
  }
};
