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
// eight quads of [16][4] bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 8};
};

static inline void multiply(const TileChunk<kTileRows>& a, const Q (&bytes)[8], int32_t* sums) {
  alignas(64) uint8_t codes[512];
  for (int i = 0; i < 8; ++i) _mm512_store_si512(codes + 64 * i, bytes[i].v);
  _tile_loadd(2, a.codes, kChunk);
  _tile_loadd(3, codes, 64);
  _tile_zero(0);
  _tile_dpbsud(0, 2, 3);
  _tile_stored(0, sums, 64);
}

template <int kBits, bool kOffset>
static void amx_tile(const Matrix& w, int64_t block, const TileChunk<kTileRows>* tile,
                     int64_t count, int64_t row, const LinearOutput& out) {
  constexpr int kBytes = 64 * kStoredBits<kBits>;
  const int64_t groups = w.k_padded / w.group;
  const uint8_t* block_codes = w.codes + block * w.chunks() * kBytes;
  const uint16_t* block_scales = w.scales + block * groups * kLanes;
  const uint16_t* block_offsets = kOffset ? w.offsets + block * groups * kLanes : nullptr;
  alignas(64) int32_t sums[2][kTileRows * kLanes];
  F total[kTileRows];
  SARTOR_UNROLL
  for (int m = 0; m < kTileRows; ++m) total[m] = f_set(0.0f);
  // One chunk ahead: the tile product of the next runs beside the scaling of this one.
  const auto start = [&](int64_t c) {
    Q bytes[8];
    unpack_codes<kBits>(w, block_codes + tile[c].chunk * kBytes, bytes);
    multiply(tile[c], bytes, sums[c % 2]);
  };
  if (count > 0) start(0);
  SARTOR_NO_UNROLL
  for (int64_t c = 0; c < count; ++c) {
    if (c + 1 < count) start(c + 1);
    const TileChunk<kTileRows>& a = tile[c];
    const int32_t* dots = sums[c % 2];
    const F s = f_load_fp16(block_scales + a.group * kLanes);
    const F o = kOffset ? f_load_fp16(block_offsets + a.group * kLanes) : s;
    SARTOR_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
      const I dot = {_mm512_add_epi32(_mm512_load_si512(dots + m * kLanes),
                                      _mm512_set1_epi32(a.correction[0][m]))};
      total[m] = f_fma(f_from(dot), f_mul(s, f_set(a.scale[m])), total[m]);
      if constexpr (kOffset) total[m] = f_fma(o, f_set(a.sum[0][m]), total[m]);
    }
  }
  const F multiplier = f_set(w.scale_multiplier);
  for (int m = 0; m < kTileRows; ++m)
    store_columns(w, block, out, row + m, f_mul(total[m], multiplier));
}

template <int kBits, bool kOffset>
static void amx_rows(const Matrix& w, int64_t block_begin, int64_t block_end,
                     const QuantizedRows& x, int64_t rows, const LinearOutput& out,
                     int32_t* scratch) {
  auto* tile = reinterpret_cast<TileChunk<kTileRows>*>(scratch);
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = gather_tile<false>(w, x, row, tile);
    for (int64_t block = block_begin; block < block_end; ++block)
      amx_tile<kBits, kOffset>(w, block, tile, count, row, out);
  }
}

using AmxFunction = void (*)(const Matrix&, int64_t, int64_t, const QuantizedRows&, int64_t,
                             const LinearOutput&, int32_t*);
#define SARTOR_BITS(bits) {amx_rows<bits, false>, amx_rows<bits, true>}
static const AmxFunction kAmxFunctions[9][2] = {SARTOR_BITS(0), {nullptr, nullptr}, SARTOR_BITS(2),
                                                SARTOR_BITS(3), SARTOR_BITS(4),     SARTOR_BITS(5),
                                                SARTOR_BITS(6), SARTOR_BITS(7),     SARTOR_BITS(8)};
#undef SARTOR_BITS

static void linear_int8_tiles(const Matrix& w, int64_t block_begin, int64_t block_end,
                              const QuantizedRows& x, int64_t rows, const LinearOutput& out,
                              int32_t* scratch) {
  const int64_t whole = w.group == 16 ? 0 : rows / kTileRows * kTileRows;
  if (whole > 0) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const int bits = w.storage == Storage::kLookup ? 0 : w.bits;
    kAmxFunctions[bits][w.has_offset](w, block_begin, block_end, x, whole, out, scratch);
    _tile_release();
  }
  if (whole == rows) return;
  QuantizedRows rest = x;
  rest.codes += whole * x.stride;
  rest.scales += whole * (x.stride / kChunk);
  rest.half_sums += whole * (x.stride / 16);
  LinearOutput rest_out = out;
  rest_out.data += whole * out.stride;
  avx512_kernels()->linear_int8(w, block_begin, block_end, rest, rows - whole, rest_out, scratch);
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
    kernels.linear_int8 = amx::linear_int8_tiles;
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
