// The entry points: checks the class indices, cuts the rows into chunks, runs them, and reduces the batch.
//
// Chunks are a function of the shape alone, each has one partial sum in double, and the partial sums are added in order: the
// result does not depend on the number of threads, nor on which of them ran what.
#include <cmath>

#include "problem.h"
#include "selection.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedloss {
namespace {

constexpr int64_t MAX_CHUNKS = 1024;
constexpr int64_t CHUNK_ELEMENTS = 1 << 14;  // about 10 us of work with AVX-512: waking a spinning thread costs 1 or 2
// Whole vectors of rows, and whole cache lines of every class, for lanes.h.
constexpr int64_t CHUNK_ROWS_MULTIPLE = 64;
constexpr int64_t CHUNK_TARGETS = 1 << 15;

struct Chunks {
  int64_t n, size, total;
  Chunks(int64_t total, int64_t target_size, int64_t multiple) : total(total) {
    size = (total + MAX_CHUNKS - 1) / MAX_CHUNKS;
    if (size < target_size) size = target_size;
    size = (size + multiple - 1) / multiple * multiple;
    n = (total + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < total ? (chunk + 1) * size : total; }
};

Chunks row_chunks(const Problem& problem) {
  const int64_t rows = CHUNK_ELEMENTS / (problem.n_cols > 0 ? problem.n_cols : 1);
  const bool is_multiple = rows >= CHUNK_ROWS_MULTIPLE || !problem.has_contiguous_classes();
  return Chunks(problem.n_rows(), rows > 0 ? rows : 1, is_multiple ? CHUNK_ROWS_MULTIPLE : 1);
}

// What chunks leave to the thread that called. Not on its stack, where a small problem's frames would come to lie 48 KB from
// memory that is in the caches.
thread_local TargetSummary target_parts[MAX_CHUNKS];
thread_local RowSums row_sums[MAX_CHUNKS];

TargetSummary summarise_targets(const Problem& problem, SummariseRows summarise) {
  TargetSummary total = {-1, 0, 0};
  if (problem.has_probabilities()) {
    total.n_counted = problem.n_rows();
    total.weight = double(total.n_counted);
    return total;
  }
  const Chunks chunks(problem.n_rows(), CHUNK_TARGETS, 1);
  TargetSummary* parts = target_parts;  // the caller's: the chunks' threads have others of that name
  parallel_for(problem, chunks.n, [&](int64_t chunk) {
    parts[chunk] = summarise(problem, chunks.begin(chunk), chunks.end(chunk));
  });
  for (int64_t chunk = 0; chunk < chunks.n; ++chunk) {
    if (total.first_bad < 0) total.first_bad = parts[chunk].first_bad;
    total.n_counted += parts[chunk].n_counted;
    total.weight += parts[chunk].weight;
  }
  return total;
}

// Asks for 2 MB pages under a large gradient that no page belongs to yet. Filling it with 4 KB pages costs more than computing
// it: 2048 x 32000 float32 on 2 cores took 80 ms with them, 49 with this advice (27 into a buffer used before);
// MADV_POPULATE_WRITE and stores past the caches gained nothing more. From 32 MB on glibc gives every allocation a mapping of
// its own, so that nobody else's memory is affected.
void advise_fresh_gradient(const Problem& problem) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096;
  const int64_t item = problem.logits_dtype == kFloat64 ? 8 : problem.logits_dtype == kFloat32 ? 4 : 2;
  const int64_t n_bytes = problem.fresh && problem.dlogits ? problem.n_rows() * problem.n_cols * item : 0;
  if (n_bytes < int64_t(32) << 20) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(problem.dlogits), first = (begin + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (begin + uintptr_t(n_bytes)) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)problem;
#endif
}

#if defined(__x86_64__)
bool has_f16c() {  // of which not every compiler's runtime knows
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  // The compiler's runtime asks the operating system too whether it saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return kAvx2;
#endif
  return kBaseline;
}

// flushes: whether a subnormal number may become 0, as where AVX-512 makes bfloat16 of it.
const Kernels& kernels_for(const Problem& problem, bool flushes = true) {
  static const Isa best = best_isa();
  const int64_t isa = problem.isa == kBest || problem.isa > best ? best : problem.isa;
#if defined(__x86_64__)
  if (isa == kAvx512Bf16 && problem.logits_dtype == kBfloat16 && flushes) return avx512bf16_kernels;
  if (isa >= kAvx512) return avx512_kernels;
  if (isa == kAvx2) return avx2_kernels;
#endif
  (void)isa, (void)flushes;
  return baseline_kernels;
}

template <class A>
int64_t forward(const Problem& problem) {
  const Kernels& kernels = kernels_for(problem);
  const TargetSummary targets = summarise_targets(problem, kernels.summarise);
  if (targets.first_bad >= 0) return targets.first_bad + 1;

  double weight_total = double(problem.n_cols);
  if (problem.weight && problem.smoothing > 0 && !problem.has_probabilities()) {
    weight_total = 0;
    for (int64_t c = 0; c < problem.n_cols; ++c) weight_total += double(static_cast<const A*>(problem.weight)[c]);
  }
  advise_fresh_gradient(problem);
  double denominator = problem.reduction == kMean ? targets.weight : 1;
  // As in PyTorch: no row counts, or only rows of weight 0, whose loss label smoothing may make positive.
  if (denominator == 0) denominator = std::nan("");
  const double coefficient = problem.scale / denominator;
  if (A* saved = static_cast<A*>(problem.saved))  // of the two in the middle select_rows makes others
    saved[0] = A(coefficient), saved[1] = saved[2] = 0, saved[3] = A(weight_total);

  const Chunks chunks = row_chunks(problem);
  RowSums* sums = row_sums;
  parallel_for(problem, chunks.n, [&](int64_t chunk) {
    sums[chunk] = kernels.forward(problem, chunks.begin(chunk), chunks.end(chunk), coefficient, weight_total);
  });
  RowSums total = {};
  for (int64_t chunk = 0; chunk < chunks.n; ++chunk)
    total.loss.add(sums[chunk].loss.value()), total.n_correct += sums[chunk].n_correct;
  if (problem.counts) {
    problem.counts[0] = targets.n_counted, problem.counts[1] = total.n_correct;
    problem.counts[2] = worst_row(problem, static_cast<const A*>(problem.row_stats) + problem.n_rows());
  }
  if (problem.reduction == kNone) return 0;
  kernels.store_loss(problem, problem.selects_rows() ? select_rows<A>(problem, targets.n_counted)
                                                     : problem.scale * (total.loss.value() / denominator));
  return 0;
}

}  // namespace

