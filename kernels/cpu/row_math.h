// What the kernels do with one row's statistics: loss, coefficient, gradient factors. Derivation in kernels/rowwise.py.
//
// For class probabilities p, with q_c = w_c ((1 - eps) p_c + eps/C) and Q = sum_c q_c:
//
//     loss = sum_c q_c (shift - x_c) + Q ((m - shift) + log d)        d = rest, the sum over all classes
//     dloss/dx_c = Q exp(x_c - m) / d - q_c
//
// Included once per instruction set, like simd.h.

// What the loss has besides the logarithm of the target's probability, the same for all rows of a problem.
//
// Every class c has a factor q_c: it is 0 for plain index targets; 1, times smoothing / C, for smoothing; the class weight w_c, times
// the same, for both; and for probabilities as above. The loops know three cases: none, all alike, one per class.
template <class A>
struct Terms {
  bool soft;       // class probabilities as target
  bool uniform;    // the same q for every class
  bool per_class;
  const A* weight;
  A smoothing, smoothing_per_class;
  A weight_total;  // sum of the class weights, n_cols without them

  Terms(const Problem& problem, double weight_total)
      : soft(problem.target_kind == kProbabilities),
        uniform(!soft && problem.smoothing > 0 && !problem.weight),
        per_class(soft || (problem.smoothing > 0 && problem.weight)),
        weight(static_cast<const A*>(problem.weight)),
        smoothing(A(problem.smoothing)),
        smoothing_per_class(A(problem.smoothing) / A(problem.n_cols)),
        weight_total(A(weight_total)) {}

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
  Vector<A> x_t;      // index targets: the target's logit
  Vector<A> shift;    // a fixed finite logit of the row, for q_sum
  Vector<A> q_sum;    // sum_c q_c (shift - x_c)
  Vector<A> q_total;  // soft: Q
  Vector<A> w_t;      // index targets: the target's class weight, 1 without weights
};

template <class A>
struct RowFactors {
  Vector<A> p;         // of exp(x_c - m)
  Vector<A> constant;  // subtracted
  Vector<A> q;         // of q_c, subtracted
  Vector<A> target;    // the whole gradient of the target class
};

INLINE int64_t load_target(const Problem& problem, int64_t row) {
  return problem.target_kind == kUint8 ? int64_t(static_cast<const uint8_t*>(problem.target)[row])
                                       : static_cast<const int64_t*>(problem.target)[row];
}

template <class A>
INLINE Vector<A> row_loss(const RowStats<A>& s, const Terms<A>& terms) {
  if (terms.soft) return s.q_sum + s.q_total * ((s.max - s.shift) + log_(s.rest));
  Vector<A> log_sum = log_(s.rest + exp_nonpositive(s.x_t - s.max));
  // (m - x_t) is added in both branches: it is 0 at the maximum, and NaN where both are infinite, as PyTorch has it.
  Vector<A> loss = s.w_t * ((s.max - s.x_t) + (s.x_t == s.max ? log1p_(s.rest) : log_sum));
  if (terms.smoothing > 0) {
    Vector<A> all = terms.weight_total * ((s.max - s.shift) + log_sum) + s.q_sum;
    loss = (A(1) - terms.smoothing) * loss + terms.smoothing_per_class * all;
  }
  return loss;
}

template <class A>
INLINE RowFactors<A> row_factors(const RowStats<A>& s, const Terms<A>& terms, Vector<A> g) {
  if (terms.soft) return {g * s.q_total / s.rest, Vector<A>{}, g, Vector<A>{}};
  Vector<A> e_t = exp_nonpositive(s.x_t - s.max), d = s.rest + e_t;
  Vector<A> nll_factor = g * s.w_t * (A(1) - terms.smoothing), smooth = g * terms.smoothing_per_class;
  Vector<A> smooth_total = smooth * terms.weight_total;
  // The target's probability less 1 is -rest / d, without cancellation.
  Vector<A> target = smooth_total / d * e_t - nll_factor * (s.rest / d) - smooth * s.w_t;
  return {(nll_factor + smooth_total) / d, terms.uniform ? smooth : Vector<A>{}, smooth, target};
}

template <class A>
INLINE A target_weight(const Problem& problem, int64_t target) {
  return problem.weight ? static_cast<const A*>(problem.weight)[target] : A(1);
}

