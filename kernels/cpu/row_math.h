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

template <class A>
struct RowStats {
  A max, rest;
  A x_t;         // index targets: the target's logit
  A shift;       // a fixed finite logit of the row, for smooth_sum
  A smooth_sum;  // smoothing: sum_c w_c (shift - x_c); soft: sum_c q_c (shift - x_c)
  A soft_total;  // soft: Q
};

template <class A>
struct RowFactors {
  A p;       // of exp(x_c - m)
  A smooth;  // of w_c, subtracted
  A soft;    // soft: of q_c, subtracted
  A target;  // gradient of the target class; smooth * w_t is still to be subtracted
};

INLINE int64_t load_target(const Problem& problem, int64_t row) {
  return problem.target_kind == kUint8 ? int64_t(static_cast<const uint8_t*>(problem.target)[row])
                                       : static_cast<const int64_t*>(problem.target)[row];
}

INLINE float log_(float x) { return __builtin_logf(x); }
INLINE double log_(double x) { return __builtin_log(x); }
INLINE float log1p_(float x) { return __builtin_log1pf(x); }
INLINE double log1p_(double x) { return __builtin_log1p(x); }

template <class A>
A target_weight(const Problem& problem, int64_t target) {
  return problem.weight ? static_cast<const A*>(problem.weight)[target] : A(1);
}

template <class A, Terms terms>
A row_loss(const RowStats<A>& s, const Problem& problem, int64_t target, A weight_total) {
  if constexpr (is_soft(terms)) return s.smooth_sum + s.soft_total * ((s.max - s.shift) + log_(s.rest));
  A e_t = exp_nonpositive1(s.x_t - s.max);
  // (m - x_t) is added in both branches: it is 0 at the maximum, and NaN where both are infinite, as PyTorch has it.
  A nll = (s.max - s.x_t) + (s.x_t == s.max ? log1p_(s.rest) : log_(s.rest + e_t));
  A loss = target_weight<A>(problem, target) * nll;
  if constexpr (is_smooth(terms)) {
    A smoothing = A(problem.smoothing);
    A log_sum = (s.max - s.shift) + log_(s.rest + e_t);
    loss = (A(1) - smoothing) * loss + smoothing / A(problem.n_cols) * (weight_total * log_sum + s.smooth_sum);
  }
  return loss;
}

template <class A, Terms terms>
RowFactors<A> row_factors(const RowStats<A>& s, const Problem& problem, int64_t target, A weight_total, A g) {
  if constexpr (is_soft(terms)) return {g * s.soft_total / s.rest, A(0), g, A(0)};
  A e_t = exp_nonpositive1(s.x_t - s.max), d = s.rest + e_t;
  A nll_factor = g * target_weight<A>(problem, target), smooth = 0, smooth_total = 0;
  if constexpr (is_smooth(terms)) {
    nll_factor *= A(1) - A(problem.smoothing);
    smooth = g * (A(problem.smoothing) / A(problem.n_cols));
    smooth_total = smooth * weight_total;
  }
  return {(nll_factor + smooth_total) / d, smooth, A(0), smooth_total / d * e_t - nll_factor * (s.rest / d)};
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
