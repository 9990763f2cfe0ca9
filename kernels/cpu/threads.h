// Runs chunks 0 .. n_chunks - 1 of a job on several threads.
//
// PyTorch's CPU operators run on the OpenMP runtime that torch loads. Its workers spin for a while after each operator; workers
// of a second runtime, or of a pool of our own, would compete with them for the same cores. So the kernel is not linked to any
// OpenMP: it borrows the entry point GOMP_parallel (part of libgomp's stable ABI, also offered by LLVM's and Intel's runtimes)
// of the runtime that is loaded already. Fork safety and thread counts are then exactly those of PyTorch's own operators.
// Where no such symbol is found, threads are started for the call, which pays for large problems only.
//
// Whether denormal numbers are flushed (torch.set_flush_denormal) and how numbers are rounded is a thread's own setting. A chunk has
// that of the thread that called, whichever runs it: else equal calls would have different bits.
//
// Measured inside training steps (two linear layers, SGD, logits 1024 x 8192, 2 cores, medians of interleaved runs), with PyTorch's
// own runtime, a second copy of libgomp, threads started per call, and PyTorch's loss:
//
//     one run on a shared machine   46.1   48.4   47.5   73.2 ms
//     another, with more beside it   155    204    203    235 ms
#pragma once
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "problem.h"

namespace fusedloss {

template <class Body>
struct Job {
  const Body& body;
  int64_t n_chunks;
  std::fenv_t environment;  // the caller's
  std::atomic<int64_t> next{0};

  // One thread of several.
  static void share(void* self) {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&static_cast<Job*>(self)->environment);
    run(self);
    std::fesetenv(&own);
  }
  static void run(void* self) {
    Job& job = *static_cast<Job*>(self);
    for (int64_t chunk; (chunk = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n_chunks;) job.body(chunk);
  }
};

template <class Body>
void parallel_for(const Problem& problem, int64_t n_chunks, const Body& body) {
  Job<Body> job{body, n_chunks, {}};
  int64_t n_threads = problem.n_threads < n_chunks ? problem.n_threads : n_chunks;
  if (n_threads <= 1) {
    Job<Body>::run(&job);
    return;
  }
  std::fegetenv(&job.environment);
  if (problem.gomp_parallel) {
    problem.gomp_parallel(Job<Body>::share, &job, unsigned(n_threads), 0);
  } else {
    std::vector<std::thread> threads;
    try {
      threads.reserve(size_t(n_threads - 1));
      for (int64_t i = 1; i < n_threads; ++i) threads.emplace_back(Job<Body>::share, &job);
    } catch (const std::exception&) {
      // No more threads, or no memory for them: the chunks are shared out among those that started, and this one.
    }
    Job<Body>::run(&job);
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace fusedloss
