// What fusedloss/backends/cpu_abi.py and cpu_call.py hand to the kernel, in structs of 8-byte fields; all memory is the caller's.
// What shapes, dtypes and options decide are Numbers and a Kind, packed once for all calls alike. What a call has of its own are
// arguments in Python, and a Call here (python.cpp); what few calls have besides are Extras, null pointers for the others.
//
// The fields, the enumerators and kAbi stand in cpu_abi.py in the same order; tests/test_cpu_abi.py compares the two files.
//
// Nothing here is validated but the class indices, and nothing is allocated.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fusedloss {

constexpr int64_t kAbi = 10;  // raised with every change of what follows that keeps its size; cpu_abi.py refuses another library

enum Dtype : int64_t { kFloat32, kFloat64, kBfloat16, kFloat16 };
enum Reduction : int64_t { kNone, kSum, kMean, kMax, kTopK };
enum TargetKind : int64_t { kInt64, kUint8, kProbabilities, kProbabilitiesAsLogits };
enum Isa : int64_t { kBest, kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// Where the elements of row r lie: in block r / n_inner as its row r % n_inner. A block is `middle` from the one before, and `outer` from
// the one n_middle before.
struct Strides {
  int64_t outer, middle, row, col;
};

struct Call {
  // outputs; "A" is the accumulation type: double for kFloat64, else float
  void* loss;     // (n_rows,) of loss_dtype for kNone, else ()
  void* saved;    // A: what kernels/rowwise.py describes, all of which the forward writes; null where neither a backward nor the
                  // reduction needs rows
  void* dlogits;  // logits_dtype; forward: null unless the strategy is fused; may be the logits themselves, with their strides
  void* row_stats;  // A (3, n_rows): log-sum-exp, loss and entropy of every row, or null
  int64_t* counts;  // (3,): rows counted, rows correct, the row of the largest loss or -1; or null, with row_stats
  // inputs
  const void* logits;
  const void* target;  // int64 or uint8 (n_rows,); with target_strides A for kProbabilities, or the logits' type
  const void* weight;  // A (n_cols,), or null
  const void* dloss;   // backward: A, or of loss_dtype the logits' type; (n_rows,) for kNone, else ()
  // scalars
  double scale;
  int64_t n_threads;
  int64_t n_examples;
};

struct Extras {
  const void* target_b;       // the second of two labels, like target; or null
  const void* lam;            // A (n_rows,), the first label's share of each row; or null: lam_factor is the share
  const void* sample_weight;  // A (n_rows,), or null
  // Where the logits are a shard of the row's classes, and target and weight are of all of them; else null, and 0.
  void* shard_stats;  // A (n_statistics, n_rows), fusedloss/shards.py: the forward writes those of the shard and nothing else, the
                      // backward reads those of whole rows, and of `saved` the first four values
  double lam_factor;
  int64_t first_class, n_classes;
};

// fusedloss.plan.NUMBERS
struct Numbers {
  double z_loss, logit_scale;
  double softcap;      // 0: none
  double focal_gamma;  // 0: none
};

struct Kind {
  double smoothing;
  int64_t plain;           // whether none of the Numbers is asked for but z_loss
  int64_t ignore_index;
  int64_t top_k;           // rows, or with top_k_is_fraction units of 2**-kFractionBits of the counted rows
  int64_t top_k_is_fraction;
  int64_t logits_dtype, loss_dtype, target_kind, reduction;
  int64_t isa;             // kBest, or a lower one for tests
  int64_t fresh;           // whether dlogits were allocated for this call, dense then
  int64_t statistics;      // whether there are row_stats, or of a shard what the entropy follows from
  // shapes and strides
  int64_t rows_per_example;
  int64_t n_middle;        // blocks of rows in an example, 1 but for pixels (H, W) of which one stride leads through W only
  int64_t one_block;       // whether one stride leads from each row to the next, in all examples
  int64_t n_cols;
  Strides logits_strides, dlogits_strides, target_strides;
  // GOMP_parallel of the OpenMP runtime that PyTorch loaded, or null; threads.h says why
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
};

struct Rest : Extras, Numbers, Kind {};

struct Problem : Call, Rest {
  int64_t n_outer, n_inner;

  Problem() = default;
  Problem(const Call& call, const Rest& rest)
      : Call(call),
        Rest(rest),
        n_outer(one_block ? 1 : n_examples * n_middle),
        n_inner(one_block ? n_examples * rows_per_example : n_middle > 1 ? rows_per_example / n_middle : rows_per_example) {}

