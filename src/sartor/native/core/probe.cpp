#include "probe.hpp"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_features.hpp"
#include "probe_parts.hpp"

namespace sartor {
namespace {

using Clock = std::chrono::steady_clock;
using Work = std::function<double(int64_t thread)>;  // returns the units that it did

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Time that this thread has run for.
double own_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
#endif
}

struct alignas(64) Done {
  double units = 0, seconds = 0;  // seconds of the thread's own time
};

// `work` on every thread at once; returns what each did, and the time until all were done.
double on_all(ThreadPool& pool, const Work& work, std::vector<Done>& done) {
  done.resize(static_cast<size_t>(pool.threads()));
  const auto begin = Clock::now();
  pool.run(pool.threads(), [&](int64_t task, int) {
    const double started = own_seconds();
    const double units = work(task);
    done[static_cast<size_t>(task)] = {units, own_seconds() - started};
  });
  return seconds_since(begin);
}

// The best of several rounds, in units a second of all threads.
class Best {
 public:
  // Each thread by its own time: what other processes took does not count.
  void apart(const std::vector<Done>& done) {
    threads_.resize(done.size());
    for (size_t i = 0; i < done.size(); ++i)
      threads_[i] = std::max(threads_[i], done[i].units / done[i].seconds);
    rate = std::accumulate(threads_.begin(), threads_.end(), 0.0);
  }
  // All by the time that they took together.
  void together(const std::vector<Done>& done, double seconds) {
    double units = 0;
    for (const Done& d : done) units += d.units;
    rate = std::max(rate, units / seconds);
  }
  double rate = 0;

 private:
  std::vector<double> threads_;
};

constexpr int kLeastRounds = 8;

using Probe = double (*)(int64_t iterations, int64_t links);

// A processor may slow down for as long as it works on wide instructions, so the clock is told
// while they run: by a chain beside them that takes a little longer than they do.
Peak measure_peak(ThreadPool& pool, Probe probe, double width, bool own_cores, double seconds) {
  const double operations = probe(1, 0);
  if (operations == 0) return {};
  // Half a millisecond: more would hardly ever pass without an interruption on a machine that
  // others use too, less would measure the way to the threads.
  int64_t iterations = 256;
  for (double took = 0; took < 4e-4; iterations *= 2) {
    const double started = own_seconds();
    probe(iterations, 0);
    took = own_seconds() - started;
  }
  int64_t links = kLinkCycles ? 1 : 0;
  std::vector<Done> done;
  Best alone, together, chained;  // iterations
  const auto begin = Clock::now();
  for (int rounds = 0; rounds < kLeastRounds || seconds_since(begin) < seconds; ++rounds) {
    const auto run = [&](int64_t length) {
      return on_all(
          pool,
          [&](int64_t) {
            probe(iterations, length);
            return static_cast<double>(iterations);
          },
          done);
    };
    together.together(done, run(0));
    alone.apart(done);
    run(links);
    chained.apart(done);
    if (alone.rate < 1.4 * chained.rate && links) {  // what runs beside it may still take longer
      links += (links + 3) / 4;
      chained = {};
      rounds = 0;
    }
  }
  const double clock = chained.rate / pool.threads() * static_cast<double>(links * kLinkCycles);
  return {(own_cores ? alone : together).rate * operations, clock, width};
}

// The best of several ways to read: how many streams suit a machine depends on its prefetchers.
double measure_read(ThreadPool& pool, double seconds) {
  // Memory is as fast on every path, but not every path is fast enough to see it.
  const Kernels& kernels = *select_kernels("auto");
  // Far beyond the share of a last-level cache that one tenant of the machine gets; a part at a
  // time, so that some rounds pass without an interruption.
  constexpr int64_t kParts = 8;
  const int64_t part = std::min(int64_t{32} << 20, (int64_t{256} << 20) / pool.threads());
  const int64_t bytes = part * kParts;
  const std::unique_ptr<uint8_t[]> data(new uint8_t[static_cast<size_t>(bytes * pool.threads())]);
  pool.run(pool.threads(),
           [&](int64_t task, int) { std::fill_n(data.get() + task * bytes, bytes, uint8_t{1}); });
  const auto begin = Clock::now();
  std::vector<Done> done;
  Best best;
  for (int64_t round = 0; round < 4 * kParts || seconds_since(begin) < seconds; ++round) {
    constexpr int kStreams[] = {1, 4, 8, 12};
    const double took = on_all(
        pool,
        [&](int64_t task) {
          const uint8_t* from = data.get() + task * bytes + round % kParts * part;
          return kernels.probe_read(from, part, kStreams[round / kParts % 4]);
        },
        done);
    best.together(done, took);
  }
  return best.rate;
}

}  // namespace

Ceilings measure_ceilings(ThreadPool& pool, const Kernels& kernels, bool own_cores,
                          double seconds) {
  Ceilings result;
  result.read_bytes = measure_read(pool, seconds);
  const PeakWidths& width = kernels.peak_widths;
  result.int8 = measure_peak(pool, kernels.probe_int8, width.int8, own_cores, seconds);
  result.fp32 = measure_peak(pool, kernels.probe_fp32, width.fp32, own_cores, seconds);
  result.bf16 = measure_peak(pool, kernels.probe_bf16, width.bf16, own_cores, seconds);
  return result;
}

}  // namespace sartor
