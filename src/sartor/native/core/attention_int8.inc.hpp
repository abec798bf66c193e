// Attention over an int8 state: what the units that multiply its codes share.
//
// Queries become 16-bit whole numbers with a scale a row, weights too, with a scale a row and
// segment, so that all products with codes are exact integers, in whatever order and on whatever
// unit. Scales of keys are factors of the scores, those of values of the weights.

// The largest whole number: both bytes of it fit a sign (vec_planes.hpp).
constexpr float kWideLimit = 127.0f * 257.0f;
constexpr int64_t kLine = 64;  // numbers whose bytes of one plane are a cache line

class ByteRows {
 public:
  explicit ByteRows(const AttentionTask& t)
      : layout_(t.layout),
        plane_((t.layout.head_dim + kLine - 1) / kLine * kLine),
        queries_(reinterpret_cast<int8_t*>(t.scratch)),
        weights_(reinterpret_cast<int8_t*>(t.scratch + attention_queries(t.layout) +
                                           attention_sums(t.layout))) {}

  void load(const AttentionTask& t) {
    const float factor = score_factor(t);
    for (int64_t row = t.row_begin, r = 0; row < t.row_end; ++row, ++r) {
      const float* q = query_of(t, row);
      const auto part = [&](int64_t d) {
        const int64_t left = layout_.head_dim - d;
        return left >= kLanes ? f_load(q + d) : left > 0 ? load_part(q + d, left) : f_set(0.0f);
      };
      F top = f_set(0.0f), wrong = f_set(0.0f);
      for (int64_t d = 0; d < layout_.head_dim; d += kLanes) {
        top = f_max(top, f_abs(part(d)));
        wrong = f_fma(part(d), f_set(0.0f), wrong);  // not a number where one is not finite
      }
      const float highest = f_top(top);
      const F inverse = f_set(highest > 0.0f ? kWideLimit / highest : 0.0f);
      WideCount count;
      for (int64_t d = 0; d < plane_; d += kLine) {
        F x[4];
        for (int u = 0; u < 4; ++u) x[u] = f_mul(part(d + u * kLanes), inverse);
        wide_store(queries_ + 2 * r * plane_, plane_, d, x, kWideLimit, count);
      }
      query_scales_[r] = highest / kWideLimit * factor + f_sum(wrong);
      query_starts_[r] = -128 * count.total();
    }
  }

  // Scales of the segment's positions; zero where there are none.
  void begin(const AttentionTask& t, int64_t begin, const Segment& s) {
    const int64_t from = s.from / 32 * 32, to = (s.to + 31) / 32 * 32;
    const int64_t size = layout_.block_size;
    F wrong = f_set(0.0f);
    for (int64_t i = from; i < to; i += kLanes) {
      F of_keys = f_set(0.0f), of_values = f_set(0.0f);
      if (i + kLanes > s.from && i < s.to) {
        const uint8_t* scales = scales_of(t, begin + i) + i % size * kScaleBytes;
        of_keys = f_load_fp16(reinterpret_cast<const uint16_t*>(scales));
        of_values = f_load_fp16(reinterpret_cast<const uint16_t*>(scales + size * kScaleBytes));
      }
      f_store(key_scales_ + i, of_keys);
      f_store(value_scales_ + i, of_values);
      wrong = f_fma(of_values, f_set(0.0f), wrong);  // not a number where one is not finite
    }
    wrong_ = !(f_sum(wrong) == 0.0f);
    for (int64_t i = from; i < s.from; ++i) key_scales_[i] = value_scales_[i] = 0.0f;
    for (int64_t i = s.to; i < to; ++i) key_scales_[i] = value_scales_[i] = 0.0f;
    // Those of the next one: each is a line or two in a page of its own.
    const int64_t next = begin + kAttentionSegment, end = t.positions(t.row_end - 1).end;
    if (next >= t.segment_end * kAttentionSegment) return;
    for (int64_t i = next; i < next + kAttentionSegment && i < end; i += size)
      for (int64_t line = 0; line < 2 * size * kScaleBytes; line += 64)
        __builtin_prefetch(scales_of(t, i) + line);
  }

