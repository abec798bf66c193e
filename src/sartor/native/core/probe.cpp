#include "probe.hpp"

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

namespace sartor {
namespace {

using Clock = std::chrono::steady_clock;

// Best of several rounds of `work` on every thread at once, in units a second.
double best_rate(ThreadPool& pool, double seconds, const std::function<double(int64_t)>& work) {
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    std::vector<double> done(static_cast<size_t>(pool.threads()));
    const auto begin = Clock::now();
    pool.run(pool.threads(),
             [&](int64_t task, int) { done[static_cast<size_t>(task)] = work(task); });
    const double took = std::chrono::duration<double>(Clock::now() - begin).count();
    double total = 0;
    for (const double d : done) total += d;
    best = std::max(best, total / took);
  } while (Clock::now() < until);
  return best;
}

}  // namespace

Ceilings measure_ceilings(ThreadPool& pool, const Kernels& kernels, double seconds) {
  Ceilings result;
  // Far beyond the share of a last-level cache that one tenant of the machine gets.
  constexpr int64_t kBytes = int64_t{256} << 20;
  {
    std::vector<uint8_t> data(static_cast<size_t>(kBytes) * static_cast<size_t>(pool.threads()), 1);
    result.read_bytes = best_rate(pool, seconds, [&](int64_t thread) {
      return kernels.probe_read(data.data() + thread * kBytes, kBytes);
    });
  }
  result.int8_ops = best_rate(pool, seconds, [&](int64_t) { return kernels.probe_int8(200000); });
  result.fp32_ops = best_rate(pool, seconds, [&](int64_t) { return kernels.probe_fp32(200000); });
  return result;
}

}  // namespace sartor