  int64_t n_rows() const { return n_outer * n_inner; }
  bool has_probabilities() const { return target_kind == kProbabilities || target_kind == kProbabilitiesAsLogits; }
  bool has_contiguous_classes() const {
    return logits_strides.col == 1 && (!dlogits || dlogits_strides.col == 1) && (!has_probabilities() || target_strides.col == 1);
  }
  int64_t n_row_cols() const { return shard_stats ? n_classes : n_cols; }  // classes of a whole row
  bool selects_rows() const { return reduction == kMax || reduction == kTopK; }
  int64_t offset(const Strides& s, int64_t row) const {
    if (n_outer == 1) return row * s.row;
    const int64_t block = row / n_inner, of_row = row % n_inner * s.row;
    return n_middle == 1 ? block * s.outer + of_row : block / n_middle * s.outer + block % n_middle * s.middle + of_row;
  }

  int64_t label(const void* labels, int64_t row) const {
    return target_kind == kUint8 ? int64_t(static_cast<const uint8_t*>(labels)[row]) : static_cast<const int64_t*>(labels)[row];
  }
  bool is_counted(int64_t row) const {
    return has_probabilities() ||
           (label(target, row) != ignore_index && (!target_b || label(target_b, row) != ignore_index));
  }
};

constexpr int64_t kState = 4;          // scalars at the head of `saved`
constexpr int64_t kFractionBits = 32;  // a fractional top_k is in units of 2**-32 of the counted rows

// A row of 262144 float32, the largest common vocabulary.
constexpr int64_t kKeptBytes = 1 << 20;
// Memory of the calling thread for the rows that it works on, such a row among them. Not on its stack: one of 32 KB is enough for
// PyTorch's operators.
constexpr int64_t kScratchBytes = kKeptBytes + (1 << 17);
void* thread_scratch();
template <class Scratch>
Scratch& thread_scratch_as() {
  static_assert(sizeof(Scratch) <= kScratchBytes, "");
  return *static_cast<Scratch*>(thread_scratch());
}

// Unsigned integers in the order of the losses, NaN the greatest, -0.0 equal to 0.0.
inline uint32_t sortable_bits(float loss) {
  uint32_t bits;
  loss += 0.0f;
  std::memcpy(&bits, &loss, sizeof bits);
  return loss != loss ? ~uint32_t(0) : bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint64_t sortable_bits(double loss) {
  uint64_t bits;
  loss += 0.0;
  std::memcpy(&bits, &loss, sizeof bits);
  return loss != loss ? ~uint64_t(0) : bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// A sum and what rounding took from it (Neumaier 1974): without, a thousand float64 losses would lose three digits.
struct CompensatedSum {
  double sum, lost;
  void add(double x) {
    const double next = sum + x;
    lost += std::fabs(sum) >= std::fabs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  double value() const { return std::isfinite(lost) ? sum + lost : sum; }  // of an infinite sum nothing finite is lost
};

struct RowSums {
  CompensatedSum loss;  // 0 for kNone
  int64_t n_correct;    // 0 without row_stats
};

// What the class indices of some rows tell.
struct TargetSummary {
  int64_t first_bad;  // row, or -1
  int64_t n_counted;
  double weight;      // of the counted rows
};

// Rows [begin, end), once per instruction set. coefficient is d(loss)/d(row loss) but for the row's sample weight, used where
// dlogits is written; weight_total is the sum of the class weights, used with smoothing.
using SummariseRows = TargetSummary (*)(const Problem&, int64_t begin, int64_t end);
using ForwardRows = RowSums (*)(const Problem&, int64_t begin, int64_t end, double coefficient, double weight_total);
using BackwardRows = void (*)(const Problem&, int64_t begin, int64_t end);
using StoreLoss = void (*)(const Problem&, double loss);
using DlossOf = double (*)(const Problem&, int64_t row);  // 0 where the loss is of the batch
using ScaleNumbers = void (*)(const Problem&, int64_t begin, int64_t end, double factor);  // of dlogits, which are dense
using ScaleRows = void (*)(const Problem&, int64_t begin, int64_t end);

struct Kernels {
  SummariseRows summarise;
  ForwardRows forward;
  BackwardRows backward;
  StoreLoss store_loss;  // of the batch
  DlossOf dloss_of;
  ScaleNumbers scale_numbers;
  ScaleRows scale_rows;
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;  // for bfloat16 logits only
#endif

}  // namespace fusedloss

extern "C" {
// Returns 0, or 1 + the first row whose class index is out of range; nothing is written then.
int64_t fusedloss_forward(const fusedloss::Call*, const fusedloss::Rest*);
// Returns 0, as the next, for one kind of caller.
int64_t fusedloss_backward(const fusedloss::Call*, const fusedloss::Rest*);
// dlogits *= dloss, which is of loss_dtype, where dlogits are dense. A row of zeros, as an ignored one is, stays so whatever dloss
// is; and whatever a row is, for kNone a dloss of 0 makes it zeros.
int64_t fusedloss_scale_gradient(const fusedloss::Call*, const fusedloss::Rest*);
int64_t fusedloss_best_isa();
}
