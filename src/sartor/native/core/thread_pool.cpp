#include "thread_pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

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

ThreadPool::ThreadPool(int threads)
    : threads_(std::max(threads, 1)),
      shares_(std::make_unique<Share[]>(static_cast<size_t>(threads_))) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::exception& error) {  // no thread, or no memory for one
    const size_t started = workers_.size() + 1;
    stop();
    throw std::runtime_error("only " + std::to_string(started) + " of " + std::to_string(threads) +
                             " threads could be started (" + error.what() + ")");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true);
  wakeups_.fetch_add(1);
  wakeups_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::claim_one(int thread, int share) noexcept {
  std::atomic<uint64_t>& word = shares_[static_cast<size_t>(share)].state;
  uint64_t state = word.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t next = state & kTaskMask, end = (state >> kTaskBits) & kTaskMask;
    if (next >= end) return false;
    // Valid if the claim below succeeds: a job with unclaimed tasks is not replaced.
    const Function function = function_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const bool mine = share == thread;
    const uint64_t claimed = mine ? state + 1 : state - (uint64_t{1} << kTaskBits);
    if (!word.compare_exchange_weak(state, claimed, std::memory_order_acq_rel)) continue;
    try {
      if (!failed_.load(std::memory_order_relaxed))
        function(context, static_cast<int64_t>(mine ? next : end - 1), thread);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    remaining_.fetch_sub(1, std::memory_order_acq_rel);
    return true;
  }
}

bool ThreadPool::claim_and_run(int thread) noexcept {
  bool ran = false;
  for (int i = 0; i < threads();) {
    const bool found = claim_one(thread, (thread + i) % threads());
    ran |= found;
    i = found ? 0 : i + 1;
  }
  return ran;
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
    const uint64_t generation = generation_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < threads(); ++i) {
      const auto first = static_cast<uint64_t>(count * i / threads());
      const auto end = static_cast<uint64_t>(count * (i + 1) / threads());
      shares_[static_cast<size_t>(i)].state.store(
          generation << (2 * kTaskBits) | end << kTaskBits | first, std::memory_order_release);
    }
    generation_.store(generation);
    if (sleepers_.load() > 0) {
      wakeups_.fetch_add(1);
      wakeups_.notify_all();
    }
    claim_and_run(0);
    for (int spins = 0; remaining_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) relax();
      else std::this_thread::yield();  // the worker that we wait for may need this core
    }
    if (failed_.load(std::memory_order_relaxed)) {
      failed_.store(false, std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }
}

void ThreadPool::work(int thread) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    const uint64_t seen = generation_.load(std::memory_order_acquire);  // a later job is not missed
    if (claim_and_run(thread)) continue;
    bool changed = false;
    for (int spins = 0; spins < kSpins && !changed; ++spins) {
      relax();
      changed = generation_.load(std::memory_order_relaxed) != seen;
    }
    if (changed) continue;
    const uint32_t wakeups = wakeups_.load();
    sleepers_.fetch_add(1);
    if (generation_.load() == seen && !stopping_.load()) wakeups_.wait(wakeups);
    sleepers_.fetch_sub(1);
  }
}

}  // namespace sartor
