// The reductions "max" and "topk": which row losses are selected, their average, and the coefficients for the backward.
//
// The k-th largest loss is found by radix selection, 8 bits at a time from the top (Alabi et al. 2012): one pass over the
// row losses per digit, no memory but a histogram. Rows that tie with it share what is left of k evenly.
#pragma once
#include <cstdint>

#include "problem.h"

namespace fusedloss {

inline int64_t rows_to_select(const Problem& problem, int64_t n_counted) {
  if (problem.reduction == kMax) return n_counted < 1 ? n_counted : 1;
  int64_t k = problem.top_k;
  if (problem.top_k_is_fraction) {  // integers, so that every backend agrees to the last row
    k = int64_t((static_cast<unsigned __int128>(n_counted) * uint64_t(problem.top_k) + (uint64_t(1) << (kFractionBits - 1))) >>
                kFractionBits);
    if (k < 1) k = 1;
  }
  return k < n_counted ? k : n_counted;
}

template <class A>
auto kth_largest_key(const A* losses, int64_t n_rows, int64_t k) {
  using Key = decltype(sortable_bits(A()));
  Key prefix = 0, prefix_mask = 0;
  for (int shift = int(sizeof(Key)) * 8 - 8; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t row = 0; row < n_rows; ++row) {
      Key key = sortable_bits(losses[row]);
      if ((key & prefix_mask) == prefix) ++histogram[(key >> shift) & 255];
    }
    int digit = 255;
    for (; digit > 0 && histogram[digit] < k; --digit) k -= histogram[digit];
    prefix |= Key(digit) << shift;
    prefix_mask |= Key(255) << shift;
  }
  return prefix;
}

// The counted row with the largest loss, the first of equal ones, NaN being the largest; -1: none is counted.
template <class A>
int64_t worst_row(const Problem& problem, const A* losses) {
  int64_t worst = -1;
  for (int64_t row = 0; row < problem.n_rows(); ++row)
    if (problem.is_counted(row) && (worst < 0 || sortable_bits(losses[row]) > sortable_bits(losses[worst]))) worst = row;
  return worst;
}

// Returns the batch loss; writes saved[0..2] from the row losses at saved[4 + 2 n_rows].
template <class A>
double select_rows(const Problem& problem, int64_t n_counted) {
  A* saved = static_cast<A*>(problem.saved);
  const int64_t n_rows = problem.n_rows();
  const A* losses = saved + kState + 2 * n_rows;
  const int64_t k = rows_to_select(problem, n_counted);
  double above_sum = 0, threshold = 0, share = 0;
  int64_t n_above = 0, n_tied = 0;
  if (k > 0) {
    const auto key = kth_largest_key(losses, n_rows, k);
    for (int64_t row = 0; row < n_rows; ++row) {
      const auto row_key = sortable_bits(losses[row]);
      if (row_key > key) above_sum += double(losses[row]), ++n_above;
      // A negative weight can make -inf of a loss that counts: the rows that do not count must not tie with it.
      if (row_key == key && problem.is_counted(row)) threshold = double(losses[row]), ++n_tied;
    }
    share = double(k - n_above);
  }
  saved[0] = A(problem.scale / double(k));
  saved[1] = A(problem.scale * (share / (double(n_tied) * double(k))));
  saved[2] = A(threshold);
  return problem.scale * ((above_sum + (share > 0 ? share * threshold : 0.0)) / double(k));  // 0 / 0 is nan where no row counts
}

}  // namespace fusedloss
