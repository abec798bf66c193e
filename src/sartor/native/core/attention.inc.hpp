// Attention of one kv head over paged keys and values, for rows of one sequence.
//
// Positions are taken in segments of 512: scores of a whole segment, their softmax, the weighted
// sum of its values. Segments are combined in order (online softmax, arXiv:1805.02867). So the
// arithmetic of a row depends on its position alone, not on the rows beside it, nor on how its
// prompt was chunked, nor on who computes which segment.
//
// A Unit does the two products: `Lanes` with vectors (attention_lanes.inc.hpp), or with tiles.
//   kRows                            most rows at a time
//   load(t)                          the queries of a task
//   begin(t, begin, s)               a segment, whose positions count from `begin`
//   scores(s, first, rows, scores)   dot products of some rows with its keys
//   soften(s, row, begin, end, softcap, scores, top, total)   softmax of the scores of one of them
//   weigh(s, rows, scores, sums)     sums over its values, [rows][value_stride]
// `FloatRows` has what those share whose queries and weights are floating point, `ByteRows`
// (attention_int8.inc.hpp) what those over an int8 state do.
//
// Exponents have base 2: scores carry log2(e).

constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kAhead = 4;     // places that are read side by side
constexpr int64_t kMostRuns = 4;  // groups, or runs of values, that are multiplied at a time
constexpr int64_t kScoreStride = kAttentionSegment + kLanes;  // floats; off the powers of two

// A segment as rows read it; positions are relative to its begin.
struct Segment {
  const KvLayout* layout;
  // Keys by groups of 16 positions, and what is read behind them; values by chunks of `chunk`
  // positions (of the first run).
  const uint8_t* groups[kAttentionSegment / 16 + 2 * kAhead * kMostRuns];
  const uint8_t* chunks[kAttentionSegment / 16];
  const uint8_t* after[2 * kAhead];  // the groups that are read when all of it has been
  int64_t from, to;                  // positions that the rows at hand see

  int64_t group_begin() const { return from / kLanes; }
  int64_t group_end() const { return (to + kLanes - 1) / kLanes; }
  int64_t chunk_begin() const { return from / layout->chunk(); }
  int64_t chunk_end() const { return (to + layout->chunk() - 1) / layout->chunk(); }
  // The i-th chunk, or the last.
  const uint8_t* chunk_after(int64_t i) const {
    const int64_t c = chunk_begin() + i, last = chunk_end() - 1;
    return chunks[c < last ? c : last];
  }
};

#if !defined(SARTOR_HAS_EXP2)
// 2^x to about 1e-7 relative; 0 below -126.
static inline F f_exp2(F x) {
  const F clipped = f_max(f_min(x, f_set(127.0f)), f_set(-126.0f));
  const F n = f_round(clipped);
  const F r = f_mul(f_sub(clipped, n), f_set(0.69314718055994531f));
  F p = f_set(1.9875691500e-4f);  // Cephes expf
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_add(f_fma(f_mul(p, r), r, r), f_set(1.0f));
  return f_where_less(x, f_set(-126.0f), f_set(0.0f), f_mul(p, f_exp2i(i_from(n))));
}
static inline F f_exp2_short(F x) { return f_exp2(x); }
#endif

static inline float exp2_one(float x) {
  float out[16];
  f_store(out, f_exp2(f_set(x)));
  return out[0];
}

// A record: `stride` sums, the highest score, the total of the weights.
static inline void clear_record(float* record, int64_t stride) {
  std::memset(record, 0, static_cast<size_t>(stride + kLanes) * 4);
  record[stride] = -__builtin_inff();
}

// record += part; both are of the same row, the part of a later segment.
static inline void merge(float* record, const float* sums, float part_top, float part_total,
                         int64_t stride) {
  if (!(part_top > -__builtin_inff())) return;  // the row sees nothing of it
  if (!(record[stride] > -__builtin_inff())) {
    std::memcpy(record, sums, static_cast<size_t>(stride) * 4);
    record[stride] = part_top;
    record[stride + 1] = part_total;
    return;
  }
  const float top = part_top > record[stride] ? part_top : record[stride];
  const float old_keep = exp2_one(record[stride] - top), keep = exp2_one(part_top - top);
  const F a = f_set(old_keep), b = f_set(keep);
  for (int64_t i = 0; i < stride; i += kLanes)
    f_store(record + i, f_fma(f_load(sums + i), b, f_mul(f_load(record + i), a)));
  record[stride] = top;
  record[stride + 1] = record[stride + 1] * old_keep + part_total * keep;
}

