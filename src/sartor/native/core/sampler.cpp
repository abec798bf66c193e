#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace sartor {
namespace {

uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Likeliest first, ties to the lowest id.
struct Likelier {
  const float* logits;
  bool operator()(int32_t a, int32_t b) const {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  }
};

void penalise(const SampleInput& in, std::vector<int32_t>& counts, float* logits) {
  // Counts of the output in the low bits; the top bit marks that the token was seen at all.
  constexpr int32_t kSeen = int32_t{1} << 30;
  counts.resize(static_cast<size_t>(in.vocab), 0);
  for (int64_t i = 0; i < in.history_length; ++i) {
    int32_t& entry = counts[static_cast<size_t>(in.history[i])];
    entry = (entry | kSeen) + (i >= in.row.prompt_length ? 1 : 0);
  }
  for (int64_t i = 0; i < in.history_length; ++i) {
    const int32_t token = in.history[i];
    int32_t& entry = counts[static_cast<size_t>(token)];
    if (entry == 0) continue;  // an earlier occurrence was handled
    const int32_t written = entry & (kSeen - 1);
    float& x = logits[token];
    x = x > 0 ? x / in.row.repetition_penalty : x * in.row.repetition_penalty;
    if (written > 0) {
      x -= in.row.presence_penalty;
      x -= in.row.frequency_penalty * static_cast<float>(written);
    }
    entry = 0;
  }
}

// The ids that top-k, top-p and min-p leave, in rising order.
void keep_likely(const Kernels& kernels, const SampleInput& in, const float* x, float top,
                 std::vector<int32_t>& ids) {
  const SamplingRow& row = in.row;
  const int64_t n = in.vocab;
  const bool limited = row.top_k > 0 && row.top_k < n;
  const float inverse = 1.0f / row.temperature;
  // First look at logits near the top: nearly always enough, and few.
  float reach = 12.0f;
  for (;;) {
    const float cut = top - reach * row.temperature;
    ids.clear();
    for (int64_t i = 0; i < n; ++i)
      if (x[i] >= cut) ids.push_back(static_cast<int32_t>(i));
    const bool all = static_cast<int64_t>(ids.size()) == n || !(reach < 1e30f);
    if (limited && static_cast<int64_t>(ids.size()) < row.top_k && !all) {
      reach = reach < 100.0f ? reach * 4 : 1e38f;
      continue;
    }
    double total;
    if (limited) {
      const auto keep = std::min<size_t>(ids.size(), static_cast<size_t>(row.top_k));
      std::nth_element(ids.begin(), ids.begin() + static_cast<int64_t>(keep) - 1, ids.end(),
                       Likelier{x});
      ids.resize(keep);
      total = 0;
      for (const int32_t id : ids) total += std::exp(double{x[id] - top} * inverse);
    } else {
      total = row.top_p < 1.0f ? kernels.sum_exp(x, n, top, inverse) : 0.0;
    }
    if (row.top_p < 1.0f) {
      std::sort(ids.begin(), ids.end(), Likelier{x});
      const double wanted = double{row.top_p} * total;
      double before = 0;
      size_t kept = 0;
      while (kept < ids.size() && (kept == 0 || before < wanted))
        before += std::exp(double{x[ids[kept++]] - top} * inverse);
      if (kept == ids.size() && before < wanted && !limited && !all) {
        reach = reach < 100.0f ? reach * 4 : 1e38f;
        continue;
      }
      ids.resize(kept);
    } else if (!limited && !all && row.min_p <= 0.0f) {
      reach = 1e38f;  // nothing filters: every token takes part
      continue;
    } else if (!limited && !all && std::exp(-reach) > row.min_p) {
      reach *= 4;
      continue;
    }
    break;
  }
  if (row.min_p > 0.0f) {
    const float least = row.min_p;
    std::erase_if(ids, [&](int32_t id) { return std::exp((x[id] - top) * inverse) < least; });
  }
  std::sort(ids.begin(), ids.end());
}

int32_t draw(const Kernels& kernels, const SampleInput& in, const float* x,
             std::vector<int32_t>& ids) {
  const float top = kernels.max(x, in.vocab);
  keep_likely(kernels, in, x, top, ids);
  const float inverse = 1.0f / in.row.temperature;
  double total = 0;
  for (const int32_t id : ids) total += std::exp(double{x[id] - top} * inverse);
  const double target =
      uniform(in.row.seed, in.row.choice, static_cast<uint32_t>(in.row.position)) * total;
  double sum = 0;
  for (const int32_t id : ids) {
    sum += std::exp(double{x[id] - top} * inverse);
    if (sum > target) return id;
  }
  return ids.empty() ? static_cast<int32_t>(kernels.argmax(x, in.vocab)) : ids.back();
}

}  // namespace

double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  const uint64_t counter = static_cast<uint64_t>(choice) << 32 | position;
  return static_cast<double>(mix64(mix64(seed) ^ counter) >> 11) * 0x1.0p-53;
}

SampleResult sample(const Kernels& kernels, const SampleInput& in, SamplerScratch& scratch) {
  SampleResult result;
  const float* logits = in.logits;
  if (in.history_length > 0 || in.bias_length > 0) {
    scratch.logits.assign(in.logits, in.logits + in.vocab);
    if (in.history_length > 0) penalise(in, scratch.counts, scratch.logits.data());
    for (int64_t i = 0; i < in.bias_length; ++i)
      scratch.logits[static_cast<size_t>(in.bias_tokens[i])] += in.bias_values[i];
    logits = scratch.logits.data();
  }
  result.token = in.row.temperature == 0.0f ? static_cast<int32_t>(kernels.argmax(logits, in.vocab))
                                            : draw(kernels, in, logits, scratch.ids);
  if (in.row.logprobs < 0) return result;

  const float top = kernels.max(in.logits, in.vocab);
  const double total = kernels.sum_exp(in.logits, in.vocab, top, 1.0f);
  const auto normaliser = static_cast<float>(std::log(total));
  const auto logprob = [&](int32_t id) { return in.logits[id] - top - normaliser; };
  result.logprob = logprob(result.token);
  const auto wanted = static_cast<size_t>(std::min<int64_t>(in.row.logprobs, in.vocab));
  scratch.ids.resize(static_cast<size_t>(in.vocab));
  for (int64_t i = 0; i < in.vocab; ++i)
    scratch.ids[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const auto middle = scratch.ids.begin() + static_cast<int64_t>(wanted);
  std::partial_sort(scratch.ids.begin(), middle, scratch.ids.end(), Likelier{in.logits});
  for (auto it = scratch.ids.begin(); it != middle; ++it) {
    result.top_tokens.push_back(*it);
    result.top_logprobs.push_back(logprob(*it));
  }
  return result;
}

}  // namespace sartor
