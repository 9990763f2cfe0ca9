// Random problems for the CPU kernel, to be run under AddressSanitizer and UBSan: `make sanitize`.
//
// Every buffer has exactly the size that the problem describes, so that one element too far is caught. Each problem runs on every
// instruction set of the machine, with one thread and with three, which must agree to the last bit and write all that they return;
// a class index out of range must be reported and nothing written; rows that do not count must get a gradient of exactly zero
// although their logits are NaN; and a class index that somebody changes after the kernel looked at it must not be an address.
// What is computed is tested in Python (tests/test_values.py and others).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "../kernels/cpu/problem.h"

using namespace fusedloss;

// Allocations that succeed before one fails; negative: all do. Of the kernel's thread: it allocates nothing but its threads.
thread_local int64_t n_allocations = -1;
void* operator new(size_t size) {
  void* memory = n_allocations == 0 ? nullptr : std::malloc(size);
  if (n_allocations > 0) --n_allocations;
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

std::mt19937_64 generator(20240229);

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin(double p = 0.5) { return std::bernoulli_distribution(p)(generator); }
template <class X, size_t N>
X pick(const X (&values)[N]) {
  return values[size_t(uniform(0, int64_t(N) - 1))];
}

// As many bytes as asked for, from malloc of their own: the sanitizer's red zones begin right behind them.
struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
  explicit Buffer(size_t size, int fill = 0xa5) : bytes(new unsigned char[size]), size(size) { std::memset(bytes.get(), fill, size); }
  bool operator==(const Buffer& other) const { return size == other.size && std::memcmp(bytes.get(), other.bytes.get(), size) == 0; }
  template <class X>
  X* as() {
    return reinterpret_cast<X*>(bytes.get());
  }
};

size_t item_size(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void put(Buffer& buffer, int64_t dtype, size_t i, double value) {
  if (dtype == kFloat64) {
    buffer.as<double>()[i] = value;
  } else if (dtype == kFloat32) {
    buffer.as<float>()[i] = float(value);
  } else {
    float single = float(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    // Truncated to bfloat16; for float16 the same bits are some other number, which does as well.
    buffer.as<uint16_t>()[i] = uint16_t(bits >> 16);
  }
}

double random_logit(bool wild) {
  static const double special[] = {INFINITY, -INFINITY, NAN, 0.0, -0.0, 1e4, -1e4, 1e38, -1e38};
  return wild && coin(0.1) ? pick(special) : std::normal_distribution<double>(0, 4)(generator);
}

// Strides, some of them with gaps, and the number of elements they span.
size_t random_strides(const Problem& p, Strides& s) {
  const int64_t gap = coin(0.3) ? uniform(1, 5) : 0;
  if (p.n_middle > 1) {  // classes, lines and pixels in any order, examples outside
    const int64_t sizes[] = {p.n_cols, p.n_middle, p.n_inner};
    int64_t* strides[] = {&s.col, &s.middle, &s.row};
    int order[] = {0, 1, 2};
    std::shuffle(order, order + 3, generator);
    int64_t step = coin(0.2) ? 2 : 1, end = 0;
    for (int i : order) {
      *strides[i] = step, end += (sizes[i] - 1) * step;
      step = sizes[i] * step + gap;
    }
    s.outer = step;
    const int64_t n_examples = p.n_outer / p.n_middle;
    return p.n_rows() == 0 ? 0 : size_t((n_examples - 1) * s.outer + end + 1);
  }
  if (coin()) {
    s.col = coin(0.2) ? 2 : 1, s.row = p.n_cols * s.col + gap, s.outer = p.n_inner * s.row + gap;
  } else {
    s.row = coin(0.2) ? 2 : 1, s.col = p.n_inner * s.row + gap, s.outer = p.n_cols * s.col + gap;
  }
  if (p.n_rows() == 0) return 0;
  return size_t((p.n_outer - 1) * s.outer + (p.n_inner - 1) * s.row + (p.n_cols - 1) * s.col + 1);
}

void require(bool condition, const char* what, int problem) {
  if (condition) return;
  std::fprintf(stderr, "problem %d: %s\n", problem, what);
  std::abort();
}

// Labels that change between the kernel's first look at them and its rows: it starts the threads for those in between.
Buffer* changing_labels;
int64_t changing_kind;
void change_labels(void (*share)(void*), void* job, unsigned, unsigned) {
  static const int64_t others[] = {-1, -100, 0, 10, 100, 255, 9000, INT64_MAX, INT64_MIN};
  const size_t n = changing_labels->size / (changing_kind == kUint8 ? 1 : 8);
  for (size_t row = 0; row < n; ++row) {
    if (coin()) continue;
    const int64_t label = pick(others);
    changing_kind == kUint8 ? void(changing_labels->as<uint8_t>()[row] = uint8_t(label))
                            : void(changing_labels->as<int64_t>()[row] = label);
  }
  share(job);
}

// And labels that change during the first look, which reads them twice for the sum of their weights, or to tell which is bad.
void one_label_changes_all_the_time() {
  Problem p = {};
  p.n_cols = 2, p.n_examples = 1, p.rows_per_example = 20000, p.n_middle = 1, p.one_block = 1, p.n_outer = 1, p.n_inner = 20000;
  p.target_kind = kInt64, p.reduction = kMean, p.scale = p.logit_scale = 1, p.plain = 1, p.ignore_index = -100, p.n_threads = 1;
  p.logits_strides = {0, 0, 2, 1};
  Buffer logits(size_t(p.n_inner) * 8, 0), target(size_t(p.n_inner) * 8, 0), weight(8, 0), loss(4);
  p.logits = logits.bytes.get(), p.target = target.bytes.get(), p.weight = weight.bytes.get(), p.loss = loss.bytes.get();
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int64_t i = 0; !done; ++i) {
      *(target.as<volatile int64_t>() + p.n_inner / 2) = i % 2 ? INT64_MAX : 0;
      std::this_thread::sleep_for(std::chrono::microseconds(i % 300));
    }
  });
  for (int i = 0; i < 300; ++i) fusedloss_forward(&p, &p);
  done = true;
  writer.join();
}

