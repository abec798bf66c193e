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
#include "kernels_impl.inc.hpp"

namespace sartor {
namespace amx {

constexpr int kTileRows = 16;

// Tiles 0 and 1 take sums [16][16] of int32, 2 the activations [16][32], 3 the codes of a chunk,
// eight quads of [16][4] bytes. The probe multiplies whole tiles: 4 and 5 into 0, 1, 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 32, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 8, 16, 16, 16, 16};
};

static double probe_tiles(int64_t iterations) {
  static const TileConfig config;
  alignas(64) uint8_t data[1024];
  std::memset(data, 1, sizeof data);
  _tile_loadconfig(&config);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbsud(0, 4, 5);
    _tile_dpbsud(1, 4, 5);
    _tile_dpbsud(6, 4, 5);
    _tile_dpbsud(7, 4, 5);
  }
  _tile_stored(0, data, 64);
  _tile_release();
  return static_cast<double>(iterations) * 4 * 16 * 16 * 64 * 2;
}

// One column block with its codes unpacked, [chunks][512] bytes, for one tile of rows. Without
// stored offsets the codes are signed, the zero point taken off: the tile product is then what the
// AVX-512 path gets by a correction.
template <bool kOffset>
static void amx_tile(const Matrix& w, int64_t block, const uint8_t* panel,
                     const TileChunk<kTileRows>* tile, int64_t count, int64_t row,
                     const LinearOutput& out) {
  const int64_t groups = w.k_padded / w.group;
  const uint16_t* block_scales = w.scales + block * groups * kLanes;
  const uint16_t* block_offsets = kOffset ? w.offsets + block * groups * kLanes : nullptr;
  alignas(64) int32_t sums[4][kTileRows * kLanes];
  F total[kTileRows];
  SARTOR_UNROLL
  for (int m = 0; m < kTileRows; ++m) total[m] = f_set(0.0f);
  // Two chunks ahead, so that nothing waits for a tile product or for its way through memory.
  const auto start = [&](int64_t c) {
    _tile_loadd(2, tile[c].codes, kChunk);
    _tile_loadd(3, panel + tile[c].chunk * 512, 64);
    if (c & 1) {
      _tile_zero(1);
      if constexpr (kOffset) _tile_dpbsud(1, 2, 3);
      else _tile_dpbssd(1, 2, 3);
      _tile_stored(1, sums[c & 3], 64);
    } else {
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
    const TileChunk<kTileRows>& a = tile[c];
    const int32_t* dots = sums[c & 3];
    const F s = f_load_fp16(block_scales + a.group * kLanes);
    const F o = kOffset ? f_load_fp16(block_offsets + a.group * kLanes) : s;
    SARTOR_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
      const I dot = {_mm512_load_si512(dots + m * kLanes)};
      total[m] = f_fma(f_from(dot), f_mul(s, f_set(a.scale[m])), total[m]);
      if constexpr (kOffset) total[m] = f_fma(o, f_set(a.sum[0][m]), total[m]);
    }
  }
  const F multiplier = f_set(w.scale_multiplier);
  for (int m = 0; m < kTileRows; ++m)
    store_columns(w, block, out, row + m, f_mul(total[m], multiplier));
}

// Unpacks the chunks that some row tile uses.
template <int kBits, bool kOffset>
static void unpack_panel(const Matrix& w, int64_t block, const uint8_t* used, uint8_t* panel) {
  constexpr int kBytes = 64 * kStoredBits<kBits>;
  for (int64_t c = 0; c < w.chunks(); ++c) {
    if (!used[c]) continue;
    Q bytes[8];
    unpack_codes<kBits>(w, w.codes + (block * w.chunks() + c) * kBytes, bytes);
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(w.zero));
    for (int i = 0; i < 8; ++i) {
      if constexpr (!kOffset) bytes[i].v = _mm512_sub_epi8(bytes[i].v, zero);
      _mm512_storeu_si512(panel + c * 512 + 64 * i, bytes[i].v);
    }
  }
}

