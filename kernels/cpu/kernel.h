// Everything that is compiled once per instruction set. The including file sets FUSEDLOSS_VECTOR_BYTES and FUSEDLOSS_KERNELS and
// switches the compiler's target; the anonymous namespace keeps each copy to itself.
//
// Results do not depend on the number of threads: rows are independent, and the partition of their sum is fixed in kernel.cpp.
#include <cstddef>

namespace fusedloss {
namespace {

#include "simd.h"
#include "elementary.h"
#include "targets.h"
#include "row_math.h"
#include "group.h"
#include "blocks.h"
#include "rows.h"
#include "transpose.h"
#include "lanes.h"
#include "few.h"

// From this many classes on, a contiguous row fills whole vectors; with fewer, the lanes of rows side by side do.
constexpr int64_t kMinRowCols = 64;

INLINE bool takes_rows(const Problem& problem) {
  return problem.n_cols >= kMinRowCols && problem.has_contiguous_classes();
}

template <class T>
RowSums forward_typed(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  if (takes_few<typename Accumulate<T>::type>(problem))
    return problem.has_probabilities() ? forward_few<T, true>(problem, begin, end, coefficient, weight_total)
                                       : forward_few<T, false>(problem, begin, end, coefficient, weight_total);
  if (takes_rows(problem)) return forward_rows<T>(problem, begin, end, coefficient, weight_total);
  return forward_lanes<T>(problem, begin, end, coefficient, weight_total);
}

template <class T>
void backward_typed(const Problem& problem, int64_t begin, int64_t end) {
  if (takes_few<typename Accumulate<T>::type>(problem))
    return problem.has_probabilities() ? backward_few<T, true>(problem, begin, end) : backward_few<T, false>(problem, begin, end);
  if (takes_rows(problem)) return backward_rows<T>(problem, begin, end);
  backward_lanes<T>(problem, begin, end);
}

RowSums forward(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
#ifdef FUSEDLOSS_HAS_BF16
  return forward_typed<bfloat16>(problem, begin, end, coefficient, weight_total);  // the only type that gains by them
#else
  switch (problem.logits_dtype) {
    case kFloat32: return forward_typed<float>(problem, begin, end, coefficient, weight_total);
    case kFloat64: return forward_typed<double>(problem, begin, end, coefficient, weight_total);
    case kBfloat16: return forward_typed<bfloat16>(problem, begin, end, coefficient, weight_total);
    default: return forward_typed<float16>(problem, begin, end, coefficient, weight_total);
  }
#endif
}

void backward(const Problem& problem, int64_t begin, int64_t end) {
#ifdef FUSEDLOSS_HAS_BF16
  backward_typed<bfloat16>(problem, begin, end);
#else
  switch (problem.logits_dtype) {
    case kFloat32: return backward_typed<float>(problem, begin, end);
    case kFloat64: return backward_typed<double>(problem, begin, end);
    case kBfloat16: return backward_typed<bfloat16>(problem, begin, end);
    default: return backward_typed<float16>(problem, begin, end);
  }
#endif
}

// Of the batch.
void store_loss(const Problem& problem, double loss) {
  switch (problem.loss_dtype) {
    case kFloat32: return store1(static_cast<float*>(problem.loss), float(loss));
    case kFloat64: return store1(static_cast<double*>(problem.loss), loss);
    case kBfloat16: return store1(static_cast<bfloat16*>(problem.loss), float(loss));
    default: return store1(static_cast<float16*>(problem.loss), float(loss));
  }
}

double dloss_of(const Problem& problem, int64_t row) {
  switch (problem.loss_dtype) {
    case kFloat32: return load1(static_cast<const float*>(problem.dloss) + row);
    case kFloat64: return load1(static_cast<const double*>(problem.dloss) + row);
    case kBfloat16: return load1(static_cast<const bfloat16*>(problem.dloss) + row);
    default: return load1(static_cast<const float16*>(problem.dloss) + row);
  }
}

template <class T>
void scale(T* numbers, int64_t n, int64_t stride, double by) {
  using A = typename Accumulate<T>::type;
  const A factor = A(by);
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Simd<A>::W <= n; i += Simd<A>::W) store(numbers + i, Vector<A>(load(numbers + i) * factor));
    if (i < n) store_partial<A, T>(numbers + i, n - i, load_partial<A, T>(numbers + i, n - i) * factor);
  } else {
    for (; i < n; ++i) store1(numbers + i * stride, A(load1(numbers + i * stride) * factor));
  }
}

template <class T>
void scale_rows_typed(const Problem& problem, int64_t begin, int64_t end) {
  const int64_t n = problem.n_cols, stride = problem.dlogits_strides.col;
  for (int64_t row = begin; row < end; ++row) {
    T* numbers = static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row);
    const double factor = dloss_of(problem, problem.reduction == kNone ? row : 0);
    if (factor == 0) {  // a loss that nobody asks for, though it be NaN
      for (int64_t c = 0; c < n; ++c) store1(numbers + c * stride, 0);
      continue;
    }
    int64_t zeros = 0;
    if (!__builtin_isfinite(factor))
      while (zeros < n && load1(numbers + zeros * stride) == 0) ++zeros;
    if (factor != 1 && zeros < n) scale(numbers, n, stride, factor);
  }
}

void scale_rows(const Problem& problem, int64_t begin, int64_t end) {
  switch (problem.logits_dtype) {
    case kFloat32: return scale_rows_typed<float>(problem, begin, end);
    case kFloat64: return scale_rows_typed<double>(problem, begin, end);
    case kBfloat16: return scale_rows_typed<bfloat16>(problem, begin, end);
    default: return scale_rows_typed<float16>(problem, begin, end);
  }
}

void scale_numbers(const Problem& problem, int64_t begin, int64_t end, double factor) {
  switch (problem.logits_dtype) {
    case kFloat32: return scale(static_cast<float*>(problem.dlogits) + begin, end - begin, 1, factor);
    case kFloat64: return scale(static_cast<double*>(problem.dlogits) + begin, end - begin, 1, factor);
    case kBfloat16: return scale(static_cast<bfloat16*>(problem.dlogits) + begin, end - begin, 1, factor);
    default: return scale(static_cast<float16*>(problem.dlogits) + begin, end - begin, 1, factor);
  }
}

}  // namespace

extern const Kernels FUSEDLOSS_KERNELS = {summarise, forward, backward, store_loss, dloss_of, scale_numbers, scale_rows};

}  // namespace fusedloss