void one_problem(int number) {
  static const int64_t columns[] = {1, 2, 10, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 4095, 4096, 4097, 9000};
  Problem p = {};
  p.n_cols = pick(columns);
  p.n_outer = coin() ? 1 : uniform(0, 4);
  p.n_inner = p.n_cols > 1000 ? uniform(0, 5) : uniform(0, 400);
  p.n_middle = p.n_inner > 0 && p.n_inner < 40 && coin(0.4) ? uniform(2, 4) : 1;
  p.one_block = p.n_middle == 1 && p.n_outer == 1 && coin();
  p.n_examples = p.one_block ? p.n_inner : p.n_outer, p.rows_per_example = p.one_block ? 1 : p.n_inner * p.n_middle;
  p.n_outer *= p.n_middle;
  p.logits_dtype = uniform(0, 3);
  p.loss_dtype = coin() ? p.logits_dtype : p.logits_dtype == kFloat64 ? kFloat64 : kFloat32;
  p.target_kind = pick<int64_t>(
      {int64_t(kInt64), int64_t(kInt64), int64_t(kUint8), int64_t(kProbabilities), int64_t(kProbabilitiesAsLogits)});
  p.reduction = uniform(0, 4);
  p.scale = coin() ? 1 : 0.25;
  p.smoothing = coin() ? 0 : 0.1;
  p.z_loss = coin(0.7) ? 0 : 1e-3;
  p.logit_scale = coin(0.7) ? 1 : -0.5;
  p.softcap = coin(0.7) ? 0 : 5;
  p.lam_factor = uniform(0, 4) / 4.0;
  p.ignore_index = p.has_probabilities() ? -100 : pick<int64_t>({int64_t(-100), int64_t(0), int64_t(3), int64_t(255)});
  p.top_k_is_fraction = coin();
  p.top_k = p.top_k_is_fraction ? uniform(1, int64_t(1) << 32) : uniform(1, 50);

  const int64_t accumulate = p.logits_dtype == kFloat64 ? kFloat64 : kFloat32;
  const size_t n_rows = size_t(p.n_rows()), wide = item_size(accumulate);
  const bool fused = (p.reduction == kSum || p.reduction == kMean) && coin(0.8);
  const bool wild = coin(0.3), soft = p.has_probabilities(), weighted = coin(0.4);
  const bool two_labels = !soft && coin(0.3), has_lam = coin(), has_sample_weight = coin(0.3), has_stats = !soft && coin(0.3);
  p.focal_gamma = soft || two_labels || p.smoothing > 0 || coin(0.7) ? 0 : 2;
  p.plain = p.logit_scale == 1 && p.softcap == 0 && p.focal_gamma == 0;

  Buffer logits(random_strides(p, p.logits_strides) * item_size(p.logits_dtype));
  for (size_t i = 0; i < logits.size / item_size(p.logits_dtype); ++i) put(logits, p.logits_dtype, i, random_logit(wild));
  const int64_t soft_dtype = p.target_kind == kProbabilities ? accumulate : p.logits_dtype;
  const size_t soft_size = item_size(soft_dtype);
  Buffer target(soft ? random_strides(p, p.target_strides) * soft_size : n_rows * (p.target_kind == kUint8 ? 1 : 8));
  Buffer target_b(two_labels ? target.size : 0);
  bool bad = false;
  std::vector<bool> ignored(n_rows);
  for (size_t i = 0; soft && i < target.size / soft_size; ++i) put(target, soft_dtype, i, 1.0 / double(uniform(1, 9)));
  for (size_t row = 0; !soft && row < n_rows; ++row) {
    bool outside = false;
    for (Buffer* labels : {&target, &target_b}) {
      if (labels->size == 0) continue;
      int64_t t = uniform(0, p.n_cols - 1);
      if (coin(0.1)) t = p.ignore_index;
      if (coin(0.0005)) t = pick<int64_t>({int64_t(-1), int64_t(-100), p.n_cols, int64_t(255), INT64_MAX, INT64_MIN});
      if (p.target_kind == kUint8) {
        labels->as<uint8_t>()[row] = uint8_t(t);
        t = uint8_t(t);
      } else {
        labels->as<int64_t>()[row] = t;
      }
      outside |= t < 0 || t >= p.n_cols;
      ignored[row] = ignored[row] || t == p.ignore_index;
    }
    bad |= outside && !ignored[row];
  }
  Buffer lam(n_rows * wide), sample_weight(n_rows * wide);
  for (size_t row = 0; row < n_rows; ++row) {
    put(lam, accumulate, row, double(uniform(0, 4)) / 4), put(sample_weight, accumulate, row, double(uniform(0, 8)) / 4);
  }
  const int64_t dloss_dtype = coin() ? p.logits_dtype : accumulate;
  Buffer weight(size_t(p.n_cols) * wide), dloss((p.reduction == kNone ? n_rows : 1) * item_size(dloss_dtype));
  for (size_t c = 0; c < size_t(p.n_cols); ++c) put(weight, accumulate, c, double(uniform(0, 8)) / 4);
  for (size_t i = 0; i < dloss.size / item_size(dloss_dtype); ++i) put(dloss, dloss_dtype, i, coin(0.3) ? 0 : double(uniform(-3, 3)));
  const size_t gradient_elements = random_strides(p, p.dlogits_strides);

  p.logits = logits.bytes.get(), p.target = target.bytes.get(), p.weight = weighted ? weight.bytes.get() : nullptr;
  p.target_b = two_labels ? target_b.bytes.get() : nullptr, p.lam = has_lam ? lam.bytes.get() : nullptr;
  p.sample_weight = has_sample_weight ? sample_weight.bytes.get() : nullptr;
  for (p.isa = kBaseline; p.isa <= fusedloss_best_isa(); ++p.isa) {
    std::vector<Buffer> results[2];
    for (int round = 0; round < 2; ++round) {
      p.n_threads = round == 0 ? 1 : 3;
      const int fill = round == 0 ? 0xa5 : 0x5a;  // what nobody writes differs between the rounds
      Buffer loss((p.reduction == kNone ? n_rows : 1) * item_size(p.loss_dtype), fill);
      Buffer saved((size_t(kState) + (soft ? 4 : 3) * n_rows) * wide, fill);
      Buffer row_stats(3 * n_rows * wide, has_stats ? fill : 0), counts(3 * sizeof(int64_t), has_stats ? fill : 0);
      Buffer gradient(gradient_elements * item_size(p.logits_dtype)), again(gradient.size);
      const Buffer untouched_loss(loss.size, fill), untouched_saved(saved.size, fill), untouched_gradient(gradient.size);
      const Buffer untouched_stats(row_stats.size, has_stats ? fill : 0), untouched_counts(counts.size, has_stats ? fill : 0);
      p.row_stats = has_stats ? row_stats.bytes.get() : nullptr, p.counts = has_stats ? counts.as<int64_t>() : nullptr;
      p.loss = loss.bytes.get(), p.saved = saved.bytes.get(), p.dloss = nullptr;
      p.dlogits = fused ? gradient.bytes.get() : nullptr;
      p.fresh = fused, p.statistics = has_stats;
      n_allocations = round == 1 && coin(0.3) ? uniform(0, 3) : -1;  // fewer threads
      const int64_t status = fusedloss_forward(&p, &p);
      require((status != 0) == bad, "an index out of range is reported, and only that", number);
      if (bad) {
        n_allocations = -1;
        require(loss == untouched_loss && saved == untouched_saved && gradient == untouched_gradient &&
                    row_stats == untouched_stats && counts == untouched_counts,
                "nothing is written before the error", number);
        return;
      }
      p.dlogits = again.bytes.get(), p.dloss = dloss.bytes.get();
      Problem backward = p;
      backward.loss_dtype = dloss_dtype;
      fusedloss_backward(&backward, &backward);
      n_allocations = -1;
      int64_t n_counted = 0;
      for (size_t row = 0; row < n_rows; ++row) {
        n_counted += !ignored[row];
        for (int64_t c = 0; ignored[row] && c < p.n_cols; ++c) {
          const size_t at = size_t(p.offset(p.dlogits_strides, int64_t(row)) + c * p.dlogits_strides.col) * item_size(p.logits_dtype);
          const unsigned char zeros[8] = {};
          require(std::memcmp(again.bytes.get() + at, zeros, item_size(p.logits_dtype)) == 0 &&
                      (!fused || std::memcmp(gradient.bytes.get() + at, zeros, item_size(p.logits_dtype)) == 0),
                  "the gradient of an ignored row is zero", number);
        }
      }
      if (has_stats) {
        const int64_t *found = counts.as<int64_t>(), worst = found[2];
        require(found[0] == n_counted && found[1] >= 0 && found[1] <= n_counted, "rows are counted", number);
        require(n_counted == 0 ? worst == -1 : worst >= 0 && worst < int64_t(n_rows) && !ignored[size_t(worst)],
                "the worst row counts", number);
      }
      Buffer scaled(gradient.size, 0x3c);  // small numbers of any dtype
      backward.dlogits = scaled.bytes.get();
      fusedloss_scale_gradient(&backward, &backward);
      results[round].push_back(std::move(scaled));
      results[round].push_back(std::move(row_stats)), results[round].push_back(std::move(counts));
      results[round].push_back(std::move(loss)), results[round].push_back(std::move(gradient));
      results[round].push_back(std::move(saved));
      results[round].push_back(std::move(again));
    }
    for (size_t i = 0; i < results[0].size(); ++i)
      require(results[0][i] == results[1][i], "all is written, and the number of threads does not change a bit", number);
    if (soft) continue;
    changing_labels = two_labels && coin() ? &target_b : &target, changing_kind = p.target_kind;
    const std::vector<unsigned char> before(changing_labels->bytes.get(), changing_labels->bytes.get() + changing_labels->size);
    Problem forward = p, backward = p;
    forward.gomp_parallel = change_labels;
    forward.dlogits = fused ? p.dlogits : nullptr, forward.dloss = nullptr, backward.loss_dtype = dloss_dtype;
    fusedloss_forward(&forward, &forward);
    fusedloss_backward(&backward, &backward);
    std::copy(before.begin(), before.end(), changing_labels->bytes.get());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int n = argc > 1 ? std::atoi(argv[1]) : 1000;
  for (int i = 0; i < n; ++i) one_problem(i);
  one_label_changes_all_the_time();
  std::printf("%d problems, instruction sets up to %d: clean\n", n, int(fusedloss_best_isa()));
}