// Unsigned integers in the order of the losses, NaN the greatest, -0.0 equal to 0.0.
INLINE uint32_t sortable_bits(float loss) {
  uint32_t bits = bit_cast<uint32_t>(loss + 0.0f);
  return loss != loss ? ~uint32_t(0) : bits >> 31 ? ~bits : bits | 0x80000000u;
}
INLINE uint64_t sortable_bits(double loss) {
  uint64_t bits = bit_cast<uint64_t>(loss + 0.0);
  return loss != loss ? ~uint64_t(0) : bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// d(batch loss)/d(loss of the row) in the backward, upstream gradient and scale included; 0 for rows that do not count.
template <class A>
A row_coefficient(const Problem& problem, int64_t row) {
  const A* saved = static_cast<const A*>(problem.saved);
  const A* dloss = static_cast<const A*>(problem.dloss);
  if (problem.target_kind != kProbabilities && load_target(problem, row) == problem.ignore_index) return 0;
  A coefficient = saved[0];
  if (problem.reduction == kMax || problem.reduction == kTopK) {
    auto key = sortable_bits(saved[kState + 2 * problem.n_rows() + row]), threshold = sortable_bits(saved[2]);
    coefficient = key > threshold ? coefficient : key == threshold ? saved[1] : A(0);
  }
  return coefficient * dloss[problem.reduction == kNone ? row : 0];
}

// Stores what the forward keeps of a row; returns its loss if the batch reduction needs it.
template <class A>
double store_row(const Problem& problem, int64_t row, bool counted, A loss, A max, A rest) {
  A* saved = static_cast<A*>(problem.saved);
  if (problem.save) {
    saved[kState + row] = max;
    saved[kState + problem.n_rows() + row] = rest;
  }
  if (problem.reduction == kMax || problem.reduction == kTopK)
    saved[kState + 2 * problem.n_rows() + row] = counted ? loss : -kInfinity<A>;
  if (problem.reduction != kNone) return double(loss);
  A scaled = A(problem.scale) * loss;
  switch (problem.loss_dtype) {
    case kFloat32: static_cast<float*>(problem.loss)[row] = float(scaled); break;
    case kFloat64: static_cast<double*>(problem.loss)[row] = double(scaled); break;
    case kBfloat16: store1(static_cast<bfloat16*>(problem.loss) + row, float(scaled)); break;
    default: store1(static_cast<float16*>(problem.loss) + row, float(scaled)); break;
  }
  return 0;
}

// The same per row of a group, one row per lane: what the two layouts share. Lanes without a row, or whose row does not count,
// compute something harmless.
constexpr int MAX_LANES = 256;

template <class A>
struct GroupState {
  static constexpr int N = MAX_LANES;
  alignas(64) A max[N], rest[N], x_t[N], w_t[N], shift[N], q_sum[N], q_total[N];
  alignas(64) A g[N], loss[N], p[N], constant[N], q[N], at_target[N];
  int64_t target[N];  // -1: none, for soft targets and lanes that are not live
  bool live[N];       // the row counts, and in the backward has a coefficient other than 0

  // Lanes [0, lanes) for rows [row, row + n), whose logits begin at x: their targets, x_t, and for the backward max and rest.
  template <class T>
  void begin(const Problem& problem, const Terms<A>& terms, const T* x, int64_t row, int n, int lanes, bool backward,
             A coefficient) {
    const A* saved = static_cast<const A*>(problem.saved);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t r = row + lane, t = lane < n && !terms.soft ? load_target(problem, r) : -1;
      max[lane] = -kInfinity<A>, rest[lane] = x_t[lane] = shift[lane] = q_sum[lane] = q_total[lane] = 0, w_t[lane] = 1;
      g[lane] = lane >= n ? A(0) : backward ? row_coefficient<A>(problem, r) : coefficient;
      live[lane] = lane < n && (terms.soft || t != problem.ignore_index);
      // In the backward a class index that changed since the forward is never an address.
      if (backward) live[lane] = g[lane] != 0 && (terms.soft || (t >= 0 && t < problem.n_cols));
      target[lane] = live[lane] ? t : -1;
      if (!live[lane]) continue;
      if (backward) max[lane] = saved[kState + r], rest[lane] = saved[kState + problem.n_rows() + r];
      if (terms.soft) continue;
      x_t[lane] = load1(x + lane * problem.logits_strides.row + t * problem.logits_strides.col);
      if (terms.weight) w_t[lane] = terms.weight[t];
    }
  }

  INLINE RowStats<A> stats(int lane) const {
    return {load(max + lane),   load(rest + lane),    load(x_t + lane), load(shift + lane),
            load(q_sum + lane), load(q_total + lane), load(w_t + lane)};
  }
  // Losses of all rows from their statistics; returns the sum.
  double finish_forward(const Problem& problem, const Terms<A>& terms, int64_t row, int n) {
    double total = 0;
    for (int lane = 0; lane < n; lane += Simd<A>::W) store(loss + lane, row_loss<A>(stats(lane), terms));
    for (int lane = 0; lane < n; ++lane)
      total += store_row<A>(problem, row + lane, live[lane], live[lane] ? loss[lane] : A(0), max[lane], rest[lane]);
    return total;
  }
  // Factors of all gradients. Of rows that are not live at_target is the whole gradient: 0, or NaN for an index that changed.
  void factors(const Problem& problem, const Terms<A>& terms, int n) {
    for (int lane = 0; lane < n; lane += Simd<A>::W) {
      RowFactors<A> f = row_factors<A>(stats(lane), terms, load(g + lane));
      store(p + lane, f.p), store(constant + lane, f.constant), store(q + lane, f.q), store(at_target + lane, f.target);
    }
    for (int lane = 0; lane < n; ++lane)
      if (!live[lane]) at_target[lane] = problem.dloss && g[lane] != 0 ? kNaN<A> : A(0);
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

// Where the classes of a group's first row lie.
template <class T, class A>
struct GroupPointers {
  const T* x;
  T* dx;       // null without a gradient
  const A* p;  // probabilities; null for class indices
  GroupPointers(const Problem& problem, int64_t row)
      : x(static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row)),
        dx(problem.dlogits ? static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row) : nullptr),
        p(problem.target_kind == kProbabilities
              ? static_cast<const A*>(problem.target) + problem.offset(problem.target_strides, row)
              : nullptr) {}
};
