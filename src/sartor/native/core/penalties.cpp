#include "penalties.hpp"

#include <algorithm>
#include <bit>

namespace sartor {

bool Penalties::apply(const PenaltyInput& in, float* logits, int64_t vocab) {
  changes_.clear();
  if (in.history_length > 0) {
    seen_.resize(std::max(seen_.size(), static_cast<size_t>((vocab + 63) / 64)));
    written_.resize(std::max(written_.size(), static_cast<size_t>(vocab)));
    count(in);
    penalise(in, logits);
  }
  for (int64_t i = 0; i < in.bias_length; ++i) {
    float& logit = logits[in.bias_tokens[i]];
    changes_.push_back({in.bias_tokens[i], logit});
    logit += in.bias_values[i];
  }
  return !changes_.empty();
}

void Penalties::undo(float* logits) {
  // Backwards: a token may have been changed twice.
  for (auto c = changes_.rbegin(); c != changes_.rend(); ++c) logits[c->token] = c->before;
  changes_.clear();
}

void Penalties::count(const PenaltyInput& in) {
  const int64_t prompt = std::min(in.prompt_length, in.history_length);
  for (int64_t i = in.repetition == 1.0f ? prompt : 0; i < in.history_length; ++i) {
    const auto token = static_cast<uint32_t>(in.history[i]);
    seen_[token / 64] |= uint64_t{1} << token % 64;
  }
  if (in.presence == 0.0f && in.frequency == 0.0f) return;
  for (int64_t i = prompt; i < in.history_length; ++i)
    ++written_[static_cast<size_t>(in.history[i])];
}

void Penalties::penalise(const PenaltyInput& in, float* logits) {
  for (size_t word = 0; word < seen_.size(); ++word) {
    for (uint64_t bits = seen_[word]; bits; bits &= bits - 1) {
      const size_t token = word * 64 + static_cast<size_t>(std::countr_zero(bits));
      changes_.push_back({static_cast<int32_t>(token), logits[token]});
    }
    seen_[word] = 0;
  }
  // Signs and counts are as good as random: looked up, for a branch would be guessed wrong.
  const float factor[2] = {in.repetition, 1.0f}, divisor[2] = {1.0f, in.repetition};
  const float presence[2] = {0.0f, in.presence};
  for (const Change& change : changes_) {
    const float x = change.before;
    int32_t& written = written_[static_cast<size_t>(change.token)];
    const float penalised = x * factor[x > 0] / divisor[x > 0] - presence[written > 0];
    logits[change.token] = penalised - in.frequency * static_cast<float>(written);
    written = 0;
  }
}

}  // namespace sartor
