// Attention over a bf16 state with AMX tiles.
//
// A tile product adds up to 32 pairs of features, or of positions, to each sum in an order of its
// own. So every row of this path goes through tiles, that of a decoding sequence too.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>

#define SARTOR_ISA amx_attention
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx512.hpp"
#define SARTOR_ATTENTION_ONLY
#include "kernels_impl.inc.hpp"

namespace sartor {
namespace amx_attention {

constexpr int64_t kHalf = 16;  // rows of one tile, half of those that are taken at a time

// Tiles 0 to 3 take sums, 4 and 5 rows (of queries or weights), 6 and 7 keys or values.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Places to be read next. A core reads pages side by side faster than one after another, and one
// after another no faster for being asked early.
struct Ahead {
  const uint8_t* places[kAhead];

  // Four lines of each. Inline always: gcc 12 drops calls that do nothing but prefetch.
  SARTOR_INLINE void fetch(int64_t line) const {
    for (const uint8_t* place : places)
      for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(place + 64 * (line + i));
  }
};

// sums[rows][runs * 16] = the products of `count` tiles of rows with those that at(run, i) names.
template <int kRuns, class At>
static inline void multiply_few(const uint8_t* rows, int64_t row_stride, int64_t row_step,
                                int64_t count, const At& at, float* sums, int64_t sum_stride) {
  _tile_zero(0);
  if constexpr (kRuns > 1) _tile_zero(1);
  if constexpr (kRuns > 2) _tile_zero(2);
  if constexpr (kRuns > 3) _tile_zero(3);
  for (int64_t i = 0; i < count; ++i) {
    _tile_loadd(4, rows + i * row_step, row_stride);
    _tile_loadd(6, at(0, i), 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRuns > 1) {
      _tile_loadd(7, at(1, i), 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRuns > 2) {
      _tile_loadd(6, at(2, i), 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kRuns > 3) {
      _tile_loadd(7, at(3, i), 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, sum_stride * 4);
  if constexpr (kRuns > 1) _tile_stored(1, sums + kLanes, sum_stride * 4);
  if constexpr (kRuns > 2) _tile_stored(2, sums + 2 * kLanes, sum_stride * 4);
  if constexpr (kRuns > 3) _tile_stored(3, sums + 3 * kLanes, sum_stride * 4);
}

// As above, for more rows than a tile has.
template <int kRuns, class At>
static inline void multiply_many(const uint8_t* rows, int64_t row_stride, int64_t row_step,
                                 int64_t count, const At& at, float* sums, int64_t sum_stride) {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kRuns > 1) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i) {
    _tile_loadd(4, rows + i * row_step, row_stride);
    _tile_loadd(5, rows + i * row_step + kHalf * row_stride, row_stride);
    _tile_loadd(6, at(0, i), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRuns > 1) {
      _tile_loadd(7, at(1, i), 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  float* second = sums + kHalf * sum_stride;
  _tile_stored(0, sums, sum_stride * 4);
  _tile_stored(2, second, sum_stride * 4);
  if constexpr (kRuns > 1) {
    _tile_stored(1, sums + kLanes, sum_stride * 4);
    _tile_stored(3, second + kLanes, sum_stride * 4);
  }
}

class Tiles {
 public:
  using Element = uint16_t;
  static constexpr int64_t kRows = 2 * kHalf;

  explicit Tiles(const KvLayout& layout) : layout_(layout), key_pairs_(kHalf) {
    while (layout.key_steps() % key_pairs_ != 0) --key_pairs_;
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  void scores(const Segment& s, int64_t rows, const uint16_t* q, int64_t q_stride, float* out) {
    const int64_t step = key_pairs_ * 64, end = s.group_end();
    const Run run{rows, key_pairs_, layout_.key_steps() / key_pairs_, q, q_stride, 2 * key_pairs_};
    for (int64_t g = s.group_begin(), count; g < end; g += count) {
      Ahead ahead;
      const auto look_ahead = [&](int64_t of) {
        for (int64_t p = 0; p < kAhead; ++p) {
          const int64_t next = g + of + p % of;
          ahead.places[p] = (next < end ? s.groups[next] : s.chunk_after(next - end)) +
                            p / of * (layout_.group_bytes() / kAhead * of);
        }
      };
      const auto at = [&](int64_t of, int64_t u, int64_t i) {
        if (i == 0 && u == 0) look_ahead(of);
        ahead.fetch((i * of + u) * (key_pairs_ / kAhead));
        return s.groups[g + u] + i * step;
      };
      count = multiply(run, end - g, at, out + g * kLanes, kScoreStride);
    }
  }

  void weigh(const Segment& s, int64_t rows, const float* scores, float* sums) {
    const int64_t begin = s.chunk_begin(), chunk = layout_.chunk();
    const auto* weights = reinterpret_cast<const uint16_t*>(scores) + begin * chunk;
    const int64_t runs = layout_.value_stride() / kLanes, bytes = layout_.run_bytes();
    const Run run{rows, chunk / 2, s.chunk_end() - begin, weights, 2 * kScoreStride, chunk};
    for (int64_t r = 0, count; r < runs; r += count) {
      Ahead ahead;
      const auto look_ahead = [&](int64_t next, int64_t of) {
        for (int64_t p = 0; p < kAhead; ++p, ++next)
          ahead.places[p] = next < run.count ? s.chunk_after(next) + r * bytes
                            : r + of < runs  ? s.chunk_after(next - run.count) + (r + of) * bytes
                                             : s.after[next % kAhead];
      };
      const auto at = [&](int64_t of, int64_t u, int64_t i) {
        // Of the next four chunks, while these four are multiplied.
        if (i % kAhead == 0 && u == 0) look_ahead(i + kAhead, of);
        const int64_t turn = i % kAhead * of + u;
        ahead.fetch(turn / kAhead * bytes / 64 + turn % kAhead * (chunk / 8));
        return s.chunks[begin + i] + (r + u) * bytes;
      };
      count = multiply(run, runs - r, at, sums + r * kLanes, layout_.value_stride());
    }
  }

 private:
  // `count` products of tiles of `pairs`; a row's elements are `step` apart.
  struct Run {
    int64_t rows, pairs, count;
    const uint16_t* elements;
    int64_t stride, step;
  };

  // Multiplies some of the runs that are left and says how many.
  template <class At>
  int64_t multiply(const Run& run, int64_t left, const At& at, float* sums, int64_t stride) {
    configure(run.rows, run.pairs);
    const auto* rows = reinterpret_cast<const uint8_t*>(run.elements);
    const auto few = [&]<int kRuns>(std::integral_constant<int, kRuns>) {
      multiply_few<kRuns>(
          rows, run.stride * 2, run.step * 2, run.count,
          [&](int64_t u, int64_t i) { return at(kRuns, u, i); }, sums, stride);
      return kRuns;
    };
    const auto many = [&]<int kRuns>(std::integral_constant<int, kRuns>) {
      multiply_many<kRuns>(
          rows, run.stride * 2, run.step * 2, run.count,
          [&](int64_t u, int64_t i) { return at(kRuns, u, i); }, sums, stride);
      return kRuns;
    };
    if (run.rows > kHalf)
      return left > 1 ? many(std::integral_constant<int, 2>{})
                      : many(std::integral_constant<int, 1>{});
    return left > 3   ? few(std::integral_constant<int, 4>{})
           : left > 1 ? few(std::integral_constant<int, 2>{})
                      : few(std::integral_constant<int, 1>{});
  }

  void configure(int64_t rows, int64_t pairs) {
    if (rows == rows_ && pairs == pairs_) return;
    rows_ = rows;
    pairs_ = pairs;
    const int64_t first = rows < kHalf ? rows : kHalf;
    const int64_t second = rows > kHalf ? rows - kHalf : 0;
    TileConfig config;
    const auto set = [&config](int tile, int64_t count, int64_t bytes) {
      config.rows[tile] = static_cast<uint8_t>(count);
      config.row_bytes[tile] = static_cast<uint16_t>(count ? bytes : 0);
    };
    set(0, first, 64);
    set(1, first, 64);
    set(2, second ? second : first, 64);
    set(3, second ? second : first, 64);
    set(4, first, pairs * 4);
    set(5, second, pairs * 4);
    set(6, pairs, 64);
    set(7, pairs, 64);
    _tile_loadconfig(&config);
  }

  const KvLayout& layout_;
  int64_t key_pairs_, rows_ = 0, pairs_ = 0;
};

}  // namespace amx_attention

void attention_tiles(const AttentionTask& t) {
  if (t.layout.storage == Storage::kBf16) amx_attention::attend<amx_attention::Tiles>(t);
  else avx512_kernels()->attention(t);
}

}  // namespace sartor
#endif
