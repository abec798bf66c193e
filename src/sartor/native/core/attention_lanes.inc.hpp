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
  const uint8_t* const* chunks;  // where each begins
  int64_t count, steps;          // steps of a chunk
  int64_t offset, run_bytes;     // from a chunk to the first run, from run to run
  int64_t runs;                  // that are left, some of which are multiplied now
  const uint8_t* after;          // what is read when none is left; null: behind those of now
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
    const uint8_t* next = c + 1 < p.count  ? p.chunks[c + 1] + p.offset
                          : !p.after       ? p.chunks[kRuns]
                          : p.runs > kRuns ? p.chunks[0] + p.offset + kRuns * p.run_bytes
                                           : p.after;
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
    LaneProduct<Element> p;
    p.count = 1;
    p.steps = layout_.key_steps();
    p.offset = 0;
    p.run_bytes = layout_.group_bytes();
    p.after = nullptr;
    p.rows = q;
    p.row_stride = q_stride;
    p.sum_stride = kScoreStride;
    // Groups side by side, as many as a block has.
    const int64_t wide = layout_.block_size / kLanes;
    for (int64_t g = s.group_begin(), count; g < s.group_end(); g += count) {
      const int64_t in_block = wide - g % wide, left = s.group_end() - g;
      p.chunks = s.groups + g;
      p.sums = out + g * kLanes;
      p.runs = in_block < left ? in_block : left;
      count = multiply(p, rows);
    }
  }

  void weigh(const Segment& s, int64_t rows, const float* scores, float* sums) {
    const int64_t chunk = layout_.chunk();
    LaneProduct<Element> p;
    p.chunks = s.chunks + s.chunk_begin();
    p.count = s.chunk_end() - s.chunk_begin();
    p.steps = chunk / Kv::kPack;
    p.run_bytes = layout_.run_bytes();
    p.after = s.after[0];
    p.rows = reinterpret_cast<const Element*>(scores) + s.chunk_begin() * chunk;
    p.row_stride = kScoreStride * 4 / static_cast<int64_t>(sizeof(Element));
    p.sum_stride = layout_.value_stride();
    const int64_t runs = layout_.value_stride() / kLanes;
    for (int64_t run = 0; run < runs; run += multiply(p, rows)) {
      p.offset = run * p.run_bytes;
      p.sums = sums + run * kLanes;
      p.runs = runs - run;
    }
  }

 private:
  // Multiplies some of the runs that are left and says how many.
  static int64_t multiply(const LaneProduct<Element>& p, int64_t rows) {
    return rows <= 1   ? multiply_rows<1>(p)
           : rows <= 2 ? multiply_rows<2>(p)
           : rows <= 3 ? multiply_rows<3>(p)
           : rows <= 4 ? multiply_rows<4>(p)
           : rows <= 6 ? multiply_rows<6>(p)
           : rows <= 8 ? multiply_rows<8>(p)
                       : multiply_rows<12>(p);
  }

  template <int kTile>
  static int64_t multiply_rows(const LaneProduct<Element>& p) {
    if constexpr (kTile <= kRows) {
      constexpr int kMost = kAttentionSums / kTile;
      constexpr int kWide = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
      if constexpr (kWide >= 4) {
        if (p.runs >= 4) return run<kTile, 4>(p);
      }
      if constexpr (kWide >= 2) {
        if (p.runs >= 2) return run<kTile, 2>(p);
      }
      return run<kTile, 1>(p);
    }
    return p.runs;  // there are no such tiles
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
