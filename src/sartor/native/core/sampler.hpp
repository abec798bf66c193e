// From a row of logits to a token. The meaning is sartor/ops/sampling.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "logit_row.hpp"
#include "penalties.hpp"

namespace sartor {

// Laid out like SAMPLING_ROW in sartor/graph/batch.py.
struct SamplingRow {
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k;
  uint32_t choice;
  uint64_t seed;
  int32_t position, prompt_length, logprobs, reserved;
};
static_assert(sizeof(SamplingRow) == 56);

struct SampleResult {
  int32_t token = 0;
  float logprob = 0.0f;
  std::vector<int32_t> top_tokens;
  std::vector<float> top_logprobs;
};

struct SampleInput {
  float* logits = nullptr;  // written to, and restored
  int64_t vocab = 0;
  SamplingRow row{};
  const int32_t* history = nullptr;
  int64_t history_length = 0;
  const int32_t* bias_tokens = nullptr;
  const float* bias_values = nullptr;
  int64_t bias_length = 0;
};

double uniform(uint64_t seed, uint32_t choice, uint32_t position);

// `scratch` is reused between calls of one thread.
struct SamplerScratch {
  Penalties penalties;
  RowScratch row;
};
SampleResult sample(const Kernels& kernels, const SampleInput& input, SamplerScratch& scratch);

}  // namespace sartor
