// x86-64 with AMX int8 tiles on top of the AVX-512 path: many rows at a time.
//
// A chunk of 16 rows by 16 outputs is one tile product of exact integers; what follows is the
// arithmetic of the AVX-512 path, step by step, so the results are bitwise the same.
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SARTOR_ISA amx
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx512.hpp"
#define SARTOR_LINEAR_ONLY
#define SARTOR_PANELS_ONLY
#define SARTOR_TILE_ROWS 16
#include "kernels_impl.inc.hpp"

namespace sartor {
namespace amx {

constexpr int64_t kLeastRows = 8;  // so few rows are faster without tiles

// Tiles 0 and 1 take sums [16][16] of int32, 2 and 6 the activations [16][32], 3 and 7 the codes
// of a chunk, eight quads of [16][4] bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 32, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 8, 16, 16, 16, 8};
};

// Products of whole tiles, four apart; 16 cycles each.
template <bool kBf16>
static double probe_tiles(int64_t iterations, int64_t links) {
  struct alignas(64) WholeTiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  };
  static const WholeTiles whole;
  ProbeData<2048> data;
  if constexpr (kBf16) data.make_bf16();
  _tile_loadconfig(&whole);
  _tile_loadd(4, data.bytes, 64);
  _tile_loadd(5, data.bytes + 1024, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  uint64_t x = 3;
  for (int64_t n = 0; n < iterations; ++n) {
    if constexpr (kBf16) {
      asm volatile(
          "tdpbf16ps %tmm5, %tmm4, %tmm0\n\t"
          "tdpbf16ps %tmm5, %tmm4, %tmm1\n\t"
          "tdpbf16ps %tmm5, %tmm4, %tmm2\n\t"
          "tdpbf16ps %tmm5, %tmm4, %tmm3");
    } else {
      _tile_dpbsud(0, 4, 5);
      _tile_dpbsud(1, 4, 5);
      _tile_dpbsud(2, 4, 5);
      _tile_dpbsud(3, 4, 5);
    }
    chain(x, links);
  }
  _tile_release();
  return static_cast<double>(iterations) * 4 * 16 * 16 * (kBf16 ? 32 : 64) * 2;
}

// One panel of a column block for one tile of rows. Without stored offsets the codes are signed,
// the zero point taken off: the tile product is then what the AVX-512 path gets by a correction.
template <bool kOffset>
static void amx_tile(const Matrix& w, int64_t block, const TileEntry<kTileRows>* entry,
                     int64_t count, const uint8_t* codes, const NextPanel* next, int64_t column,
                     float* totals) {
  const BlockScales from = block_scales<kOffset>(w, block);
  alignas(64) int32_t sums[4][kTileRows * kLanes];
  F total[kTileRows];
  SARTOR_UNROLL
  for (int m = 0; m < kTileRows; ++m) total[m] = f_load(totals + m * kLanes);
  // Two chunks ahead, so that nothing waits for a tile product or for its way through memory.
  const auto start = [&](int64_t c) {
    const int64_t chunk = entry[c].chunk % kPanelChunks;
    const uint8_t* bytes = codes + chunk * 512;
    if (next) next->fetch(column, chunk);
    if (c & 1) {
      _tile_loadd(6, entry[c].codes, kChunk);
      _tile_loadd(7, bytes, 64);
      _tile_zero(1);
      if constexpr (kOffset) _tile_dpbsud(1, 6, 7);
      else _tile_dpbssd(1, 6, 7);
      _tile_stored(1, sums[c & 3], 64);
    } else {
      _tile_loadd(2, entry[c].codes, kChunk);
      _tile_loadd(3, bytes, 64);
      _tile_zero(0);
      if constexpr (kOffset) _tile_dpbsud(0, 2, 3);
      else _tile_dpbssd(0, 2, 3);
      _tile_stored(0, sums[c & 3], 64);
    }
  };
  for (int64_t c = 0; c < count && c < 2; ++c) start(c);
  SARTOR_NO_UNROLL
  for (int64_t c = 0; c < count; ++c) {
    if (c + 2 < count) start(c + 2);
    const TileEntry<kTileRows>& a = entry[c];
    const int32_t* dots = sums[c & 3];
    const F s = f_load_fp16(from.scales + a.group * kLanes);
    const F o = kOffset ? f_load_fp16(from.offsets + a.group * kLanes) : s;
    SARTOR_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
      const I dot = {_mm512_load_si512(dots + m * kLanes)};
      total[m] = f_fma(f_from(dot), f_mul(s, f_set(a.scale[m])), total[m]);
      if constexpr (kOffset) total[m] = f_fma(o, f_set(a.term[0][m].sum), total[m]);
    }
  }
  // Else gcc makes a memcpy of it, and keeps the totals in memory throughout.
  SARTOR_UNROLL
  for (int m = 0; m < kTileRows; ++m) f_store(totals + m * kLanes, total[m]);
}

