// Penalties and biases: written into a row of logits, and taken back.
#pragma once

#include <cstdint>
#include <vector>

namespace sartor {

struct PenaltyInput {
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  const int32_t* history = nullptr;  // the prompt, then what was written after it
  int64_t history_length = 0, prompt_length = 0;
  const int32_t* bias_tokens = nullptr;
  const float* bias_values = nullptr;
  int64_t bias_length = 0;
};

class Penalties {
 public:
  // Whether any logit was written to.
  bool apply(const PenaltyInput& in, float* logits, int64_t vocab);
  // The logits as they were before.
  void undo(float* logits);

 private:
  struct Change {
    int32_t token;
    float before;
  };
  void count(const PenaltyInput& in);
  void penalise(const PenaltyInput& in, float* logits);

  // Zero between two rows. A bit a token, so that a long history is marked within the first cache.
  std::vector<uint64_t> seen_;
  std::vector<int32_t> written_;
  std::vector<Change> changes_;
};

}  // namespace sartor
