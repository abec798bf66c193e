// Sixteen lanes as two 256-bit registers (AVX2, FMA, F16C; AVX-VNNI where it is compiled for).
// Included inside a namespace of its own.

constexpr int kRowTile = 4;   // of float32 rows: two registers a row of totals
constexpr int kTileRows = 4;  // of int8 rows: eight registers of sums
constexpr int kTileBlocks = 1;
constexpr bool kKeepTotals = false;  // in registers, for a panel
constexpr int kDirectRows = 2;       // more read unpacked codes
constexpr int kStreams = 2;          // column blocks that few rows read at once
#if defined(__AVXVNNI__)
constexpr bool kWideCodesCostMore = false;
#else
constexpr bool kWideCodesCostMore = true;
#endif
constexpr int kAttentionRows = 4;  // query rows of a tile
constexpr int kAttentionSums = 4;  // and vectors of its sums

#include "vec_x86.hpp"

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct Q {
  __m256i lo, hi;
};

static inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline void f_widen(const float* p, double* out) {
  for (int i = 0; i < 16; i += 4) _mm256_storeu_pd(out + i, _mm256_cvtps_pd(_mm_loadu_ps(p + i)));
}
static inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define SARTOR_BINARY(name, op) \
  static inline F name(F a, F b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
SARTOR_BINARY(f_add, _mm256_add_ps)
SARTOR_BINARY(f_sub, _mm256_sub_ps)
SARTOR_BINARY(f_mul, _mm256_mul_ps)
SARTOR_BINARY(f_div, _mm256_div_ps)
SARTOR_BINARY(f_max, _mm256_max_ps)
SARTOR_BINARY(f_min, _mm256_min_ps)
#undef SARTOR_BINARY
static inline F f_fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline F f_abs(F a) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, a.lo), _mm256_andnot_ps(bit, a.hi)};
}
static inline F f_round(F a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
static inline F f_from(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
static inline I i_from(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
static inline F f_exp2i(I n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
static inline F f_where_less(F x, F y, F a, F b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
static inline uint32_t f_at_least(F x, F y) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(x.lo, y.lo, _CMP_GE_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(x.hi, y.hi, _CMP_GE_OQ));
  return static_cast<uint32_t>(lo | hi << 8);
}
static inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline void i_store(int32_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
static inline float f_sum(F a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The largest lane of each of four.
static inline void f_tops(const F (&x)[4], float* tops) {
  __m256 halves[4];
  for (int i = 0; i < 4; ++i) halves[i] = _mm256_max_ps(x[i].lo, x[i].hi);
  tops_of(halves, tops);
}
static inline float f_top(F a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline F f_copysign(F m, F s) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, m.lo), _mm256_and_ps(bit, s.lo)),
          _mm256_or_ps(_mm256_andnot_ps(bit, m.hi), _mm256_and_ps(bit, s.hi))};
}
static inline __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
static inline F f_load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
static inline F f_load_bf16(const uint16_t* p) {
  const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16);
  const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
static inline F f_load_even_bf16(const uint8_t* p) {
  const __m256i* pairs = reinterpret_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(pairs), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(pairs + 1), 16))};
}
static inline F f_load_odd_bf16(const uint8_t* p) {
  const __m256i* pairs = reinterpret_cast<const __m256i*>(p);
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(pairs), high)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(pairs + 1), high))};
}
static inline void f_store_fp16(uint16_t* p, F a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kMode));
}
static inline __m256i bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i lsb = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, lsb), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
static inline void f_store_bf16(uint16_t* p, F a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
static inline Q q_load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
static inline void q_store(uint8_t* p, Q a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
static inline Q q_minus(Q a, uint8_t b) {
  const __m256i value = _mm256_set1_epi8(static_cast<char>(b));
  return {_mm256_sub_epi8(a.lo, value), _mm256_sub_epi8(a.hi, value)};
}
template <int kShift>
static inline Q q_field(Q a, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, kShift), m),
          _mm256_and_si256(_mm256_srli_epi16(a.hi, kShift), m)};
}
template <int kShift>
static inline Q q_or_high2(Q a, Q b) {
  const Q two = q_field<kShift>(b, 3);
  return {_mm256_or_si256(a.lo, _mm256_slli_epi16(two.lo, 4)),
          _mm256_or_si256(a.hi, _mm256_slli_epi16(two.hi, 4))};
}
static inline __m256i masked_bytes(uint32_t bits, uint8_t value) {
  // Byte i of the register gets bit i: spread the mask's bytes, then test one bit in each.
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(static_cast<int32_t>(bits)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)));
}
static inline Q q_add_masked(Q a, const uint8_t* mask, uint8_t value) {
  uint32_t bits[2];
  std::memcpy(bits, mask, 8);
  return {_mm256_add_epi8(a.lo, masked_bytes(bits[0], value)),
          _mm256_add_epi8(a.hi, masked_bytes(bits[1], value))};
}
static inline Q q_lookup(Q codes, const int8_t* table) {
  const __m256i values = _mm256_broadcastsi128_si256(load128(table));
  const __m256i flip = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(_mm256_shuffle_epi8(values, codes.lo), flip),
          _mm256_xor_si256(_mm256_shuffle_epi8(values, codes.hi), flip)};
}
// The same 4 activations for every lane.
struct A {
  __m256i v;
};
static inline A a_load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
#if defined(__AVXVNNI__)
template <int kBits>
static inline I i_dot(I acc, Q w, A a) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, a.v), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, a.v)};
}
#include "vec_dot.hpp"
#else
// The products of a chunk. Pairs of products with 4 bits fit int16, and the sum of the 8 pairs that
// a lane has in a chunk does too: 8 * 2 * 15 * 127 = 30,480.
template <int kBits>
struct Dot {
  int32_t from;
  Q pairs;
  void start(int32_t value) {
    from = value;
    pairs = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  void add(Q w, A a) {
    static_assert(kBits <= 4);
    pairs = {_mm256_add_epi16(pairs.lo, _mm256_maddubs_epi16(w.lo, a.v)),
             _mm256_add_epi16(pairs.hi, _mm256_maddubs_epi16(w.hi, a.v))};
    // gcc 12 would multiply a whole chunk first, and keep the products in memory.
    asm("" : "+x"(pairs.lo), "+x"(pairs.hi));
  }
  I total(int32_t weight = 1) const {
    const __m256i each = _mm256_set1_epi16(static_cast<int16_t>(weight));
    const __m256i start = _mm256_set1_epi32(from);
    return {_mm256_add_epi32(start, _mm256_madd_epi16(pairs.lo, each)),
            _mm256_add_epi32(start, _mm256_madd_epi16(pairs.hi, each))};
  }
};
// Up to 7 bits only a pair fits.
struct PairDot {
  I sum;
  void start(int32_t from) { sum = i_set(from); }
  void add(Q w, A a) {
    const __m256i ones = _mm256_set1_epi16(1);
    sum = {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(w.lo, a.v), ones)),
           _mm256_add_epi32(sum.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(w.hi, a.v), ones))};
  }
  I total() const { return sum; }
};
template <>
struct Dot<5> : PairDot {};
template <>
struct Dot<6> : PairDot {};
template <>
struct Dot<7> : PairDot {};
// With 8 bits not even that: four bits at a time.
template <>
struct Dot<8> {
  Dot<4> low, high;
  void start(int32_t from) {
    low.start(from);
    high.start(0);
  }
  void add(Q w, A a) {
    low.add(q_field<0>(w, 15), a);
    high.add(q_field<4>(w, 15), a);
  }
  I total() const {
    const I first = low.total(), second = high.total(16);
    return {_mm256_add_epi32(first.lo, second.lo), _mm256_add_epi32(first.hi, second.hi)};
  }
};
#endif
static inline void i_store_bytes(int8_t* p, I a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
// 64 bytes of four; their values fit.
static inline void i_store_bytes(int8_t* p, const I (&x)[4]) {
  for (int i = 0; i < 4; i += 2) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(x[i].lo, x[i].hi),
                                             _mm256_packs_epi32(x[i + 1].lo, x[i + 1].hi));
    // Lanes of 128 bits were packed apart: 0-3 and 8-11 of both, then 4-7 and 12-15.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i),
                        _mm256_permutevar8x32_epi32(bytes, order));
  }
}
static inline I i_load_bytes(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
// 16-bit whole numbers times unsigned bytes, as vec_planes.hpp says: here the numbers stay whole,
// and the bytes become words. Of four numbers the first and the third lie together, as the even
// bytes do.
constexpr int kWideBytes = 8;
constexpr int kWideSums = 1;

struct WideStep {
  Q even, odd;
};
struct WideSum {
  I sum;
};
static inline void wide_store(int8_t* row, int64_t, int64_t at, F x) {
  const I whole = i_from(x);
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole.lo, whole.hi), 0xD8);
  words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * at), words);
}
static inline WideStep wide_load(const uint8_t* p) {
  const Q x = q_load(p);
  const __m256i byte = _mm256_set1_epi16(255);
  return {{_mm256_and_si256(x.lo, byte), _mm256_and_si256(x.hi, byte)},
          {_mm256_srli_epi16(x.lo, 8), _mm256_srli_epi16(x.hi, 8)}};
}
static inline WideSum wide_start(int32_t from) { return {i_set(from)}; }
static inline WideSum wide_dot(WideSum sum, WideStep x, const int8_t* y, int64_t) {
  const __m256i even = a_load(y).v, odd = a_load(y + 4).v;
  const auto add = [&](__m256i to, __m256i a, __m256i b) {
    return _mm256_add_epi32(_mm256_add_epi32(to, _mm256_madd_epi16(a, even)),
                            _mm256_madd_epi16(b, odd));
  };
  return {{add(sum.sum.lo, x.even.lo, x.odd.lo), add(sum.sum.hi, x.even.hi, x.odd.hi)}};
}
static inline F wide_total(WideSum sum) { return f_from(sum.sum); }
#include "vec_wide64.hpp"
template <int kByte>
static inline F f_byte(Q w) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.lo, 8 * kByte), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.hi, 8 * kByte), mask))};
}