template <bool kOffset>
static void amx_rows(const Matrix& w, int64_t block_begin, int64_t block_end, const ArrangedRows& x,
                     int64_t tiles, const LinearOutput& out, float* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  const Totals totals{scratch + kTileBlocks * kPanelBytes / 4, tiles * kTileRows};
  const int64_t rows = x.count < totals.rows ? x.count : totals.rows;
  each_panel<!kOffset>(w, block_begin, block_end, rows, totals, out, unpacked,
                       [&](int64_t panel, int64_t block, int64_t blocks, const uint8_t* codes,
                           const NextPanel& next) {
                         for (int64_t t = 0; t < tiles; ++t) {
                           const int32_t* tile = x.data + t * kTileRows * x.stride;
                           const auto* entries = entries_of<kTileRows>(w, tile) + tile[panel];
                           for (int64_t b = 0; b < blocks; ++b)
                             amx_tile<kOffset>(w, block + b, entries, tile[panel + 1] - tile[panel],
                                               codes + b * kPanelBytes, t == 0 ? &next : nullptr, b,
                                               totals.at(block - block_begin + b, t * kTileRows));
                         }
                       });
}

// Rows that go in tiles of 16; the AVX-512 path takes the rest.
static int64_t tiles_of(const Matrix& w, int64_t rows, const LinearVariant& variant) {
  // Bytes around a low zero point do not fit a signed byte; no format has one.
  const bool fits = w.has_offset || w.bits < 8 || w.zero >= 128;
  if (!variant.tiles || w.group == 16 || !fits) return 0;
  return rows / kTileRows + (rows % kTileRows > kLeastRows);
}

static void arrange_tiles(const Matrix& w, const QuantizedRows& x, const QuantizedRows* residual,
                          int64_t rows, Range part, const LinearVariant& variant,
                          int32_t* arranged) {
  const int64_t stride = arranged_ints(w.k_padded, residual != nullptr);
  const int64_t whole = tiles_of(w, rows, variant) * kTileRows;
  for (int64_t row = part.begin; row < part.end && row < whole; row += kTileRows)
    arrange_tile<kTileRows>(w, x, residual, row, rows - row, arranged + row * stride);
  const Range others = part.within({whole, rows});
  if (others.count() <= 0) return;
  const auto after = [&](QuantizedRows q) {
    q.codes += whole * q.stride;
    q.scales += whole * (q.stride / kChunk);
    q.half_sums += whole * (q.stride / 16);
    return q;
  };
  const QuantizedRows rest = after(x);
  QuantizedRows rest_residual;
  if (residual) rest_residual = after(*residual);
  avx512_kernels()->arrange_rows(w, rest, residual ? &rest_residual : nullptr, rows - whole,
                                 {others.begin - whole, others.end - whole}, variant,
                                 arranged + whole * stride);
}

static void linear_int8_tiles(const Matrix& w, int64_t block_begin, int64_t block_end,
                              const ArrangedRows& x, const LinearVariant& variant,
                              const LinearOutput& out, float* scratch) {
  const int64_t tiles = tiles_of(w, x.count, variant), whole = tiles * kTileRows;
  if (tiles > 0) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const auto run = w.has_offset ? amx_rows<true> : amx_rows<false>;
    run(w, block_begin, block_end, x, tiles, out, scratch);
    _tile_release();
  }
  if (whole >= x.count) return;
  LinearOutput rest = out;
  rest.data += whole * out.stride;
  avx512_kernels()->linear_int8(w, block_begin, block_end,
                                {x.data + whole * x.stride, x.stride, x.count - whole}, variant,
                                rest, scratch);
}

// The system grants a process the tile registers when it asks (Linux, arch_prctl(2)).
static bool permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace amx

const Kernels* amx_kernels() {
  static const bool usable = amx::permitted();
  static const Kernels table = [] {
    Kernels kernels = *avx512_kernels();
    kernels.name = "amx";
    kernels.arrange_rows = amx::arrange_tiles;
    kernels.attention = attention_tiles;
    kernels.linear_int8 = amx::linear_int8_tiles;
    kernels.linear.tiles = true;
    kernels.linear.tile_rows = amx::kTileRows;
    kernels.probe_int8 = amx::probe_tiles<false>;
    kernels.peak_widths.int8 = 2048;  // a tile product in 16 cycles
    kernels.probe_bf16 = amx::probe_tiles<true>;
    kernels.peak_widths.bf16 = 1024;
    return kernels;
  }();
  return usable ? &table : nullptr;
}
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace sartor
#endif