template <int kBits, bool kOffset>
static void amx_rows(const Matrix& w, int64_t block_begin, int64_t block_end,
                     const int32_t* arranged, int64_t rows, const LinearOutput& out,
                     int32_t* scratch) {
  using Chunk = TileChunk<kTileRows>;
  const int64_t chunks = w.chunks(), stride = arranged_ints(w.k_padded) * kTileRows;
  auto* panel = reinterpret_cast<uint8_t*>(scratch);
  uint8_t* used = panel + chunks * 512;
  for (int64_t first = 0; first < rows; first += kTileRows * kAmxTiles) {
    const int64_t left = (rows - first) / kTileRows;
    const int64_t count = left < kAmxTiles ? left : kAmxTiles;
    const int32_t* tiles = arranged + first / kTileRows * stride;
    const auto chunks_of = [&](int64_t t) {
      return reinterpret_cast<const Chunk*>(tiles + t * stride + kTileHeader);
    };
    std::memset(used, 0, static_cast<size_t>(chunks));
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = 0; c < tiles[t * stride]; ++c) used[chunks_of(t)[c].chunk] = 1;
    for (int64_t block = block_begin; block < block_end; ++block) {
      unpack_panel<kBits, kOffset>(w, block, used, panel);
      for (int64_t t = 0; t < count; ++t)
        amx_tile<kOffset>(w, block, panel, chunks_of(t), tiles[t * stride], first + t * kTileRows,
                          out);
    }
  }
}

using AmxFunction = void (*)(const Matrix&, int64_t, int64_t, const int32_t*, int64_t,
                             const LinearOutput&, int32_t*);
#define SARTOR_BITS(bits) {amx_rows<bits, false>, amx_rows<bits, true>}
static const AmxFunction kAmxFunctions[9][2] = {SARTOR_BITS(0), {nullptr, nullptr}, SARTOR_BITS(2),
                                                SARTOR_BITS(3), SARTOR_BITS(4),     SARTOR_BITS(5),
                                                SARTOR_BITS(6), SARTOR_BITS(7),     SARTOR_BITS(8)};
#undef SARTOR_BITS

// Rows that go in whole tiles; the AVX-512 path takes the rest.
static int64_t whole_tiles(const Matrix& w, int64_t rows) {
  // A constant zero point with stored offsets would need both corrections, and bytes around a low
  // zero point do not fit a signed byte; no format has either.
  const bool both = w.has_offset && w.zero != 0;
  const bool fits = w.has_offset || w.bits < 8 || w.zero >= 128;
  return w.group == 16 || both || !fits ? 0 : rows / kTileRows * kTileRows;
}

static void arrange_tiles(const Matrix& w, const QuantizedRows& x, int64_t rows,
                          int32_t* arranged) {
  const int64_t whole = whole_tiles(w, rows), stride = arranged_ints(w.k_padded);
  for (int64_t row = 0; row < whole; row += kTileRows)
    arrange_tile<kTileRows>(w, x, row, arranged + row * stride);
  QuantizedRows rest = x;
  rest.codes += whole * x.stride;
  rest.scales += whole * (x.stride / kChunk);
  rest.half_sums += whole * (x.stride / 16);
  avx512_kernels()->arrange_rows(w, rest, rows - whole, arranged + whole * stride);
}

static void linear_int8_tiles(const Matrix& w, int64_t block_begin, int64_t block_end,
                              const int32_t* arranged, int64_t rows, const LinearOutput& out,
                              int32_t* scratch) {
  const int64_t whole = whole_tiles(w, rows);
  if (whole > 0) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const int bits = w.storage == Storage::kLookup ? 0 : w.bits;
    kAmxFunctions[bits][w.has_offset](w, block_begin, block_end, arranged, whole, out, scratch);
    _tile_release();
  }
  if (whole == rows) return;
  LinearOutput rest = out;
  rest.data += whole * out.stride;
  avx512_kernels()->linear_int8(w, block_begin, block_end,
                                arranged + whole * arranged_ints(w.k_padded), rows - whole, rest,
                                scratch);
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
    kernels.probe_int8 = amx::probe_tiles;
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
