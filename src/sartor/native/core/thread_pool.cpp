#include "thread_pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

namespace sartor {
namespace {

constexpr int kTaskBits = 24;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;
constexpr int64_t kMaxTasks = int64_t{1} << (kTaskBits - 1);
constexpr int kSpins = 2000;  // some tens of microseconds: longer than the gaps inside a step

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  wakeups_.fetch_add(1);
  wakeups_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// A task that throws would leave a job half done that others wait for: it ends the process.
bool ThreadPool::claim_and_run(int thread) noexcept {
  uint64_t state = state_.load(std::memory_order_acquire);
  bool ran = false;
  for (;;) {
    const uint64_t next = state & kTaskMask, tasks = (state >> kTaskBits) & kTaskMask;
    if (next >= tasks) return ran;
    // Valid if the claim below succeeds: a job with unclaimed tasks is not replaced.
    const Function function = function_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    function(context, static_cast<int64_t>(next), thread);
    remaining_.fetch_sub(1, std::memory_order_acq_rel);
    ran = true;
    state = state_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run_erased(int64_t tasks, Function function, const void* context) {
  const std::lock_guard turn(callers_);
  for (int64_t begin = 0; begin < tasks; begin += kMaxTasks) {
    // A job beyond the counter's range runs in pieces; none of ours comes near it.
    const int64_t count = std::min(kMaxTasks, tasks - begin);
    struct Shifted {
      Function function;
      const void* context;
      int64_t begin;
    } shifted{function, context, begin};
    function_.store(
        [](const void* c, int64_t task, int thread) {
          const auto& s = *static_cast<const Shifted*>(c);
          s.function(s.context, s.begin + task, thread);
        },
        std::memory_order_relaxed);
    context_.store(&shifted, std::memory_order_relaxed);
    remaining_.store(count, std::memory_order_relaxed);
    const uint64_t generation = (state_.load(std::memory_order_relaxed) >> (2 * kTaskBits)) + 1;
    state_.store(generation << (2 * kTaskBits) | static_cast<uint64_t>(count) << kTaskBits);
    if (sleepers_.load() > 0) {
      wakeups_.fetch_add(1);
      wakeups_.notify_all();
    }
    claim_and_run(0);
    for (int spins = 0; remaining_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) relax();
      else std::this_thread::yield();  // the worker that we wait for may need this core
    }
  }
}

void ThreadPool::work(int thread) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    if (claim_and_run(thread)) continue;
    const uint64_t seen = state_.load(std::memory_order_acquire);
    bool changed = false;
    for (int spins = 0; spins < kSpins && !changed; ++spins) {
      relax();
      changed = state_.load(std::memory_order_relaxed) != seen;
    }
    if (changed) continue;
    const uint32_t wakeups = wakeups_.load();
    sleepers_.fetch_add(1);
    if (state_.load() == seen && !stopping_.load()) wakeups_.wait(wakeups);
    sleepers_.fetch_sub(1);
  }
}

}  // namespace sartor