static inline void finish_row(const AttentionTask& t, int64_t row, const float* record) {
  const int64_t stride = t.layout.value_stride();
  const int64_t token = row / t.group, head = t.kv_head * t.group + row % t.group;
  float keep = 1.0f, total = record[stride + 1];
  if (t.sinks) {
    const float sink = t.sinks[head] * kLog2E;
    const float top = sink > record[stride] ? sink : record[stride];
    keep = exp2_one(record[stride] - top);
    total = total * keep + exp2_one(sink - top);
  }
  scale(record, keep / total, t.layout.value_dim,
        t.out + token * t.out_stride + head * t.layout.value_dim);
}

// Of 32 scores those in [begin, end) stay, the others get -inf.
static inline void hide(float* scores, int64_t begin, int64_t end) {
  const F none = f_set(-__builtin_inff());
  for (int64_t i = 0; i < 32; i += kLanes) {
    const F index = f_add(f_load(kIndex), f_set(static_cast<float>(i)));
    const F s = f_where_less(index, f_set(static_cast<float>(end)), f_load(scores + i), none);
    f_store(scores + i, f_where_less(index, f_set(static_cast<float>(begin)), none, s));
  }
}

static inline void store_elements(float* out, F x) { f_store(out, x); }

// 32 weights; their total goes on by lanes.
static inline void weights_of(const float* scores, F top, float* out, F& total) {
  const F first = f_exp2(f_sub(f_load(scores), top));
  const F second = f_exp2(f_sub(f_load(scores + kLanes), top));
  f_store(out, first);
  f_store(out + kLanes, second);
  total = f_add(f_add(total, first), second);
}

// Scores of positions [from, to), which are multiples of 32, as exponents, -inf outside of
// [begin, end); the highest of them.
static inline float expose(int64_t from, int64_t to, int64_t begin, int64_t end, float softcap,
                           float* scores) {
  if (softcap > 0.0f) {
    const F cap = f_set(softcap), out = f_set(softcap * kLog2E);
    for (int64_t i = from; i < to; i += kLanes)
      f_store(scores + i, f_mul(f_tanh(f_div(f_load(scores + i), cap)), out));
  }
  if (begin > from) hide(scores + from, begin - from, 32);
  if (end < to) hide(scores + to - 32, 0, end - to + 32);
  F top[2] = {f_load(scores + from), f_load(scores + from + kLanes)};
  for (int64_t i = from + 32; i < to; i += 32) {
    top[0] = f_max(top[0], f_load(scores + i));
    top[1] = f_max(top[1], f_load(scores + i + kLanes));
  }
  return f_top(f_max(top[0], top[1]));
}

// Scores of positions [begin, end) become weights where they stand, zero up to the chunks' ends.
template <class Element>
static inline void soften_floats(const Segment& s, int64_t begin, int64_t end, float softcap,
                                 float* scores, float* row_top, float* row_total) {
  auto* weights = reinterpret_cast<Element*>(scores);
  const auto clear = [weights](int64_t from, int64_t to) {
    if (from < to) std::memset(weights + from, 0, static_cast<size_t>(to - from) * sizeof(Element));
  };
  const int64_t chunk = s.layout->chunk();
  const int64_t first = s.chunk_begin() * chunk, last = s.chunk_end() * chunk;
  if (begin >= end) {
    clear(first, last);
    *row_top = -__builtin_inff();
    *row_total = 0.0f;
    return;
  }
  // By 32, at absolute positions: the total is a sum of the same lanes whatever is beside it.
  const int64_t from = begin / 32 * 32, to = (end + 31) / 32 * 32;
  const float highest = expose(from, to, begin, end, softcap, scores);
  F total = f_set(0.0f);
  for (int64_t i = from; i < to; i += 32)
    weights_of(scores + i, f_set(highest), weights + i, total);
  clear(first, from);
  clear(to, last);
  *row_top = highest;
  *row_total = f_sum(total);
}