void* thread_scratch() {
  alignas(64) static thread_local unsigned char bytes[kScratchBytes];
  return bytes;
}

}  // namespace fusedloss

using fusedloss::Call;
using fusedloss::Problem;
using fusedloss::Rest;

extern "C" int64_t fusedloss_forward(const Call* call, const Rest* rest) {
  const Problem problem{*call, *rest};
  return problem.logits_dtype == fusedloss::kFloat64 ? fusedloss::forward<double>(problem) : fusedloss::forward<float>(problem);
}

extern "C" int64_t fusedloss_backward(const Call* call, const Rest* rest) {
  const Problem problem{*call, *rest};
  fusedloss::advise_fresh_gradient(problem);
  const fusedloss::Chunks chunks = fusedloss::row_chunks(problem);
  const fusedloss::BackwardRows rows = fusedloss::kernels_for(problem).backward;
  fusedloss::parallel_for(problem, chunks.n, [&](int64_t chunk) { rows(problem, chunks.begin(chunk), chunks.end(chunk)); });
  return 0;
}

extern "C" int64_t fusedloss_scale_gradient(const Call* call, const Rest* rest) {
  const Problem problem{*call, *rest};
  // The same numbers as from PyTorch's multiplication, which scales the gradient of a call that is not known.
  const fusedloss::Kernels& kernels = fusedloss::kernels_for(problem, false);
  const double factor = problem.reduction == fusedloss::kNone ? std::nan("") : kernels.dloss_of(problem, 0);
  if (factor == 1) return 0;
  if (!std::isfinite(factor)) {
    const fusedloss::Chunks rows = fusedloss::row_chunks(problem);
    fusedloss::parallel_for(problem, rows.n, [&](int64_t chunk) { kernels.scale_rows(problem, rows.begin(chunk), rows.end(chunk)); });
    return 0;
  }
  const fusedloss::Chunks chunks(problem.n_rows() * problem.n_cols, fusedloss::CHUNK_ELEMENTS, fusedloss::CHUNK_ROWS_MULTIPLE);
  fusedloss::parallel_for(problem, chunks.n, [&](int64_t chunk) {
    kernels.scale_numbers(problem, chunks.begin(chunk), chunks.end(chunk), factor);
  });
  return 0;
}

extern "C" __attribute__((visibility("default"))) int64_t fusedloss_best_isa() { return fusedloss::best_isa(); }

extern "C" __attribute__((visibility("default"))) int64_t fusedloss_abi() {
  return fusedloss::kAbi * 10000 + int64_t(sizeof(fusedloss::Numbers) + sizeof(fusedloss::Kind));
}
