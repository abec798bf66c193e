// Replays recorded cases on every instruction-set path of this machine, without Python.
//
// sartor_replay FILE: FILE has recordings one after the other (core/recording.hpp). A line for
// every case on every path; exit code 1 where any is wrong, 2 where the file cannot be replayed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>
#include <stdexcept>

#include "cpu_features.hpp"
#include "recording.hpp"

namespace {

using namespace sartor;

constexpr int kThreads = 2;  // enough that tasks are shared

// The whole file, at an address that suits recordings.
std::span<const uint8_t> read_file(const char* path, Buffer& buffer) {
  const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
  uint8_t* bytes = buffer.zeroed(std::max<int64_t>(size, 1));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(bytes), size))
    throw std::invalid_argument("cannot be read");
  return {bytes, index(size)};
}

// The largest error as a share of the largest value.
double error_of(const std::vector<float>& got, const std::vector<float>& expected) {
  if (got.size() != expected.size())
    throw std::runtime_error(std::to_string(got.size()) + " numbers instead of " +
                             std::to_string(expected.size()));
  double error = 0, top = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) return std::numeric_limits<double>::infinity();
    error = std::max(error, std::abs(double{got[i]} - double{expected[i]}));
    top = std::max(top, std::abs(double{expected[i]}));
  }
  return error / top;
}

bool replay(const Recording& recording, const std::shared_ptr<ThreadPool>& pool,
            const std::string& path) {
  double error = std::numeric_limits<double>::infinity();
  std::string message;
  try {
    Executor executor(recording.program, pool, select_kernels(path));
    executor.allocate_state(recording.blocks);
    error = error_of(executor.run(recording.step).taps.at(0), recording.expected);
  } catch (const std::exception& failure) {
    message = std::string(": ") + failure.what();
  }
  const bool right = error <= recording.tolerance;
  std::printf("%-8s %-5s %-40s error %.2e of %.2e%s\n", path.c_str(), right ? "right" : "WRONG",
              recording.name.c_str(), error, recording.tolerance, message.c_str());
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr,
                 "usage: sartor_replay FILE\n"
                 "FILE: cases that `python -m sartor.backends.record FILE` wrote\n");
    return 2;
  }
  try {
    Buffer buffer;
    std::span<const uint8_t> bytes = read_file(argv[1], buffer);
    std::vector<Recording> recordings;
    while (!bytes.empty()) recordings.push_back(read_recording(bytes));
    if (recordings.empty()) throw std::invalid_argument("has no cases");
    const auto pool = std::make_shared<ThreadPool>(kThreads);
    bool all_right = true;
    for (const std::string& path : usable_paths()) {
      const auto right = std::count_if(recordings.begin(), recordings.end(),
                                       [&](const auto& r) { return replay(r, pool, path); });
      std::printf("%s: %td of %zu right\n", path.c_str(), right, recordings.size());
      all_right &= static_cast<size_t>(right) == recordings.size();
    }
    return all_right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s: %s\n", argv[1], error.what());
    return 2;
  }
}
