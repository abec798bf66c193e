// What a pool promises when a task throws, and when the system refuses a thread. Ends with 0 where
// all is right; the line of a wrong expectation is the exit code.
#include <atomic>
#include <stdexcept>
#include <string>

#include "thread_pool.hpp"

#if defined(__linux__)
#include <sys/resource.h>
#endif

#define EXPECT(condition) \
  if (!(condition)) return __LINE__

namespace {

int64_t sum(sartor::ThreadPool& pool, int64_t tasks) {
  std::atomic<int64_t> total{0};
  pool.run(tasks, [&](int64_t task, int) { total += task; });
  return total;
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5}) {
    sartor::ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::string caught;
      try {
        pool.run(100, [&](int64_t task, int) {
          if (task % 50 == 7) throw std::runtime_error("task " + std::to_string(task));
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      EXPECT(caught == "task 7" || caught == "task 57");
      EXPECT(sum(pool, 100) == 4950);  // it works on
    }
  }
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  const rlimit small{rlim_t{256} << 20, rlim_t{256} << 20};  // room for few stacks
  EXPECT(setrlimit(RLIMIT_AS, &small) == 0);
  std::string refused;
  try {
    sartor::ThreadPool pool(500);
  } catch (const std::runtime_error& error) {
    refused = error.what();
  }
  EXPECT(refused.find(" of 500 threads could be started") != std::string::npos);
  sartor::ThreadPool pool(2);
  EXPECT(sum(pool, 100) == 4950);
#endif
  return 0;
}
