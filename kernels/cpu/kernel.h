// Everything that is compiled once per instruction set. The including file sets FUSEDLOSS_VECTOR_BYTES and FUSEDLOSS_KERNELS and
// switches the compiler's target; the anonymous namespace keeps each copy to itself.
//
// Results do not depend on the number of threads: rows are independent, and the partition of their sum is fixed in kernel.cpp.
#include <cstddef>

namespace fusedloss {
namespace {

#include "simd.h"
#include "row_math.h"
#include "rows.h"
#include "lanes.h"

// From this many classes on, a contiguous row fills whole vectors; with fewer, the lanes of rows side by side do.
constexpr int64_t MIN_ROW_COLS = 64;

template <class T, Terms terms>
double forward_terms(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  bool contiguous = problem.logits_strides.col == 1 && (!problem.dlogits || problem.dlogits_strides.col == 1) &&
                    (!is_soft(terms) || problem.target_strides.col == 1);
  return contiguous && problem.n_cols >= MIN_ROW_COLS
             ? forward_rows<T, terms>(problem, begin, end, coefficient, weight_total)
             : forward_lanes<T, terms>(problem, begin, end, coefficient, weight_total);
}

template <class T, Terms terms>
void backward_terms(const Problem& problem, int64_t begin, int64_t end) {
  bool contiguous = problem.logits_strides.col == 1 && problem.dlogits_strides.col == 1 &&
                    (!is_soft(terms) || problem.target_strides.col == 1);
  contiguous && problem.n_cols >= MIN_ROW_COLS ? backward_rows<T, terms>(problem, begin, end)
                                               : backward_lanes<T, terms>(problem, begin, end);
}

// Calls f.template operator()<T, terms>() for the problem's logit type and terms.
template <class F>
auto with_terms(const Problem& problem, const F& f) {
  bool soft = problem.target_kind == kProbabilities, weighted = problem.weight != nullptr, smooth = problem.smoothing > 0;
  Terms terms = soft ? (weighted ? kSoftWeighted : kSoft) : !smooth ? kPlain : weighted ? kSmoothWeighted : kSmooth;
  auto with_dtype = [&](auto t) {
#ifdef FUSEDLOSS_HAS_BF16
    return f(bfloat16{}, t);  // the only type for which these instructions make a difference
#else
    switch (problem.logits_dtype) {
      case kFloat32: return f(float{}, t);
      case kFloat64: return f(double{}, t);
      case kBfloat16: return f(bfloat16{}, t);
      default: return f(float16{}, t);
    }
#endif
  };
  switch (terms) {
    case kPlain: return with_dtype(Constant<kPlain>{});
    case kSmooth: return with_dtype(Constant<kSmooth>{});
    case kSmoothWeighted: return with_dtype(Constant<kSmoothWeighted>{});
    case kSoft: return with_dtype(Constant<kSoft>{});
    default: return with_dtype(Constant<kSoftWeighted>{});
  }
}

double forward(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  return with_terms(problem, [&](auto t, auto terms) {
    return forward_terms<decltype(t), decltype(terms)::value>(problem, begin, end, coefficient, weight_total);
  });
}

void backward(const Problem& problem, int64_t begin, int64_t end) {
  with_terms(problem, [&](auto t, auto terms) { backward_terms<decltype(t), decltype(terms)::value>(problem, begin, end); });
}

}  // namespace

extern const Kernels FUSEDLOSS_KERNELS = {forward, backward};

}  // namespace fusedloss
