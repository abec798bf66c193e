// Sixteen lanes as one 512-bit register (AVX-512 F, BW, DQ, VL and VNNI).
// Included inside a namespace of its own.

constexpr int kRowTile = 12;  // of float32 rows
#if defined(SARTOR_TILE_ROWS)
constexpr int kTileRows = SARTOR_TILE_ROWS;
#else
constexpr int kTileRows = 4;  // of int8 rows: with two column blocks 8 sums of products that do not
#endif
constexpr int kTileBlocks = 2;      // wait for each other, and their 8 totals; more would not fit
constexpr bool kKeepTotals = true;  // in registers, for a panel
constexpr int kDirectRows = 8;      // four at a time; more read unpacked codes
constexpr int kStreams = 4;         // column blocks that few rows read at once
constexpr bool kWideCodesCostMore = false;
constexpr int kAttentionRows = 12;  // query rows of a tile
constexpr int kAttentionSums = 24;  // and vectors of its sums

#include "vec_x86.hpp"

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct Q {
  __m512i v;
};
struct A {
  __m512i v;
};

static inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline void f_widen(const float* p, double* out) {
  _mm512_storeu_pd(out, _mm512_cvtps_pd(_mm256_loadu_ps(p)));
  _mm512_storeu_pd(out + 8, _mm512_cvtps_pd(_mm256_loadu_ps(p + 8)));
}
static inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
static inline F f_add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F f_sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F f_mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F f_div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F f_abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F f_round(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline F f_from(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I i_from(F a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline F f_exp2i(I n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
static inline F f_where_less(F x, F y, F a, F b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
static inline uint32_t f_at_least(F x, F y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ); }
static inline I i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline void i_store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
static inline float f_sum(F a) { return _mm512_reduce_add_ps(a.v); }
static inline float f_top(F a) { return _mm512_reduce_max_ps(a.v); }
// The largest lane of each of four.
static inline void f_tops(const F (&x)[4], float* tops) {
  __m256 halves[4];
  for (int i = 0; i < 4; ++i)
    halves[i] = _mm256_max_ps(_mm512_castps512_ps256(x[i].v), _mm512_extractf32x8_ps(x[i].v, 1));
  tops_of(halves, tops);
}
static inline F f_copysign(F magnitude, F sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
static inline F f_load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline F f_load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
static inline F f_load_even_bf16(const uint8_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
static inline F f_load_odd_bf16(const uint8_t* p) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high))};
}
static inline void f_store_fp16(uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void f_store_bf16(uint16_t* p, F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i out = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, lsb), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  out = _mm512_mask_or_epi32(out, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
static inline Q q_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void q_store(uint8_t* p, Q a) { _mm512_storeu_si512(p, a.v); }
static inline Q q_minus(Q a, uint8_t b) {
  return {_mm512_sub_epi8(a.v, _mm512_set1_epi8(static_cast<char>(b)))};
}
template <int kShift>
static inline Q q_field(Q a, uint8_t mask) {
  const __m512i m = _mm512_set1_epi8(static_cast<char>(mask));
  return {_mm512_and_si512(kShift ? _mm512_srli_epi16(a.v, kShift) : a.v, m)};
}
template <int kShift>
static inline Q q_or_high2(Q a, Q b) {
  // Ternary logic 0xEA: a | (b & mask), in one instruction.
  __m512i moved = b.v;
  if constexpr (kShift < 4) moved = _mm512_slli_epi16(b.v, 4 - kShift);
  if constexpr (kShift > 4) moved = _mm512_srli_epi16(b.v, kShift - 4);
  return {_mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(0x30), a.v, 0xEA)};
}
static inline Q q_add_masked(Q a, const uint8_t* mask, uint8_t value) {
  uint64_t bits;
  std::memcpy(&bits, mask, 8);
  return {_mm512_mask_add_epi8(a.v, bits, a.v, _mm512_set1_epi8(static_cast<char>(value)))};
}
static inline Q q_lookup(Q codes, const int8_t* table) {
  const __m512i values =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm512_xor_si512(_mm512_shuffle_epi8(values, codes.v), _mm512_set1_epi8(-128))};
}
// The same 4 activations for every lane.
static inline A a_load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
template <int kBits>
static inline I i_dot(I acc, Q w, A a) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)};
}
#include "vec_dot.hpp"
static inline void i_store_bytes(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// 64 bytes of four; their values fit.
static inline void i_store_bytes(int8_t* p, const I (&x)[4]) {
  const __m512i bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(x[0].v, x[1].v), _mm512_packs_epi32(x[2].v, x[3].v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
static inline I i_load_bytes(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
#include "vec_planes.hpp"
// vec_wide64.hpp, by words and bytes. Codes of what is not a number are some.
struct WideCount {
  __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
  int32_t total() const {
    return 256 * _mm512_reduce_add_epi32(high) + _mm512_reduce_add_epi32(low);
  }
};
static inline void wide_store(int8_t* row, int64_t n, int64_t at, const F (&x)[4], float,
                              WideCount& count) {
  const __m512i words[2] = {
      _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v)),
      _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v))};
  const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
  const auto high_of = [half](__m512i w) {
    return _mm512_srai_epi16(_mm512_add_epi16(w, half), 8);
  };
  const auto in_order = [](__m512i bytes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
  };
  const __m512i high = _mm512_packs_epi16(high_of(words[0]), high_of(words[1]));
  const __m512i low =
      _mm512_packus_epi16(_mm512_and_si512(words[0], byte), _mm512_and_si512(words[1], byte));
  _mm512_storeu_si512(row + at, in_order(high));
  _mm512_storeu_si512(row + n + at, in_order(low));
  const __m512i ones = _mm512_set1_epi8(1);
  count.high = _mm512_dpbusd_epi32(count.high, ones, high);
  count.low = _mm512_dpbusd_epi32(count.low, ones, low);
}
// 2^x to about 2e-7 relative, 0 far below -126.
static inline F f_exp2(F x) {
  const __m512 r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.ec320ap-10f);  // the least maximum of the relative error
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.26900cp-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c95446p-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebd5a8p-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e4f6p-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffep-1f));
  return {_mm512_scalef_ps(p, x.v)};
}
// 2^x to 7e-5 relative, for what is rounded after it.
static inline F f_exp2_short(F x) {
  const __m512 r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.07802446f);  // least squares, reweighted to the least maximum
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.22606727f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69583348f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992522f));
  return {_mm512_scalef_ps(p, x.v)};
}
#define SARTOR_HAS_EXP2
template <int kByte>
static inline F f_byte(Q w) {
  __m512i b = w.v;
  if constexpr (kByte > 0) b = _mm512_srli_epi32(b, 8 * kByte);
  if constexpr (kByte < 3) b = _mm512_and_si512(b, _mm512_set1_epi32(255));
  return {_mm512_cvtepi32_ps(b)};
}
