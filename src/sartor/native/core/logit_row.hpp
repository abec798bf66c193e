// One row of logits, and what sampling asks of it without sorting it.
//
// Top-k, top-p and min-p each keep the first tokens of one order: likeliest first, ties to the
// lowest id. So a filter is the last token that it keeps, several filters are the first of those,
// and a draw needs no list of ids. Blocks whose maximum is too low are not looked at.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.hpp"

namespace sartor {

// A token's place in that order as one number: its logit turned round, then its id.
using Rank = uint64_t;
Rank rank_of(float logit, int32_t id);
float logit_of(Rank rank);
inline int32_t id_of(Rank rank) { return static_cast<int32_t>(rank); }

// Memory that the rows of one thread share, one after another.
struct RowScratch {
  std::vector<float> maxima, falling;  // of the blocks
  std::vector<double> sums, buckets;
  std::vector<Rank> ranks;
};

class LogitRow {
 public:
  LogitRow(const Kernels& kernels, const float* logits, int64_t size, RowScratch& scratch);

  float top() const { return weighing_.top; }
  int32_t argmax() const;
  // Ranks of the tokens with this logit or a higher one, by id; the next call overwrites them.
  std::vector<Rank>& at_least(float logit);

  // What follows is for rows whose top is finite.
  //
  // The weight of a token is exp((logit - top) / temperature), or 0 where that is too little to
  // change the sum of all.
  void set_temperature(float temperature);
  // The last token with a weight above 0; of the first
  // `count` tokens; with this weight or more; of the fewest first ones with this share of the
  // weight that there is up to `within`.
  Rank last_of_all() const;
  Rank last_of_count(int64_t count);
  Rank last_with_weight(double least) const;
  Rank last_of_share(double share, Rank within);
  // Sum of the weights up to `last`.
  double total(Rank last);
  // The token at which the weights up to `last`, added up by id, exceed this part of their total.
  int32_t draw(Rank last, double part);

 private:
  int64_t blocks() const { return static_cast<int64_t>(scratch_->maxima.size()); }
  int64_t length(int64_t block) const;
  double weight(float logit) const;
  double measure(Rank rank, bool count) const { return count ? 1.0 : weight(logit_of(rank)); }
  double sum_block(int64_t block, Rank last) const;
  // Ranks of the tokens with a logit in [low, high); not all of them where there are over `limit`.
  std::vector<Rank>& between(float low, float high, size_t limit);
  std::vector<Rank>& head(int64_t tokens);
  Rank last_of_sum(double wanted, bool count, float lowest);
  Rank last_in_list(std::vector<Rank>& list, double before, double wanted, bool count) const;

  const Kernels* kernels_;
  const float* logits_;
  int64_t size_;
  RowScratch* scratch_;
  Weighing weighing_;
};

// The least finite float for which `holds`, which is true of `high` and all between the two.
float least_float(float high, const std::function<bool(float)>& holds);

}  // namespace sartor