// The query of a row.
static inline const float* query_of(const AttentionTask& t, int64_t row) {
  return t.q + row / t.group * t.q_stride +
         (t.kv_head * t.group + row % t.group) * t.layout.head_dim;
}
static inline float score_factor(const AttentionTask& t) {
  return t.softcap > 0.0f ? t.scale : t.scale * kLog2E;
}

// Rows as elements, scaled: [rows][q_stride], an odd feature with a zero beside it.
template <class Element>
static inline void load_queries(const AttentionTask& t, int64_t q_stride, Element* out) {
  const float factor = score_factor(t);
  for (int64_t row = t.row_begin; row < t.row_end; ++row, out += q_stride) {
    const float* q = query_of(t, row);
    if (q_stride > t.layout.head_dim) out[q_stride - 1] = 0;
    int64_t d = 0;
    for (; d + kLanes <= t.layout.head_dim; d += kLanes)
      store_elements(out + d, f_mul(f_load(q + d), f_set(factor)));
    if (const int64_t left = t.layout.head_dim - d; left > 0) {
      Element part[kLanes];
      store_elements(part, f_mul(load_part(q + d, left), f_set(factor)));
      std::memcpy(out + d, part, static_cast<size_t>(left) * sizeof part[0]);
    }
  }
}

// Queries and weights as elements: float, or bf16 in uint16_t.
template <class E>
class FloatRows {
 public:
  using Element = E;

  explicit FloatRows(const AttentionTask& t)
      : layout_(t.layout),
        queries_(reinterpret_cast<Element*>(t.scratch)),
        q_stride_(t.layout.key_steps() * t.layout.pack()) {}

  void load(const AttentionTask& t) { load_queries(t, q_stride_, queries_); }
  void begin(const AttentionTask&, int64_t, const Segment&) {}
  void soften(const Segment& s, int64_t, int64_t begin, int64_t end, float softcap, float* scores,
              float* top, float* total) {
    soften_floats<Element>(s, begin, end, softcap, scores, top, total);
  }

 protected:
  // What a product takes: the rows from `first` on, the positions from `at` on, the weights that
  // scores have become.
  template <class Product>
  void take_queries(int64_t first, Product& p) const {
    p.rows = queries_ + first * q_stride_;
    p.row_stride = q_stride_;
  }
  template <class Product>
  void take_positions(int64_t, Product&) const {}
  template <class Product>
  void take_weights(const Segment& s, const float* scores, Product& p) const {
    p.rows = reinterpret_cast<const Element*>(scores) + s.chunk_begin() * layout_.chunk();
    p.row_stride = kScoreStride * 4 / static_cast<int64_t>(sizeof(Element));
  }

  const KvLayout& layout_;
  Element* queries_;
  int64_t q_stride_;
};

// Where runs of `count` positions lie, from `begin` on, each `bytes` behind the one before in its
// block.
static inline void find_runs(const AttentionTask& t, const uint8_t* pages, int64_t stride,
                             int64_t begin, int64_t count, int64_t bytes, int64_t runs,
                             const uint8_t** found) {
  const int64_t in_block = t.layout.block_size / count;
  int64_t block = begin / t.layout.block_size, run = begin % t.layout.block_size / count;
  for (int64_t i = 0; i < runs; ++i) {
    found[i] = pages + t.block_table[block] * stride + run * bytes;
    if (++run == in_block) {
      run = 0;
      ++block;
    }
  }
}

