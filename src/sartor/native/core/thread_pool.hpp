// A pool whose caller works too. Every thread has a share of neighbouring tasks, so that what it
// reads goes on where it stopped, and takes from the end of another's share when its own is done:
// a thread that the system has put aside delays nobody. Workers spin briefly for the next job,
// then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sartor {

class ThreadPool {
 public:
  // Throws std::runtime_error where the system does not give that many threads.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls body(task, thread) for every task in [0, tasks); returns when all are done. What a task
  // throws is thrown here; the tasks that have not begun by then are left out.
  template <typename Body>
  void run(int64_t tasks, const Body& body) {
    if (tasks <= 0) return;
    if (tasks == 1 || threads_ == 1) {
      for (int64_t task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    run_erased(
        tasks,
        [](const void* context, int64_t task, int thread) {
          (*static_cast<const Body*>(context))(task, thread);
        },
        &body);
  }

 private:
  using Function = void (*)(const void*, int64_t, int);

  void run_erased(int64_t tasks, Function function, const void* context);
  void stop();
  void work(int thread);
  bool claim_and_run(int thread) noexcept;
  bool claim_one(int thread, int share) noexcept;

  // generation << 48 | end << 24 | next task: one word, so that a claim cannot mix two jobs.
  struct alignas(64) Share {
    std::atomic<uint64_t> state{0};
  };

  // Not the number of workers: these ask for it while others are still being started.
  const int threads_;
  std::unique_ptr<Share[]> shares_;  // one a thread
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int64_t> remaining_{0};
  alignas(64) std::atomic<uint32_t> wakeups_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<bool> failed_{false};
  std::exception_ptr
      error_;  // of the first task that failed, written before its task counts as done
  std::vector<std::thread> workers_;
  std::mutex callers_;  // several threads may hand in jobs; they take turns
};

}  // namespace sartor
