// The sampler without a model before it: for its tests and its benchmark.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <ctime>

#include "binding.hpp"

using namespace nb::literals;
using namespace sartor;

nb::tuple samples_to_numpy(const std::vector<SampleResult>& samples) {
  std::vector<int32_t> ids, top_ids, top_starts{0};
  std::vector<float> logprobs, top_logprobs;
  for (const SampleResult& sample : samples) {
    ids.push_back(sample.token);
    logprobs.push_back(sample.logprob);
    top_ids.insert(top_ids.end(), sample.top_tokens.begin(), sample.top_tokens.end());
    top_logprobs.insert(top_logprobs.end(), sample.top_logprobs.begin(), sample.top_logprobs.end());
    top_starts.push_back(static_cast<int32_t>(top_ids.size()));
  }
  return nb::make_tuple(to_numpy(std::move(ids)), to_numpy(std::move(logprobs)),
                        to_numpy(std::move(top_ids)), to_numpy(std::move(top_logprobs)),
                        to_numpy(std::move(top_starts)));
}

namespace {

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct PySampler {
  const Kernels* kernels;
  SamplerScratch scratch;

  nb::tuple run(InOut<float> logits, In<uint8_t> sampling, In<int32_t> history,
                In<int32_t> history_starts, In<int32_t> bias_tokens, In<int32_t> bias_starts,
                In<float> bias_values, int repeats) {
    require(logits.ndim() == 2 && logits.shape(1) > 0, "sampler: logits are [rows, vocab]");
    const auto rows = static_cast<int64_t>(logits.shape(0));
    const auto vocab = static_cast<int64_t>(logits.shape(1));
    require(static_cast<int64_t>(sampling.size()) == rows * int64_t{sizeof(SamplingRow)} &&
                static_cast<int64_t>(history_starts.size()) == rows + 1 &&
                static_cast<int64_t>(bias_starts.size()) == rows + 1 &&
                bias_tokens.size() == bias_values.size(),
            "sampler: arrays do not fit the rows");
    const int32_t *past = history_starts.data(), *biases = bias_starts.data();
    for (int64_t r = 0; r < rows; ++r)
      require(
          0 <= past[r] && past[r] <= past[r + 1] && 0 <= biases[r] && biases[r] <= biases[r + 1],
          "sampler: lists do not lie end to end");
    require(past[rows] <= static_cast<int64_t>(history.size()) &&
                biases[rows] <= static_cast<int64_t>(bias_tokens.size()),
            "sampler: lists end past their values");
    check_ids(history.data(), past[rows], vocab, "history");
    check_ids(bias_tokens.data(), biases[rows], vocab, "logit bias");
    std::vector<SampleResult> samples(static_cast<size_t>(rows));
    std::vector<double> seconds(static_cast<size_t>(rows), HUGE_VAL);
    {
      nb::gil_scoped_release release;
      for (int i = 0; i < repeats; ++i)
        for (int64_t r = 0; r < rows; ++r) {
          SampleInput in;
          in.logits = logits.data() + r * vocab;
          in.vocab = vocab;
          in.row = reinterpret_cast<const SamplingRow*>(sampling.data())[r];
          in.history = history.data() + past[r];
          in.history_length = past[r + 1] - past[r];
          in.bias_tokens = bias_tokens.data() + biases[r];
          in.bias_values = bias_values.data() + biases[r];
          in.bias_length = biases[r + 1] - biases[r];
          const double begun = thread_seconds();
          SampleResult& result = samples[static_cast<size_t>(r)];
          double& least = seconds[static_cast<size_t>(r)];
          result = sample(*kernels, in, scratch);
          least = std::min(least, thread_seconds() - begun);
        }
    }
    return nb::make_tuple(samples_to_numpy(samples), to_numpy(std::move(seconds)));
  }
};

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<PySampler>(m, "Sampler")
      .def(
          "__init__",
          [](PySampler* self, const std::string& isa) {
            new (self) PySampler{kernels_of(isa), {}};
          },
          "isa"_a)
      .def("run", &PySampler::run, "logits"_a, "sampling"_a, "history"_a, "history_starts"_a,
           "bias_tokens"_a, "bias_starts"_a, "bias_values"_a, "repeats"_a = 1);
  m.def("uniform", &sartor::uniform, "seed"_a, "choice"_a, "position"_a);
}
