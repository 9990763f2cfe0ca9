// What the kernels do with one row's statistics: loss, coefficient, gradient factors. Derivation in kernels/rowwise.py.
//
// For class probabilities p, with q_c = w_c ((1 - eps) p_c + eps/C) and Q = sum_c q_c:
//
//     loss = sum_c q_c (shift - x_c) + Q ((m - shift) + log d)        d = rest, the sum over all classes
//     dloss/dx_c = Q exp(x_c - m) / d - q_c
//
// Included once per instruction set, like simd.h.

// Which terms the inner loops have; a template argument.
enum Terms { kPlain, kSmooth, kSmoothWeighted, kSoft, kSoftWeighted };
template <Terms terms>
struct Constant {
  static constexpr Terms value = terms;
};
constexpr bool is_soft(Terms terms) { return terms == kSoft || terms == kSoftWeighted; }
constexpr bool is_smooth(Terms terms) { return terms == kSmooth || terms == kSmoothWeighted; }
constexpr bool has_weights(Terms terms) { return terms == kSmoothWeighted || terms == kSoftWeighted; }

// One row per lane. Of a single row only lane 0 counts.
template <class A>
struct RowStats {
  Vector<A> max, rest;
  Vector<A> x_t;         // index targets: the target's logit
  Vector<A> shift;       // a fixed finite logit of the row, for smooth_sum
  Vector<A> smooth_sum;  // smoothing: sum_c w_c (shift - x_c); soft: sum_c q_c (shift - x_c)
  Vector<A> soft_total;  // soft: Q
  Vector<A> w_t;         // index targets: the target's class weight, 1 without weights
};

template <class A>
struct RowFactors {
  Vector<A> p;       // of exp(x_c - m)
  Vector<A> smooth;  // of w_c, subtracted
  Vector<A> soft;    // soft: of q_c, subtracted
  Vector<A> target;  // gradient of the target class; smooth * w_t is still to be subtracted
};

INLINE int64_t load_target(const Problem& problem, int64_t row) {
  return problem.target_kind == kUint8 ? int64_t(static_cast<const uint8_t*>(problem.target)[row])
                                       : static_cast<const int64_t*>(problem.target)[row];
}

template <class A, Terms terms>
INLINE Vector<A> row_loss(const RowStats<A>& s, const Problem& problem, A weight_total) {
  if constexpr (is_soft(terms)) {
    return s.smooth_sum + s.soft_total * ((s.max - s.shift) + log_(s.rest));
  } else {
    Vector<A> log_sum = log_(s.rest + exp_nonpositive(s.x_t - s.max));
    // (m - x_t) is added in both branches: it is 0 at the maximum, and NaN where both are infinite, as PyTorch has it.
    Vector<A> loss = s.w_t * ((s.max - s.x_t) + (s.x_t == s.max ? log1p_(s.rest) : log_sum));
    if constexpr (is_smooth(terms)) {
      const A smoothing = A(problem.smoothing);
      Vector<A> all = weight_total * ((s.max - s.shift) + log_sum) + s.smooth_sum;
      loss = (A(1) - smoothing) * loss + smoothing / A(problem.n_cols) * all;
    }
    return loss;
  }
}

template <class A, Terms terms>
INLINE RowFactors<A> row_factors(const RowStats<A>& s, const Problem& problem, A weight_total, Vector<A> g) {
  if constexpr (is_soft(terms)) {
    return {g * s.soft_total / s.rest, Vector<A>{}, g, Vector<A>{}};
  } else {
    Vector<A> e_t = exp_nonpositive(s.x_t - s.max), d = s.rest + e_t;
    Vector<A> nll_factor = g * s.w_t, smooth{}, smooth_total{};
    if constexpr (is_smooth(terms)) {
      nll_factor *= A(1) - A(problem.smoothing);
      smooth = g * (A(problem.smoothing) / A(problem.n_cols));
      smooth_total = smooth * weight_total;
    }
    return {(nll_factor + smooth_total) / d, smooth, Vector<A>{}, smooth_total / d * e_t - nll_factor * (s.rest / d)};
  }
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
  alignas(64) A max[N], rest[N], x_t[N], w_t[N], shift[N], smooth[N], soft[N];
  alignas(64) A g[N], loss[N], p[N], smooth_factor[N], soft_factor[N], at_target[N];
  alignas(64) typename Simd<A>::Int target[N];
  bool live[N];  // the row counts, and in the backward has a coefficient other than 0

  // The forward's view of `row`.
  template <Terms terms>
  INLINE void begin_forward(const Problem& problem, int lane, int64_t row, bool exists, A coefficient) {
    const int64_t t = exists && !is_soft(terms) ? load_target(problem, row) : -1;
    live[lane] = exists && (is_soft(terms) || t != problem.ignore_index);
    target[lane] = typename Simd<A>::Int(live[lane] ? t : -1);
    w_t[lane] = live[lane] && !is_soft(terms) ? target_weight<A>(problem, t) : A(1);
    g[lane] = coefficient;
    clear(lane);
  }
  // The backward's, without x_t and soft. A class index that changed since the forward is never an address.
  template <Terms terms>
  INLINE void begin_backward(const Problem& problem, int lane, int64_t row, bool exists) {
    const A* saved = static_cast<const A*>(problem.saved);
    const int64_t t = exists && !is_soft(terms) ? load_target(problem, row) : -1;
    g[lane] = exists ? row_coefficient<A>(problem, row) : A(0);
    live[lane] = g[lane] != 0 && (is_soft(terms) || (t >= 0 && t < problem.n_cols));
    target[lane] = typename Simd<A>::Int(live[lane] ? t : -1);
    w_t[lane] = live[lane] && !is_soft(terms) ? target_weight<A>(problem, t) : A(1);
    clear(lane);
    if (live[lane]) max[lane] = saved[kState + row], rest[lane] = saved[kState + problem.n_rows() + row];
  }
  INLINE void clear(int lane) { max[lane] = 0, rest[lane] = 1, x_t[lane] = shift[lane] = smooth[lane] = soft[lane] = 0; }

  INLINE RowStats<A> stats(int lane) const {
    return {load(max + lane), load(rest + lane), load(x_t + lane), load(shift + lane), load(smooth + lane), load(soft + lane),
            load(w_t + lane)};
  }
  // Losses of all rows from their statistics; returns the sum.
  template <Terms terms>
  double finish_forward(const Problem& problem, int64_t row, int n, A weight_total) {
    double total = 0;
    for (int lane = 0; lane < n; lane += Simd<A>::W) store(loss + lane, row_loss<A, terms>(stats(lane), problem, weight_total));
    for (int lane = 0; lane < n; ++lane)
      total += store_row<A>(problem, row + lane, live[lane], live[lane] ? loss[lane] : A(0), max[lane], rest[lane]);
    return total;
  }
  // Factors of all gradients. Of rows that are not live at_target is the whole gradient: 0, or NaN for an index that changed.
  template <Terms terms>
  void factors(const Problem& problem, int n, A weight_total) {
    for (int lane = 0; lane < n; lane += Simd<A>::W) {
      RowFactors<A> f = row_factors<A, terms>(stats(lane), problem, weight_total, load(g + lane));
      store(p + lane, f.p), store(smooth_factor + lane, f.smooth), store(soft_factor + lane, f.soft);
      store(at_target + lane, f.target);
    }
    for (int lane = 0; lane < n; ++lane)
      if (!live[lane]) at_target[lane] = problem.dloss && g[lane] != 0 ? kNaN<A> : A(0);
  }
};
