#include "penalties.hpp"

#include <algorithm>
#include <bit>

namespace sartor {

bool Penalties::apply(const PenaltyInput& in, float* logits, int64_t vocab) {
  changes_.clear();
  if (in.history_length > 0) {
    seen_.resize(std::max(seen_.size(), static_cast<size_t>((vocab + 63) / 64)));
    written_.resize(std::max(written_.size(), static_cast<size_t>(vocab)));
    penalise(in, logits);
  }
  for (int64_t i = 0; i < in.bias_length; ++i) {
    const int32_t token = in.bias_tokens[i];
    change(logits, token, logits[token] + in.bias_values[i]);
  }
  return !changes_.empty();
}

void Penalties::undo(float* logits) {
  for (auto c = changes_.rbegin(); c != changes_.rend(); ++c) logits[c->token] = c->before;
  changes_.clear();
}

void Penalties::change(float* logits, int32_t token, float after) {
  changes_.push_back({token, logits[token]});
  logits[token] = after;
}

void Penalties::penalise(const PenaltyInput& in, float* logits) {
  const int64_t prompt = std::min(in.prompt_length, in.history_length);
  const bool counted = in.presence != 0.0f || in.frequency != 0.0f;
  for (int64_t i = in.repetition == 1.0f ? prompt : 0; i < in.history_length; ++i) {
    const auto token = static_cast<uint32_t>(in.history[i]);
    seen_[token / 64] |= uint64_t{1} << token % 64;
  }
  if (counted)
    for (int64_t i = prompt; i < in.history_length; ++i)
      ++written_[static_cast<size_t>(in.history[i])];
  for (size_t word = 0; word < seen_.size(); ++word) {
    for (uint64_t bits = seen_[word]; bits; bits &= bits - 1) {
      const size_t token = word * 64 + static_cast<size_t>(std::countr_zero(bits));
      const float x = logits[token];
      const float apart = x / in.repetition, times = x * in.repetition;
      float after = x > 0 ? apart : times;
      if (const int32_t count = written_[token]) {
        after -= in.presence;
        after -= in.frequency * static_cast<float>(count);
        written_[token] = 0;
      }
      change(logits, static_cast<int32_t>(token), after);
    }
    seen_[word] = 0;
  }
}

}  // namespace sartor