// Where positions [from, to) of a segment lie, and what is read next.
static inline void find_segment(const AttentionTask& t, int64_t begin, Segment& s) {
  const int64_t groups = s.group_begin(), chunks = s.chunk_begin(), chunk = t.layout.chunk();
  find_runs(t, t.keys, t.key_stride, begin + groups * kLanes, kLanes, t.layout.group_bytes(),
            s.group_end() - groups, s.groups + groups);
  find_runs(t, t.values, t.value_stride, begin + chunks * chunk, chunk, t.layout.chunk_bytes(),
            s.chunk_end() - chunks, s.chunks + chunks);
  // Behind the last keys come the first values.
  const int64_t size = t.layout.block_size / kLanes, wide = size < kMostRuns ? size : kMostRuns;
  const int64_t in_chunk = chunk / kLanes, last = s.chunk_end() - 1;
  for (int64_t i = 0, c = chunks; i < 2 * kAhead * wide; ++c)
    for (int64_t g = 0; g < in_chunk; ++g, ++i)
      s.groups[s.group_end() + i] = s.chunks[c < last ? c : last] + g * t.layout.group_bytes();
  // Behind these the keys of the next segment, or of the next kv head, which lie beside ours.
  const bool more = begin / kAttentionSegment + 1 < t.segment_end;
  const int64_t next = more ? begin + kAttentionSegment : t.segment_begin * kAttentionSegment;
  const int64_t seen = t.positions(t.row_begin).begin / kLanes * kLanes;
  const int64_t first = next < seen ? seen : next;
  const int64_t left = (t.positions(t.row_end - 1).end - first + kLanes - 1) / kLanes;
  const int64_t ahead = left < 2 * kAhead ? left : 2 * kAhead;
  find_runs(t, more ? t.keys : t.keys + t.layout.key_bytes(), t.key_stride, first, kLanes,
            t.layout.group_bytes(), ahead, s.after);
  for (int64_t i = ahead; i < 2 * kAhead; ++i) s.after[i] = s.after[0];
}

template <class Unit>
static void attend(const AttentionTask& t) {
  const int64_t rows = t.row_end - t.row_begin, stride = t.layout.value_stride();
  const int64_t record = attention_record(t.layout);
  float* records = t.scratch + attention_queries(t.layout);
  float* scores = records + kAttentionTaskRows * record;
  float* sums = scores + kAttentionTile * kScoreStride;
  Range seen[kAttentionTaskRows];
  for (int64_t r = 0; r < rows; ++r) seen[r] = t.positions(t.row_begin + r);
  Unit unit(t);
  unit.load(t);
  const auto clear = [&] {
    for (int64_t r = 0; r < rows; ++r) clear_record(records + r * record, stride);
  };
  clear();
  for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
    const Range whole{segment * kAttentionSegment, (segment + 1) * kAttentionSegment};
    if (t.parts) {
      records = t.parts + (segment - t.segment_begin) * rows * record;
      clear();
    }
    Segment s;
    s.layout = &t.layout;
    const auto narrow_to = [&](int64_t first, int64_t last) {
      s.from = seen[first].within(whole).begin - whole.begin;
      s.to = seen[last].within(whole).end - whole.begin;
      return s.from < s.to;
    };
    if (!narrow_to(0, rows - 1)) continue;
    find_segment(t, whole.begin, s);
    unit.begin(t, whole.begin, s);
    for (int64_t first = 0; first < rows; first += Unit::kRows) {
      const int64_t count = rows - first < Unit::kRows ? rows - first : Unit::kRows;
      if (!narrow_to(first, first + count - 1)) continue;
      unit.scores(s, first, count, scores);
      float tops[Unit::kRows], totals[Unit::kRows];
      for (int64_t r = 0; r < count; ++r) {
        const Range in = seen[first + r].within(whole);
        unit.soften(s, r, in.begin - whole.begin, in.end - whole.begin, t.softcap,
                    scores + r * kScoreStride, tops + r, totals + r);
      }
      unit.weigh(s, count, scores, sums);
      for (int64_t r = 0; r < count; ++r)
        merge(records + (first + r) * record, sums + r * stride, tops[r], totals[r], stride);
    }
  }
  if (!t.parts)
    for (int64_t r = 0; r < rows; ++r) finish_row(t, t.row_begin + r, records + r * record);
}

static void attention_merge(const AttentionTask& t) {
  const int64_t rows = t.row_end - t.row_begin, stride = t.layout.value_stride();
  const int64_t record = attention_record(t.layout);
  for (int64_t r = 0; r < rows; ++r) {
    clear_record(t.scratch, stride);
    for (int64_t segment = 0; segment < t.segment_end - t.segment_begin; ++segment) {
      const float* part = t.parts + (segment * rows + r) * record;
      merge(t.scratch, part, part[stride], part[stride + 1], stride);
    }
    finish_row(t, t.row_begin + r, t.scratch);
  }
}
