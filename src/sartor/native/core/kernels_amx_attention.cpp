// Attention with AMX tiles, over a bf16 or an int8 state.
//
// A bf16 product adds up to 32 pairs of features, or of positions, to each sum in an order of its
// own. So every row of this path goes through tiles, that of a decoding sequence too. Over an int8
// state sums are exact integers; tiles are faster than vectors for a single row, too.
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
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

  // Some lines of each. Inline always: gcc 12 drops calls that do nothing but prefetch.
  template <int kLines>
  SARTOR_INLINE void fetch(int64_t line) const {
    for (const uint8_t* place : places)
      for (int64_t i = 0; i < kLines; ++i) __builtin_prefetch(place + 64 * (line + i));
  }
};

// Adds the product of tiles kRows and kPlaces to tile kSum: bf16 pairs, or signed bytes of rows by
// unsigned ones. A macro, as the instructions take numbers of tiles as they are written.
#define SARTOR_TILE_DOT(sum, rows, places)               \
  if constexpr (kBytes) _tile_dpbsud(sum, rows, places); \
  else _tile_dpbf16ps(sum, rows, places)

// Rows of queries or weights as they lie in memory, both ways in bytes: from row to row, and from
// one tile product to the next one of the same sums.
struct TileRows {
  const void* first;
  int64_t count, stride, step;
};

// sums[rows][runs * 16] = the products of `count` tiles of rows with those that at(run, i) names.
template <bool kBytes, int kRuns, class At>
static inline void multiply_few(const TileRows& rows, int64_t count, const At& at, float* sums,
                                int64_t sum_stride) {
  const auto* first = static_cast<const uint8_t*>(rows.first);
  _tile_zero(0);
  if constexpr (kRuns > 1) _tile_zero(1);
  if constexpr (kRuns > 2) _tile_zero(2);
  if constexpr (kRuns > 3) _tile_zero(3);
  for (int64_t i = 0; i < count; ++i) {
    _tile_loadd(4, first + i * rows.step, rows.stride);
    _tile_loadd(6, at(0, i), 64);
    SARTOR_TILE_DOT(0, 4, 6);
    if constexpr (kRuns > 1) {
      _tile_loadd(7, at(1, i), 64);
      SARTOR_TILE_DOT(1, 4, 7);
    }
    if constexpr (kRuns > 2) {
      _tile_loadd(6, at(2, i), 64);
      SARTOR_TILE_DOT(2, 4, 6);
    }
    if constexpr (kRuns > 3) {
      _tile_loadd(7, at(3, i), 64);
      SARTOR_TILE_DOT(3, 4, 7);
    }
  }
  _tile_stored(0, sums, sum_stride * 4);
  if constexpr (kRuns > 1) _tile_stored(1, sums + kLanes, sum_stride * 4);
  if constexpr (kRuns > 2) _tile_stored(2, sums + 2 * kLanes, sum_stride * 4);
  if constexpr (kRuns > 3) _tile_stored(3, sums + 3 * kLanes, sum_stride * 4);
}

