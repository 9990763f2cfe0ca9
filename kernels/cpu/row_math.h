// What the kernels do with one row's statistics: loss, coefficient, gradient factors. kernels/rowwise.py has the derivation, whose
// letters are those here. smooth_sum is kept around a logit of the row that is the same to the end, its `shift`:
//
//     sum_c a_c (m - x_c) = sum_c a_c (shift - x_c) + (m - shift) sum_c a_c        or w_c for a_c
//
// The loops see transformed logits, z, only.
//
// Included once per instruction set, like simd.h.

// What the loss has besides the logarithm of the target's probability, the same for all rows of a problem.
//
// What smooth_sum multiplies a class by is w_c with smoothing, and a_c for probabilities. The loops know three cases: nothing
// to sum, 1 for every class, and one number per class.
template <class A>
struct Terms {
  bool soft;       // class probabilities as target
  bool uniform;    // smoothing without class weights
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

  // w_c, or for soft targets a_c; q: the probability.
  template <class X>
  INLINE X class_weight(X q, X w) const {
    if (!soft) return w;
    const X mixed = q * (A(1) - smoothing) + smoothing_per_class;
    return weight ? mixed * w : mixed;
  }
};

// One row per lane. Of a single row only lane 0 counts.
template <class A>
struct RowStats {
  Vector<A> max, rest;
  Vector<A> x_t, x_b;      // the targets' logits; soft: undefined
  Vector<A> e_t;           // exp(x_t - m)
  Vector<A> w_t, w_b;      // the targets' class weights, 1 without weights
  Vector<A> k_t, k_b;      // the same times the label's share
  Vector<A> shift;         // a fixed finite logit of the row, for smooth_sum
  Vector<A> smooth_sum;    // sum_c a_c (shift - x_c), or w_c for a_c
  Vector<A> weight_total;  // soft: sum_c a_c
};

template <class A>
struct RowFactors {
  Vector<A> p;           // of exp(x_c - m)
  Vector<A> constant;    // subtracted: smooth, where every w_c is 1
  Vector<A> smooth;      // of a_c or w_c, subtracted
  Vector<A> at_t, at_b;  // the whole gradient of the target classes
};

// log of the sum over all classes of exp(x_c - m).
template <class A>
INLINE Vector<A> log_sum(const RowStats<A>& s, const Terms<A>& terms) {
  if (terms.soft) return log_<A>(s.rest);
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
    loss = s.smooth_sum + s.weight_total * ((s.max - s.shift) + log_d);
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
      Vector<A> all = terms.weight_total * ((s.max - s.shift) + log_d) + s.smooth_sum;
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
  if (terms.soft) return {(g * s.weight_total + z_factor) / s.rest, Vector<A>{}, g, Vector<A>{}, Vector<A>{}};
  const Vector<A> d = s.rest + s.e_t;
  Vector<A> keep = g * (A(1) - terms.smoothing), smooth = g * terms.smoothing_per_class;
  Vector<A> g_t = keep * s.k_t, others = smooth * terms.weight_total + z_factor, g_b{};
  if (terms.two_labels) g_b = keep * s.k_b, others += g_b;
  // The target's probability less 1 is -rest / d, without cancellation.
  RowFactors<A> f = {(g_t + others) / d, terms.uniform ? smooth : Vector<A>{}, smooth,
                     others / d * s.e_t - g_t * (s.rest / d) - smooth * s.w_t, Vector<A>{}};
  if (terms.two_labels) f.at_b = f.p * exp_nonpositive(s.x_b - s.max) - g_b - smooth * s.w_b;
  return f;
}

// Values of rows from lane on, 0 from row n on; values: that of row 0.
template <class A, class T = A>
INLINE Vector<A> load_rows(const T* values, int lane, int n) {
  return lane + Simd<A>::W <= n ? Vector<A>(load(values + lane)) : load_partial<A, T>(values + lane, n - lane);
}

// The upstream gradients of these lanes.
template <class T, class A>
INLINE Vector<A> load_dloss(const Problem& problem, int64_t row, int lane, int n) {
  if (problem.reduction != kNone) row = lane = 0, n = 1;
  const Vector<A> of_rows = problem.loss_dtype == problem.logits_dtype
                                ? load_rows<A>(static_cast<const T*>(problem.dloss) + row, lane, n)
                                : load_rows<A>(static_cast<const A*>(problem.dloss) + row, lane, n);
  return problem.reduction == kNone ? of_rows : broadcast(of_rows[0]);
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
INLINE void store_losses(const Problem& problem, int64_t row, const A* losses, int n) {
  switch (problem.loss_dtype) {
    case kFloat32: return store_losses_as<float>(problem, row, losses, n);
    case kFloat64: return store_losses_as<double>(problem, row, losses, n);
    case kBfloat16: return store_losses_as<bfloat16>(problem, row, losses, n);
    default: return store_losses_as<float16>(problem, row, losses, n);
  }
}

// The sum of a chunk's losses, lane by lane: one after the other, a float64 loss would take as long as its exponentials. Losses of
// lanes without a row are 0.
template <class A>
struct LossSum {
  using D = Simd<double>;
  D::V sum{}, lost{};  // lost: what rounding took from the sum

  INLINE void add(Vector<A> losses) {
    if constexpr (sizeof(A) == sizeof(double)) {
      const D::V next = sum + losses, added = next - sum;
      lost += (sum - (next - added)) + (losses - added);  // Knuth's TwoSum
      sum = next;
    } else {  // of which a double has 29 bits to spare
      D::Floats halves[2];
      __builtin_memcpy(halves, &losses, sizeof halves);
      sum += __builtin_convertvector(halves[0], D::V) + __builtin_convertvector(halves[1], D::V);
    }
  }
  CompensatedSum total() const {
    CompensatedSum all = {};
    UNROLL for (int i = 0; i < D::W; ++i) all.add(sum[i]), all.lost += lost[i];
    return all;
  }
};
