#include "logit_row.hpp"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

#include "exp2.hpp"

namespace sartor {
namespace {

constexpr int32_t kLastId = std::numeric_limits<int32_t>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kSlope = kLog2E / 16;  // of a weight, at temperature 1
// In nats below the top: a million weights of e^-50 do not change a sum that begins with 1.
constexpr float kReach = 50.0f;
constexpr int64_t kHead = 64;      // tokens that are tried first, and often are enough
constexpr int64_t kManyMore = 16;  // tokens in place of one
constexpr int64_t kFewRanks = 64;  // to sort
constexpr size_t kAll = std::numeric_limits<size_t>::max();

// Floats as integers in the same order.
uint32_t ordered(float x) {
  const auto bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
float from_ordered(uint32_t key) {
  return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

}  // namespace

Rank rank_of(float logit, int32_t id) {
  return Rank{~ordered(logit)} << 32 | static_cast<uint32_t>(id);
}
float logit_of(Rank rank) { return from_ordered(~static_cast<uint32_t>(rank >> 32)); }

float least_float(float high, const std::function<bool(float)>& holds) {
  uint32_t no = ordered(-FLT_MAX), yes = ordered(high);
  if (holds(-FLT_MAX)) return -FLT_MAX;
  while (yes - no > 1) {
    const uint32_t middle = no + (yes - no) / 2;
    (holds(from_ordered(middle)) ? yes : no) = middle;
  }
  return from_ordered(yes);
}

LogitRow::LogitRow(const Kernels& kernels, const float* logits, int64_t size, RowScratch& scratch)
    : kernels_(&kernels), logits_(logits), size_(size), scratch_(&scratch) {
  scratch.maxima.resize(static_cast<size_t>((size + kSampleBlock - 1) / kSampleBlock));
  scratch.sums.resize(scratch.maxima.size());
  kernels.block_maxima(logits, size, scratch.maxima.data());
  weighing_.top = *std::max_element(scratch.maxima.begin(), scratch.maxima.end());
}

int64_t LogitRow::length(int64_t block) const {
  return std::min(kSampleBlock, size_ - block * kSampleBlock);
}

int32_t LogitRow::argmax() const {
  for (int64_t b = 0; b < blocks(); ++b) {
    if (scratch_->maxima[static_cast<size_t>(b)] != top()) continue;
    const int64_t begin = b * kSampleBlock;
    for (int64_t i = begin; i < begin + length(b); ++i)
      if (logits_[i] == top()) return static_cast<int32_t>(i);
  }
  return 0;  // nothing but NaN
}

std::vector<Rank>& LogitRow::between(float low, float high, size_t limit) {
  std::vector<Rank>& ranks = scratch_->ranks;
  ranks.clear();
  for (int64_t b = 0; b < blocks() && ranks.size() <= limit; ++b) {
    if (!(scratch_->maxima[static_cast<size_t>(b)] >= low)) continue;
    int32_t ids[kSampleBlock];
    const int64_t begin = b * kSampleBlock;
    const int64_t found =
        kernels_->collect(logits_ + begin, length(b), low, high, static_cast<int32_t>(begin), ids);
    for (int64_t i = 0; i < found; ++i) ranks.push_back(rank_of(logits_[ids[i]], ids[i]));
  }
  return ranks;
}

std::vector<Rank>& LogitRow::at_least(float logit) { return between(logit, kInfinity, kAll); }

void LogitRow::set_temperature(float temperature) {
  weighing_.slope = kSlope / temperature;
  weighing_.cut = std::max(top() - kReach * temperature, -FLT_MAX);
}

double LogitRow::weight(float logit) const {
  if (!(logit >= weighing_.cut)) return 0.0;
  const double t[1] = {(double{logit} - double{top()}) * weighing_.slope};
  double power[1];
  exp2_of_16<double, int64_t, 1>(t, power);
  return power[0];
}

Rank LogitRow::last_of_all() const { return rank_of(weighing_.cut, kLastId); }

Rank LogitRow::last_with_weight(double least) const {
  const auto holds = [&](float logit) { return weight(logit) >= least; };
  return std::min(last_of_all(), rank_of(least_float(top(), holds), kLastId));
}

// The first tokens, at least as many as blocks are asked for: so many have a maximum as high. None
// where ties make it far more.
std::vector<Rank>& LogitRow::head(int64_t tokens) {
  std::vector<float>& falling = scratch_->falling;
  falling = scratch_->maxima;
  const auto last = falling.begin() + tokens - 1;
  std::nth_element(falling.begin(), last, falling.end(), std::greater<float>());
  const auto limit = static_cast<size_t>(kManyMore * tokens);
  std::vector<Rank>& ranks = between(std::max(*last, -FLT_MAX), kInfinity, limit);
  if (ranks.size() > limit) ranks.clear();
  return ranks;
}

Rank LogitRow::last_of_count(int64_t count) {
  return last_of_sum(static_cast<double>(count), true, weighing_.cut);
}

Rank LogitRow::last_of_share(double share, Rank within) {
  const double sum = total(within), wanted = share * sum;
  // Tokens this far below the top have less than what is not wanted, all of them together.
  const double reach =
      std::log2(static_cast<double>(size_) / (sum - wanted)) / (16 * weighing_.slope);
  const auto lowest = static_cast<float>(double{top()} - reach);
  return last_of_sum(wanted, false, std::max(std::nextafter(lowest, -kInfinity), weighing_.cut));
}

// The first token up to which the sum is as wanted, or the last of all. It is not below `lowest`.
Rank LogitRow::last_of_sum(double wanted, bool count, float lowest) {
  for (const int64_t tokens : {kHead, blocks() / 2}) {
    if (tokens < 1 || tokens > blocks() || (count && static_cast<double>(tokens) < wanted))
      continue;
    std::vector<Rank>& ranks = head(tokens);
    double sum = 0;
    for (const Rank rank : ranks) sum += measure(rank, count);
    if (!ranks.empty() && sum >= wanted) return last_in_list(ranks, 0.0, wanted, count);
  }
  std::vector<double>& buckets = scratch_->buckets;
  buckets.assign(kBuckets + kLanes, 0.0);
  Weighing weighing = weighing_;
  weighing.cut = lowest;
  const float scale = std::min(static_cast<float>(kBuckets) / (top() - lowest), FLT_MAX);
  for (int64_t b = 0; b < blocks(); ++b)
    if (scratch_->maxima[static_cast<size_t>(b)] >= lowest)
      kernels_->sort_into_buckets(logits_ + b * kSampleBlock, length(b), weighing, scale, count,
                                  buckets.data());
  double before = 0;
  for (int32_t bucket = 0; bucket <= kBuckets; ++bucket) {
    const double sum = before + buckets[static_cast<size_t>(bucket)];
    if (sum >= wanted) {
      const auto up_to = [&](float place) {  // the least logit of the buckets up to there
        return least_float(top(), [&](float x) {
          return std::nearbyint(std::min((top() - x) * scale, float{kBuckets})) <= place;
        });
      };
      const auto place = static_cast<float>(bucket);
      const float high = bucket ? up_to(place - 1) : kInfinity;
      std::vector<Rank>& list = between(std::max(up_to(place), lowest), high, kAll);
      return last_in_list(list, before, wanted, count);
    }
    before = sum;
  }
  return last_of_all();
}

Rank LogitRow::last_in_list(std::vector<Rank>& list, double before, double wanted,
                            bool count) const {
  auto begin = list.begin(), end = list.end();
  if (!std::is_sorted(begin, end)) {  // as ties are
    while (end - begin > kFewRanks) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end);
      double sum = before;
      for (auto rank = begin; rank != middle; ++rank) sum += measure(*rank, count);
      if (sum >= wanted) {
        end = middle;
      } else {
        before = sum;
        begin = middle;
      }
    }
    std::sort(begin, end);
  }
  for (; begin != end; ++begin)
    if ((before += measure(*begin, count)) >= wanted) return *begin;
  return end[-1];
}

double LogitRow::sum_block(int64_t block, Rank last) const {
  const int64_t begin = block * kSampleBlock, end = begin + length(block);
  const float* x = logits_ + begin;
  Weighing from = weighing_, above = weighing_;  // of ids up to the last token's, and beyond
  from.cut = logit_of(last);
  above.cut = std::nextafter(from.cut, kInfinity);
  const int64_t middle = std::clamp(int64_t{id_of(last)} + 1, begin, end);
  double sum = 0;
  if (middle > begin) sum += kernels_->sum_weights(x, middle - begin, from);
  if (middle < end) sum += kernels_->sum_weights(x + middle - begin, end - middle, above);
  return sum;
}

double LogitRow::total(Rank last) {
  double sum = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    const bool any = scratch_->maxima[static_cast<size_t>(b)] >= logit_of(last);
    sum += scratch_->sums[static_cast<size_t>(b)] = any ? sum_block(b, last) : 0.0;
  }
  return sum;
}

int32_t LogitRow::draw(Rank last, double part) {
  const double target = part * total(last);
  double before = 0;
  int64_t block = -1;
  for (int64_t b = 0; b < blocks(); ++b) {
    const double sum = scratch_->sums[static_cast<size_t>(b)];
    if (sum == 0.0) continue;
    if (block >= 0) before += scratch_->sums[static_cast<size_t>(block)];
    block = b;
    if (before + sum > target) break;
  }
  int32_t token = 0;
  for (int64_t i = block * kSampleBlock; i < block * kSampleBlock + length(block); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (rank_of(logits_[i], id) > last) continue;
    token = id;
    if ((before += weight(logits_[i])) > target) break;
  }
  return token;
}

}  // namespace sartor
