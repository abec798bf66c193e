// The products of attention with vectors: 16 positions, or 16 features, are lanes.

// How the state's elements meet those of queries and weights: a step of 16 lanes at a time.
struct KvFp32 {
  using Element = float;
  static constexpr int kPack = 1, kBytes = 64;
  struct Step {
    F x;
  };
  static inline Step load(const uint8_t* p) { return {f_load(reinterpret_cast<const float*>(p))}; }
  static inline F dot(F sum, Step s, const float* y) { return f_fma(s.x, f_set(y[0]), sum); }
};

struct KvFp16 : KvFp32 {
  static constexpr int kBytes = 32;
  static inline Step load(const uint8_t* p) {
    return {f_load_fp16(reinterpret_cast<const uint16_t*>(p))};
  }
};

// Pairs, multiplied as float32.
struct KvBf16 {
  using Element = float;
  static constexpr int kPack = 2, kBytes = 64;
  struct Step {
    F even, odd;
  };
  static inline Step load(const uint8_t* p) { return {f_load_even_bf16(p), f_load_odd_bf16(p)}; }
  static inline F dot(F sum, Step s, const float* y) {
    return f_fma(s.odd, f_set(y[1]), f_fma(s.even, f_set(y[0]), sum));
  }
};

// sums[r][u] = rows[r] times the steps of run u, over all chunks in order.
template <class Element>
struct LaneProduct {
  const uint8_t* const* chunks;  // where each begins, and after the last what is read next
  int64_t count, steps;          // steps of a chunk
  bool runs_are_chunks;          // a chunk a run, and one for each run: what is next lies beyond
  int64_t offset, run_bytes;     // from a chunk to the first run, from run to run
  const Element* rows;
  int64_t row_stride;
  float* sums;  // [rows][sum_stride]
  int64_t sum_stride;
};

template <class Kv, int kRows, int kRuns>
static inline void multiply_lanes(const LaneProduct<typename Kv::Element>& p) {
  constexpr int64_t kStep = Kv::kBytes;
  F sum[kRows][kRuns];
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) sum[r][u] = f_set(0.0f);
  const auto* y = p.rows;
  for (int64_t c = 0; c < p.count; ++c) {
    const uint8_t* x = p.chunks[c] + p.offset;
    const uint8_t* next = p.chunks[c + (p.runs_are_chunks ? kRuns : 1)] + p.offset;
    SARTOR_NO_UNROLL
    for (int64_t s = 0; s < p.steps; ++s, x += kStep, next += kStep, y += Kv::kPack) {
      typename Kv::Step step[kRuns];
      SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u) {
        step[u] = Kv::load(x + u * p.run_bytes);
        // Few rows wait for memory.
        if constexpr (kRows <= 8) __builtin_prefetch(next + u * p.run_bytes);
      }
      SARTOR_UNROLL
      for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u) sum[r][u] = Kv::dot(sum[r][u], step[u], y + r * p.row_stride);
    }
  }
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) f_store(p.sums + r * p.sum_stride + kLanes * u, sum[r][u]);
}

template <class Kv>
class Lanes {
 public:
  using Element = typename Kv::Element;
  static constexpr int64_t kRows = kAttentionRows;

  explicit Lanes(const KvLayout& layout) : layout_(layout) {}

  void scores(const Segment& s, int64_t rows, const Element* q, int64_t q_stride, float* out) {
    LaneProduct<Element> p{nullptr,  1,   layout_.key_steps(), true, 0, layout_.group_bytes(), q,
                           q_stride, out, kScoreStride};
    // Groups side by side, as many as a block has.
    const int64_t wide = layout_.block_size / kLanes;
    for (int64_t g = s.group_begin(), count; g < s.group_end(); g += count) {
      p.chunks = s.groups + g;
      p.sums = out + g * kLanes;
      const int64_t in_block = wide - g % wide, left = s.group_end() - g;
      count = multiply(p, rows, in_block < left ? in_block : left);
    }
  }

  void weigh(const Segment& s, int64_t rows, const float* scores, float* sums) {
    constexpr int64_t kStride = kScoreStride * 4 / static_cast<int64_t>(sizeof(Element));
    const auto* weights = reinterpret_cast<const Element*>(scores);
    const int64_t begin = s.chunk_begin(), chunk = layout_.chunk();
    LaneProduct<Element> p{s.chunks + begin,
                           s.chunk_end() - begin,
                           chunk / Kv::kPack,
                           false,
                           0,
                           layout_.run_bytes(),
                           weights + begin * chunk,
                           kStride,
                           sums,
                           layout_.value_stride()};
    for (int64_t run = 0, count; run < layout_.value_stride() / kLanes; run += count) {
      p.offset = run * layout_.run_bytes();
      p.sums = sums + run * kLanes;
      count = multiply(p, rows, layout_.value_stride() / kLanes - run);
    }
  }

 private:
  // Multiplies some of the `left` runs and says how many.
  static int64_t multiply(const LaneProduct<Element>& p, int64_t rows, int64_t left) {
    return rows <= 1   ? multiply_rows<1>(p, left)
           : rows <= 2 ? multiply_rows<2>(p, left)
           : rows <= 3 ? multiply_rows<3>(p, left)
           : rows <= 4 ? multiply_rows<4>(p, left)
           : rows <= 6 ? multiply_rows<6>(p, left)
           : rows <= 8 ? multiply_rows<8>(p, left)
                       : multiply_rows<12>(p, left);
  }

  template <int kTile>
  static int64_t multiply_rows(const LaneProduct<Element>& p, int64_t left) {
    if constexpr (kTile <= kRows) {
      constexpr int kMost = kAttentionSums / kTile;
      constexpr int kWide = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
      if constexpr (kWide >= 4) {
        if (left >= 4) return run<kTile, 4>(p);
      }
      if constexpr (kWide >= 2) {
        if (left >= 2) return run<kTile, 2>(p);
      }
      return run<kTile, 1>(p);
    }
    return left;  // there are no such tiles
  }

  template <int kTile, int kRuns>
  static int64_t run(const LaneProduct<Element>& p) {
    multiply_lanes<Kv, kTile, kRuns>(p);
    return kRuns;
  }

  const KvLayout& layout_;
};

static void attention(const AttentionTask& t) {
  switch (t.layout.storage) {
    case Storage::kFp32:
      return attend<Lanes<KvFp32>>(t);
    case Storage::kFp16:
      return attend<Lanes<KvFp16>>(t);
    default:
      return attend<Lanes<KvBf16>>(t);
  }
}
