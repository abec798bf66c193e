#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace sartor {
namespace {

uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

int32_t draw(LogitRow& row, const SamplingRow& wish, int64_t vocab) {
  if (wish.temperature == 0.0f || !std::isfinite(row.top())) return row.argmax();
  row.set_temperature(wish.temperature);
  Rank last = row.last_of_all();
  if (wish.top_k > 0 && wish.top_k < vocab) last = std::min(last, row.last_of_count(wish.top_k));
  const Rank within = last;
  if (wish.top_p < 1.0f) last = std::min(last, row.last_of_share(wish.top_p, within));
  if (wish.min_p > 0.0f) last = std::min(last, row.last_with_weight(wish.min_p));
  return row.draw(last, uniform(wish.seed, wish.choice, static_cast<uint32_t>(wish.position)));
}

// Log probabilities: the token's, and those of the `count` likeliest tokens.
void report(LogitRow& row, const float* logits, int64_t vocab, int64_t count,
            SampleResult& result) {
  const float top = row.top();
  const bool finite = std::isfinite(top);
  row.set_temperature(1.0f);
  const double total = finite ? row.total(row.last_of_all()) : NAN;
  const auto normaliser = static_cast<float>(std::log(total));
  const auto logprob = [&](float logit) { return logit - top - normaliser; };
  result.logprob = logprob(logits[result.token]);
  count = std::min(count, vocab);
  if (count <= 0) return;

  // Different logits may have one log probability: ties go to the lowest id there too.
  std::vector<Rank> places;
  if (finite) {
    const float least = logprob(logit_of(row.last_of_count(count)));
    const auto holds = [&](float logit) { return logprob(logit) >= least; };
    for (const Rank rank : row.at_least(least_float(top, holds)))
      places.push_back(rank_of(logprob(logit_of(rank)), id_of(rank)));
  }
  if (static_cast<int64_t>(places.size()) < count) {  // the others are out of all proportion
    places.clear();
    for (int64_t i = 0; i < vocab; ++i)
      places.push_back(rank_of(finite ? logprob(logits[i]) : 0.0f, static_cast<int32_t>(i)));
  }
  std::partial_sort(places.begin(), places.begin() + count, places.end());
  places.resize(static_cast<size_t>(count));
  for (const Rank place : places) {
    result.top_tokens.push_back(id_of(place));
    result.top_logprobs.push_back(logprob(logits[id_of(place)]));
  }
}

}  // namespace

double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  const uint64_t counter = static_cast<uint64_t>(choice) << 32 | position;
  return static_cast<double>(mix64(mix64(seed) ^ counter) >> 11) * 0x1.0p-53;
}

SampleResult sample(const Kernels& kernels, const SampleInput& in, SamplerScratch& scratch) {
  PenaltyInput penalties;
  penalties.repetition = in.row.repetition_penalty;
  penalties.presence = in.row.presence_penalty;
  penalties.frequency = in.row.frequency_penalty;
  penalties.history = in.history;
  penalties.history_length = in.history_length;
  penalties.prompt_length = in.row.prompt_length;
  penalties.bias_tokens = in.bias_tokens;
  penalties.bias_values = in.bias_values;
  penalties.bias_length = in.bias_length;
  const bool changed = scratch.penalties.apply(penalties, in.logits, in.vocab);

  SampleResult result;
  LogitRow row(kernels, in.logits, in.vocab, scratch.row);
  result.token = draw(row, in.row, in.vocab);
  if (changed) scratch.penalties.undo(in.logits);
  if (in.row.logprobs < 0) return result;
  if (changed) row = LogitRow(kernels, in.logits, in.vocab, scratch.row);
  report(row, in.logits, in.vocab, in.row.logprobs, result);
  return result;
}

}  // namespace sartor
