// The products of attention with vectors: 16 positions, or 16 features, are lanes.

// How the state's elements meet those of queries and weights: a step of 16 lanes at a time.
// `Factors` is what else a product of rows needs: nothing, for floating point.
struct NoFactors {};

struct KvFp32 {
  using Rows = FloatRows<float>;
  using Element = float;
  using Factors = NoFactors;
  using Sum = F;
  static constexpr int kPack = 1, kBytes = 64, kSums = 1, kRows = kAttentionRows;
  static constexpr bool kSideBySide = false;
  struct Step {
    F x;
  };
  static inline F start(const Factors&, int64_t) { return f_set(0.0f); }
  static inline F total(const Factors&, F sum, int64_t, int64_t) { return sum; }
  static inline Step load(const uint8_t* p) { return {f_load(reinterpret_cast<const float*>(p))}; }
  static inline F dot(const Factors&, F sum, Step s, const float* y) {
    return f_fma(s.x, f_set(y[0]), sum);
  }
};

struct KvFp16 : KvFp32 {
  static constexpr int kBytes = 32;
  static inline Step load(const uint8_t* p) {
    return {f_load_fp16(reinterpret_cast<const uint16_t*>(p))};
  }
};

// Pairs, multiplied as float32.
struct KvBf16 : KvFp32 {
  static constexpr int kPack = 2;
  struct Step {
    F even, odd;
  };
  static inline Step load(const uint8_t* p) { return {f_load_even_bf16(p), f_load_odd_bf16(p)}; }
  static inline F dot(const Factors&, F sum, Step s, const float* y) {
    return f_fma(s.odd, f_set(y[1]), f_fma(s.even, f_set(y[0]), sum));
  }
};

// Codes times 16-bit whole numbers (vec_planes.hpp).
struct KvInt8 {
  using Rows = ByteRows;
  using Element = int8_t;
  struct Factors {
    int64_t plane;          // bytes of it
    const int32_t* starts;  // by row
    const float* rows;      // by row
    const float* lanes;     // by lane of a run and by run, or null
  };
  using Sum = WideSum;
  using Step = WideStep;
  static constexpr int kPack = kWideBytes, kBytes = 64, kSums = kWideSums;
  static constexpr bool kSideBySide = true;
  static constexpr int kRows = kAttentionRows;
  static inline Sum start(const Factors& f, int64_t row) { return wide_start(f.starts[row]); }
  static inline F total(const Factors& f, Sum sum, int64_t row, int64_t run) {
    const F scaled = f_mul(wide_total(sum), f_set(f.rows[row]));
    return f.lanes ? f_mul(scaled, f_load(f.lanes + run * kLanes)) : scaled;
  }
  static inline Step load(const uint8_t* p) { return wide_load(p); }
  static inline Sum dot(const Factors& f, Sum sum, Step s, const int8_t* y) {
    return wide_dot(sum, s, y, f.plane);
  }
};

// sums[r][u] = rows[r] times the steps of run u, over all chunks in order.
template <class Kv>
struct LaneProduct {
  const uint8_t* const* chunks;  // where each begins
  int64_t count, steps;          // steps of a chunk
  int64_t offset, run_bytes;     // from a chunk to the first run, from run to run
  int64_t runs;                  // that are left, some of which are multiplied now
  int64_t before;                // chunks of this kind that have been read
  // Groups that are read when none is left; null: they follow the chunks.
  const uint8_t* const* after;
  int64_t after_step;  // groups that lie where one chunk does
  const typename Kv::Element* rows;
  int64_t row_stride;
  float* sums;  // [rows][sum_stride]
  int64_t sum_stride;
  typename Kv::Factors factors;
};

// What is read next, a unit being what a product takes of a chunk. A core reads pages side by side
// faster than one after another, so the next four are fetched while four are multiplied, a quarter
// of each at a time (kSideBySide). Where a unit is a page by itself, as in bf16, that gains
// nothing.
template <class Kv, int kRuns>
class Fetcher {
 public:
  Fetcher(const LaneProduct<Kv>& p, int64_t chunk) {
    static_assert(kRuns <= kMostRuns && kRuns <= kAhead);
    if constexpr (!Kv::kSideBySide) {
      for (int u = 0; u < kRuns; ++u) next_[u] = place(p, chunk + 1) + u * p.run_bytes;
      return;
    }
    const int64_t turn = (p.before / kRuns + chunk) % kAhead, runs = turn * kRuns;  // in quarters
    const int64_t quarter =
        runs / kAhead * p.run_bytes + runs % kAhead * (p.steps * Kv::kBytes / kAhead);
    SARTOR_UNROLL
    for (int64_t i = 0; i < kAhead; ++i) next_[i] = place(p, chunk - turn + kAhead + i) + quarter;
  }
  // As much as one step reads.
  SARTOR_INLINE void fetch() {
    const uint8_t* turned[kAhead];
    SARTOR_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const bool now = i < kRuns;
      if (now) __builtin_prefetch(next_[i]);
      turned[Kv::kSideBySide ? (i + kAhead - kRuns) % kAhead : i] =
          next_[i] + (now ? Kv::kBytes : 0);
    }
    SARTOR_UNROLL
    for (int i = 0; i < kAhead; ++i) next_[i] = turned[i];
  }

 private:
  static const uint8_t* place(const LaneProduct<Kv>& p, int64_t unit) {
    const int64_t over = unit - p.count;
    if (!p.after) return p.chunks[unit * kRuns];
    if (over < 0) return p.chunks[unit] + p.offset;
    if (p.runs > kRuns)
      return p.chunks[over < p.count ? over : p.count - 1] + p.offset + kRuns * p.run_bytes;
    return p.after[over * p.after_step % (2 * kAhead)];
  }

  const uint8_t* next_[kAhead] = {};
};