// As above, for more rows than a tile has.
template <bool kBytes, int kRuns, class At>
static inline void multiply_many(const TileRows& rows, int64_t count, const At& at, float* sums,
                                 int64_t sum_stride) {
  const auto* first = static_cast<const uint8_t*>(rows.first);
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kRuns > 1) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i) {
    _tile_loadd(4, first + i * rows.step, rows.stride);
    _tile_loadd(5, first + i * rows.step + kHalf * rows.stride, rows.stride);
    _tile_loadd(6, at(0, i), 64);
    SARTOR_TILE_DOT(0, 4, 6);
    SARTOR_TILE_DOT(2, 5, 6);
    if constexpr (kRuns > 1) {
      _tile_loadd(7, at(1, i), 64);
      SARTOR_TILE_DOT(1, 4, 7);
      SARTOR_TILE_DOT(3, 5, 7);
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

// Values of a segment by chunks of `words` fours of bytes; from run to run, run_bytes.
struct Chunks {
  const uint8_t* const* first;
  int64_t count, words, run_bytes;
  const uint8_t* const* after;  // kAhead places that are read when all of it has been
  // The i-th chunk, or the last.
  const uint8_t* place(int64_t i) const { return first[i < count ? i : count - 1]; }
};

static Chunks chunks_of(const Segment& s) {
  return {s.chunks + s.chunk_begin(), s.chunk_end() - s.chunk_begin(),
          s.layout->chunk() / s.layout->pack(), s.layout->run_bytes(), s.after};
}

// The products of some rows with the keys, and with the values, of a segment. A place to put sums,
// Sums, has from(run), where those of a run begin; `stride`, from row to row; done(run, count),
// which is told what is there; and finish().
template <bool kBytes>
class Tiles {
 public:
  explicit Tiles(const KvLayout& layout) : layout_(layout), key_words_(kHalf) {
    while (layout.key_steps() % key_words_ != 0) --key_words_;
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Of each row what a product takes lies together.
  template <class Sums>
  void keys(const Segment& s, const void* rows, int64_t count, int64_t stride, Sums& sums) {
    const int64_t step = key_words_ * 64, end = s.group_end();
    const TileRows run{rows, count, stride, key_words_ * 4};
    for (int64_t g = s.group_begin(), done; g < end; g += done) {
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
        ahead.template fetch<4>((i * of + u) * (key_words_ / kAhead));
        return s.groups[g + u] + i * step;
      };
      done = multiply(run, key_words_, layout_.key_steps() / key_words_, end - g, at, g, sums);
    }
    sums.finish();
  }

  template <class Sums>
  void values(const Chunks& v, const void* rows, int64_t count, int64_t stride, Sums& sums) {
    if (v.words == 16) values<16>(v, rows, count, stride, sums);
    else if (v.words == 8) values<8>(v, rows, count, stride, sums);
    else values<4>(v, rows, count, stride, sums);
  }

 private:
  template <int kWords, class Sums>
  void values(const Chunks& v, const void* rows, int64_t count, int64_t stride, Sums& sums) {
    const int64_t chunks = v.count;
    const int64_t runs = layout_.value_stride() / kLanes, bytes = v.run_bytes;
    const TileRows run{rows, count, stride, kWords * 4};
    for (int64_t r = 0, done; r < runs; r += done) {
      Ahead ahead;
      const auto look_ahead = [&](int64_t next, int64_t of) {
        for (int64_t p = 0; p < kAhead; ++p, ++next)
          ahead.places[p] = next < chunks   ? v.place(next) + r * bytes
                            : r + of < runs ? v.place(next - chunks) + (r + of) * bytes
                                            : v.after[next % kAhead];
      };
      const auto at = [&](int64_t of, int64_t u, int64_t i) {
        // Of the next four chunks, while these four are multiplied.
        if (i % kAhead == 0 && u == 0) look_ahead(i + kAhead, of);
        const int64_t turn = i % kAhead * of + u;
        ahead.template fetch<kWords / 4>(turn / kAhead * bytes / 64 + turn % kAhead * (kWords / 4));
        return v.first[i] + (r + u) * bytes;
      };
      done = multiply(run, kWords, chunks, runs - r, at, r, sums);
    }
    sums.finish();
  }

  // Multiplies some of the runs that are left and says how many.
  template <class At, class Sums>
  int64_t multiply(const TileRows& rows, int64_t words, int64_t count, int64_t left, const At& at,
                   int64_t first, Sums& sums) {
    configure(rows.count, words);
    const auto few = [&]<int kRuns>(std::integral_constant<int, kRuns>) -> int64_t {
      multiply_few<kBytes, kRuns>(
          rows, count, [&](int64_t u, int64_t i) { return at(kRuns, u, i); }, sums.from(first),
          sums.stride);
      return kRuns;
    };
    const auto many = [&]<int kRuns>(std::integral_constant<int, kRuns>) -> int64_t {
      multiply_many<kBytes, kRuns>(
          rows, count, [&](int64_t u, int64_t i) { return at(kRuns, u, i); }, sums.from(first),
          sums.stride);
      return kRuns;
    };
    int64_t done;
    if (rows.count > kHalf)
      done = left > 1 ? many(std::integral_constant<int, 2>{})
                      : many(std::integral_constant<int, 1>{});
    else
      done = left > 3   ? few(std::integral_constant<int, 4>{})
             : left > 1 ? few(std::integral_constant<int, 2>{})
                        : few(std::integral_constant<int, 1>{});
    sums.done(first, done);
    return done;
  }

  // `words` of four bytes a row.
  void configure(int64_t rows, int64_t words) {
    if (rows == rows_ && words == words_) return;
    rows_ = rows;
    words_ = words;
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
    set(4, first, words * 4);
    set(5, second, words * 4);
    set(6, words, 64);
    set(7, words, 64);
    _tile_loadconfig(&config);
  }

  const KvLayout& layout_;
  int64_t key_words_, rows_ = 0, words_ = 0;
};

class Bf16Tiles : public FloatRows<uint16_t> {
 public:
  static constexpr int64_t kRows = 2 * kHalf;

  explicit Bf16Tiles(const AttentionTask& t) : FloatRows(t), tiles_(t.layout) {}

  void scores(const Segment& s, int64_t first, int64_t rows, float* out) {
    Sums sums{out, kScoreStride};
    tiles_.keys(s, queries_ + first * q_stride_, rows, 2 * q_stride_, sums);
  }

  void weigh(const Segment& s, int64_t rows, const float* scores, float* out) {
    Sums sums{out, layout_.value_stride()};
    const auto* weights = reinterpret_cast<const uint16_t*>(scores);
    tiles_.values(chunks_of(s), weights + s.chunk_begin() * layout_.chunk(), rows, 4 * kScoreStride,
                  sums);
  }

 private:
  struct Sums {
    float* first;
    int64_t stride;
    float* from(int64_t run) const { return first + run * kLanes; }
    void done(int64_t, int64_t) const {}
    void finish() const {}
  };

  Tiles<false> tiles_;
};

// A row is two rows of a tile: its high bytes and its low ones.
class ByteTiles : public ByteRows {
 public:
  static constexpr int64_t kRows = kHalf;
  static_assert(kRows <= kAttentionByteRows && kWideBytes == 4);

  explicit ByteTiles(const AttentionTask& t)
      : ByteRows(t),
        values_(reinterpret_cast<uint8_t*>(t.scratch + attention_values_at(t.layout))),
        gathered_(t.row_end - t.row_begin > kRows && t.layout.chunk() < kLine),
        tiles_(t.layout) {}

  // A chunk of fewer than 64 positions fills a part of a tile, whose product takes as long: where
  // many rows share the values, those of a segment are put together first.
  void begin(const AttentionTask& t, int64_t begin, const Segment& s) {
    ByteRows::begin(t, begin, s);
    if (!gathered_) return;
    const int64_t bytes = layout_.chunk_bytes(), runs = layout_.value_stride() / kLanes;
    for (int64_t c = s.chunk_begin(); c < s.chunk_end(); ++c)
      for (int64_t r = 0; r < runs; ++r)
        std::memcpy(values_ + r * kLines * kTileBytes + c * bytes,
                    s.chunks[c] + r * layout_.run_bytes(), static_cast<size_t>(bytes));
  }

  void scores(const Segment& s, int64_t first, int64_t rows, float* out) {
    Sums sums(rows, query_starts_ + first, query_scales_ + first, key_scales_, out, kScoreStride);
    tiles_.keys(s, queries_ + 2 * first * plane_, 2 * rows, plane_, sums);
  }

  void weigh(const Segment& s, int64_t rows, const float*, float* out) {
    Sums sums(rows, weight_starts_, weight_scales_, nullptr, out, layout_.value_stride());
    if (!gathered_) {
      const int8_t* weights = weights_ + s.chunk_begin() * layout_.chunk();
      tiles_.values(chunks_of(s), weights, 2 * rows, kAttentionPlane, sums);
      return;
    }
    const int64_t begin = s.from / kLine, end = (s.to + kLine - 1) / kLine;
    const uint8_t* places[kLines];
    for (int64_t i = begin; i < end; ++i) places[i] = values_ + i * kTileBytes;
    const Chunks whole{places + begin, end - begin, kLine / 4, kLines * kTileBytes, s.after};
    tiles_.values(whole, weights_ + begin * kLine, 2 * rows, kAttentionPlane, sums);
  }

 private:
  // Takes whole numbers, which stay in the nearest cache, and leaves what they stand for: of some
  // runs while the next are multiplied.
  class Sums {
   public:
    Sums(int64_t rows, const int32_t* starts, const float* scales, const float* lanes, float* out,
         int64_t out_stride)
        : stride((rows > kHalf / 2 ? 2 : 4) * kLanes),
          rows_(rows),
          starts_(starts),
          scales_(scales),
          lanes_(lanes),
          out_(out),
          out_stride_(out_stride) {}

    const int64_t stride;

    float* from(int64_t) { return whole_[turn_]; }
    void done(int64_t first, int64_t count) {
      finish();
      first_ = first;
      count_ = count;
      turn_ ^= 1;
    }
    void finish() {
      if (count_ == 4) finish_runs<4>();
      else if (count_ == 2) finish_runs<2>();
      else if (count_ == 1) finish_runs<1>();
      count_ = 0;
    }

   private:
    template <int kRuns>
    void finish_runs() const {
      if (lanes_) finish_runs<kRuns, true>();
      else finish_runs<kRuns, false>();
    }
    // As wide_total() and KvInt8 have it.
    template <int kRuns, bool kLaneScales>
    void finish_runs() const {
      const float* high = whole_[turn_ ^ 1];
      float* out = out_ + first_ * kLanes;
      const int64_t step = stride, out_stride = out_stride_;
      F lanes[kRuns];
      for (int u = 0; u < kRuns && kLaneScales; ++u)
        lanes[u] = f_load(lanes_ + (first_ + u) * kLanes);
      for (int64_t r = 0; r < rows_; ++r, high += 2 * step, out += out_stride) {
        const __m512i start = _mm512_set1_epi32(starts_[r]);
        const F scale = f_set(scales_[r]);
        SARTOR_UNROLL
        for (int u = 0; u < kRuns; ++u) {
          const __m512i low = _mm512_load_si512(high + step + u * kLanes);
          const __m512i sum =
              _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high + u * kLanes), 8),
                               _mm512_add_epi32(start, low));
          F total = f_mul(f_from({sum}), scale);
          if constexpr (kLaneScales) total = f_mul(total, lanes[u]);
          f_store(out + u * kLanes, total);
        }
      }
    }

    const int64_t rows_;
    const int32_t* starts_;
    const float *scales_, *lanes_;
    float* out_;
    const int64_t out_stride_;
    int64_t first_ = 0, count_ = 0;
    int turn_ = 0;
    alignas(64) float whole_[2][2 * kHalf * 2 * kLanes];
  };

  static constexpr int64_t kLines = kAttentionSegment / kLine, kTileBytes = kLine * kLanes;

  uint8_t* values_;  // [runs][kLines][kTileBytes]
  bool gathered_;
  Tiles<true> tiles_;
};

}  // namespace amx_attention

void attention_tiles(const AttentionTask& t) {
  using namespace amx_attention;
  if (t.layout.storage == Storage::kBf16) attend<Bf16Tiles>(t);
  else if (t.layout.storage == Storage::kInt8) attend<ByteTiles>(t);
  else avx512_kernels()->attention(t);
}

}  // namespace sartor
#endif