  void soften(const Segment& s, int64_t row, int64_t begin, int64_t end, float softcap,
              float* scores, float* row_top, float* row_total) {
    // Whole lines of weights, whatever the chunks.
    const int64_t first = s.from / kLine * kLine, last = (s.to + kLine - 1) / kLine * kLine;
    *row_top = -__builtin_inff();
    *row_total = 0.0f;
    const auto clear = [scores](int64_t from, int64_t to) {
      if (from < to) std::memset(scores + from, 0, static_cast<size_t>(to - from) * 4);
    };
    F top = f_set(0.0f);
    if (begin < end) {
      // By 32, at absolute positions: the total is a sum of the same lanes whatever is beside it.
      const int64_t from = begin / 32 * 32, to = (end + 31) / 32 * 32;
      *row_top = expose(from, to, begin, end, softcap, scores);
      const F highest = f_set(*row_top);
      F totals[2] = {f_set(0.0f), f_set(0.0f)}, tops[2] = {top, top};  // none waits for another
      for (int64_t i = from; i < to; i += 2 * kLanes) {
        SARTOR_UNROLL
        for (int u = 0; u < 2; ++u) {
          float* place = scores + i + u * kLanes;
          const F weight = f_exp2_short(f_sub(f_load(place), highest));
          const F scaled = f_mul(weight, f_load(value_scales_ + i + u * kLanes));
          totals[u] = f_add(totals[u], weight);
          tops[u] = f_max(tops[u], scaled);
          f_store(place, scaled);
        }
      }
      totals[0] = f_add(totals[0], totals[1]);
      // A scale that is not finite has to show: whole numbers would hide it.
      for (int64_t i = wrong_ ? from : to; i < to; i += kLanes)
        totals[0] = f_fma(f_load(scores + i), f_set(0.0f), totals[0]);
      *row_total = f_sum(totals[0]);
      top = f_max(tops[0], tops[1]);
      clear(first, from);
      clear(to, last);
    } else {
      clear(first, last);
    }
    const float highest = f_top(top);
    const F inverse = f_set(highest > 0.0f ? kWideLimit / highest : 0.0f);
    int8_t* weights = weights_of_row(row);
    WideCount count;
    for (int64_t i = first; i < last; i += kLine) {
      F x[4];
      SARTOR_UNROLL
      for (int u = 0; u < 4; ++u) x[u] = f_mul(f_load(scores + i + u * kLanes), inverse);
      wide_store(weights, kAttentionPlane, i, x, kWideLimit, count);
    }
    weight_scales_[row] = highest / kWideLimit;
    weight_starts_[row] = -128 * count.total();
  }

 protected:
  template <class Product>
  void take_queries(int64_t first, Product& p) const {
    p.rows = queries_ + 2 * first * plane_;
    p.row_stride = 2 * plane_;
    p.factors.plane = plane_;
    p.factors.starts = query_starts_ + first;
    p.factors.rows = query_scales_ + first;
  }
  template <class Product>
  void take_positions(int64_t at, Product& p) const {
    p.factors.lanes = key_scales_ + at;
  }
  template <class Product>
  void take_weights(const Segment& s, const float*, Product& p) const {
    p.rows = weights_ + s.chunk_begin() * layout_.chunk() / 4 * kWideBytes;
    p.row_stride = 2 * kAttentionPlane;
    p.factors = {kAttentionPlane, weight_starts_, weight_scales_, nullptr};
  }

  int8_t* weights_of_row(int64_t row) const { return weights_ + 2 * row * kAttentionPlane; }

  const KvLayout& layout_;
  int64_t plane_;    // bytes of a plane of one row's query
  int8_t* queries_;  // [rows of the task][2][plane_]
  int8_t* weights_;  // [rows at hand][2][kAttentionPlane]
  // By row; a tile may read those behind the last.
  float query_scales_[kAttentionTaskRows + kAttentionByteRows];
  float weight_scales_[kAttentionByteRows];
  // What sums begin with: codes are 128 more than they mean.
  int32_t query_starts_[kAttentionTaskRows + kAttentionByteRows];
  int32_t weight_starts_[kAttentionByteRows];
  bool wrong_ = false;  // the scale of a value is not finite
  alignas(64) float key_scales_[kAttentionSegment];
  alignas(64) float value_scales_[kAttentionSegment];

 private:
  const uint8_t* scales_of(const AttentionTask& t, int64_t position) const {
    return t.keys + t.block_table[position / layout_.block_size] * t.key_stride +
           layout_.scales_at();
  }
};
