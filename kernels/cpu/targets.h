// The class indices of rows, looked at before anything is written. They may change meanwhile, if a copy to the CPU has not ended:
// an index that is read again may be another, and its range is checked again before it is an address.
//
// Included once per instruction set, like simd.h.

using Labels = Simd<double>::I;  // int64

INLINE Labels load_labels(const int64_t* labels) {
  Labels v;
  __builtin_memcpy(&v, labels, sizeof v);
  return v;
}
INLINE Labels load_labels(const uint8_t* labels) {
  Labels v{};
  UNROLL for (int i = 0; i < Simd<double>::W; ++i) v[i] = labels[i];
  return v;
}

template <class Target, class A>
TargetSummary summarise_as(const Problem& problem, int64_t begin, int64_t end) {
  constexpr int W = Simd<double>::W;
  const Target *a = static_cast<const Target*>(problem.target), *b = static_cast<const Target*>(problem.target_b);
  // Of two labels the class weights are not in the denominator, as of probabilities.
  const A* weight = problem.reduction == kMean && !b ? static_cast<const A*>(problem.weight) : nullptr;
  const int64_t n_cols = problem.n_row_cols(), ignored = problem.ignore_index;
  Labels bad{}, counted{};
  int64_t row = begin;
  for (; row + W <= end; row += W) {
    const Labels t = load_labels(a + row);
    Labels counts = t != ignored, is_bad = (t < 0) | (t >= n_cols);
    if (b) {
      const Labels u = load_labels(b + row);
      counts &= u != ignored, is_bad |= (u < 0) | (u >= n_cols);
    }
    bad |= counts & is_bad, counted -= counts;
  }
  auto is_bad = [&](int64_t i) {
    return problem.is_counted(i) && (uint64_t(a[i]) >= uint64_t(n_cols) || (b && uint64_t(b[i]) >= uint64_t(n_cols)));
  };
  int64_t n_counted = 0;
  bool any_bad = false;
  UNROLL for (int i = 0; i < W; ++i) n_counted += counted[i], any_bad |= bad[i] != 0;
  for (; row < end; ++row) n_counted += problem.is_counted(row), any_bad |= is_bad(row);

  TargetSummary summary = {-1, n_counted, double(n_counted)};
  for (row = begin; any_bad && row < end && summary.first_bad < 0; ++row)
    if (is_bad(row)) summary.first_bad = row;
  if (weight) {
    summary.weight = 0;
    for (row = begin; row < end; ++row) {
      const int64_t t = int64_t(a[row]);
      if (t != ignored && uint64_t(t) < uint64_t(n_cols)) summary.weight += double(weight[t]);
    }
  }
  return summary;
}

template <class A>
TargetSummary summarise_with(const Problem& problem, int64_t begin, int64_t end) {
  return problem.target_kind == kUint8 ? summarise_as<uint8_t, A>(problem, begin, end)
                                       : summarise_as<int64_t, A>(problem, begin, end);
}
TargetSummary summarise(const Problem& problem, int64_t begin, int64_t end) {
  return problem.logits_dtype == kFloat64 ? summarise_with<double>(problem, begin, end) : summarise_with<float>(problem, begin, end);
}