template <class Kv, int kRows, int kRuns>
static inline void multiply_lanes(const LaneProduct<Kv>& p) {
  constexpr int64_t kStep = Kv::kBytes;
  typename Kv::Sum sum[kRows][kRuns];
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) sum[r][u] = Kv::start(p.factors, r);
  const auto* y = p.rows;
  for (int64_t c = 0; c < p.count; ++c) {
    const uint8_t* x = p.chunks[c] + p.offset;
    Fetcher<Kv, kRuns> fetcher(p, c);
    SARTOR_NO_UNROLL
    for (int64_t s = 0; s < p.steps; ++s, x += kStep, y += Kv::kPack) {
      typename Kv::Step step[kRuns];
      SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u) step[u] = Kv::load(x + u * p.run_bytes);
      fetcher.fetch();  // few rows wait for memory; many lose nothing by it
      SARTOR_UNROLL
      for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u)
        sum[r][u] = Kv::dot(p.factors, sum[r][u], step[u], y + r * p.row_stride);
    }
  }
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u)
    f_store(p.sums + r * p.sum_stride + kLanes * u, Kv::total(p.factors, sum[r][u], r, u));
}

// Multiplies some of the runs that are left and says how many.
template <class Kv, int kTile>
static int64_t multiply_rows(const LaneProduct<Kv>& p) {
  if constexpr (kTile <= Kv::kRows) {
    constexpr int kMost = kAttentionSums / (kTile * Kv::kSums);
    constexpr int kWide = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
    const auto run = [&p]<int kRuns>(std::integral_constant<int, kRuns>) -> int64_t {
      multiply_lanes<Kv, kTile, kRuns>(p);
      return kRuns;
    };
    if constexpr (kWide >= 4) {
      if (p.runs >= 4) return run(std::integral_constant<int, 4>{});
    }
    if constexpr (kWide >= 2) {
      if (p.runs >= 2) return run(std::integral_constant<int, 2>{});
    }
    return run(std::integral_constant<int, 1>{});
  }
  return p.runs;  // there are no such tiles
}

template <class Kv>
static int64_t multiply(const LaneProduct<Kv>& p, int64_t rows) {
  return rows <= 1   ? multiply_rows<Kv, 1>(p)
         : rows <= 2 ? multiply_rows<Kv, 2>(p)
         : rows <= 3 ? multiply_rows<Kv, 3>(p)
         : rows <= 4 ? multiply_rows<Kv, 4>(p)
         : rows <= 6 ? multiply_rows<Kv, 6>(p)
         : rows <= 8 ? multiply_rows<Kv, 8>(p)
                     : multiply_rows<Kv, 12>(p);
}

template <class Kv>
class Lanes : public Kv::Rows {
 public:
  static constexpr int64_t kRows = Kv::kRows;

  using Kv::Rows::Rows;

  void scores(const Segment& s, int64_t first, int64_t rows, float* out) {
    LaneProduct<Kv> p;
    p.count = 1;
    p.steps = this->layout_.key_steps();
    p.offset = 0;
    p.run_bytes = this->layout_.group_bytes();
    p.after = nullptr;
    p.sum_stride = kScoreStride;
    this->take_queries(first, p);
    // Groups side by side, as many as a block has.
    const int64_t wide = this->layout_.block_size / kLanes;
    for (int64_t g = s.group_begin(), count; g < s.group_end(); g += count) {
      const int64_t in_block = wide - g % wide, left = s.group_end() - g;
      p.chunks = s.groups + g;
      p.before = g - s.group_begin();
      p.sums = out + g * kLanes;
      p.runs = in_block < left ? in_block : left;
      this->take_positions(g * kLanes, p);
      count = multiply(p, rows);
    }
  }

  void weigh(const Segment& s, int64_t rows, const float* scores, float* sums) {
    LaneProduct<Kv> p;
    p.chunks = s.chunks + s.chunk_begin();
    p.count = s.chunk_end() - s.chunk_begin();
    p.steps = this->layout_.chunk_bytes() / Kv::kBytes;
    p.run_bytes = this->layout_.run_bytes();
    p.before = 0;
    p.after = s.after;
    p.after_step = this->layout_.chunk() / kLanes;
    p.sum_stride = this->layout_.value_stride();
    this->take_weights(s, scores, p);
    const int64_t runs = this->layout_.value_stride() / kLanes;
    for (int64_t run = 0; run < runs; run += multiply(p, rows)) {
      p.offset = run * p.run_bytes;
      p.sums = sums + run * kLanes;
      p.runs = runs - run;
    }
  }
};

static void attention(const AttentionTask& t) {
  switch (t.layout.storage) {
    case Storage::kFp32:
      return attend<Lanes<KvFp32>>(t);
    case Storage::kFp16:
      return attend<Lanes<KvFp16>>(t);
    case Storage::kInt8:
      return attend<Lanes<KvInt8>>(t);
    default:
      return attend<Lanes<KvBf16>>(t);
  }
}
