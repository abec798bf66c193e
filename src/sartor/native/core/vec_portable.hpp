// Sixteen lanes in plain C++. The compiler vectorises what the target allows.
// Included inside a namespace of its own.

constexpr int kRowTile = 1;  // small code: there are no registers to fill
constexpr int kTileRows = 4;
constexpr int kTileBlocks = 1;
constexpr bool kKeepTotals = false;  // in registers, for a panel
constexpr int kDirectRows = 2;
constexpr int kStreams = 1;  // column blocks that few rows read at once
constexpr bool kWideCodesCostMore = false;
constexpr int kAttentionRows = 1;  // query rows of a tile
constexpr int kAttentionSums = 1;  // and vectors of its sums

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct Q {  // 64 unsigned bytes: lane n holds bytes 4n .. 4n + 3
  uint8_t v[64];
};

#define SARTOR_EACH for (int i = 0; i < 16; ++i)

static inline F f_load(const float* p) {
  F r;
  std::memcpy(r.v, p, 64);
  return r;
}
static inline void f_store(float* p, F a) { std::memcpy(p, a.v, 64); }
static inline void f_widen(const float* p, double* out) { SARTOR_EACH out[i] = p[i]; }
static inline F f_set(float x) {
  F r;
  SARTOR_EACH r.v[i] = x;
  return r;
}
static inline F f_add(F a, F b) {
  SARTOR_EACH a.v[i] += b.v[i];
  return a;
}
static inline F f_sub(F a, F b) {
  SARTOR_EACH a.v[i] -= b.v[i];
  return a;
}
static inline F f_mul(F a, F b) {
  SARTOR_EACH a.v[i] *= b.v[i];
  return a;
}
static inline F f_div(F a, F b) {
  SARTOR_EACH a.v[i] /= b.v[i];
  return a;
}
static inline F f_max(F a, F b) {
  SARTOR_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline F f_min(F a, F b) {
  SARTOR_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline F f_fma(F a, F b, F c) {
  SARTOR_EACH c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
static inline F f_abs(F a) {
  SARTOR_EACH a.v[i] = a.v[i] < 0 ? -a.v[i] : a.v[i];
  return a;
}
static inline F f_round(F a) {
  SARTOR_EACH a.v[i] = __builtin_nearbyintf(a.v[i]);
  return a;
}
static inline F f_from(I a) {
  F r;
  SARTOR_EACH r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
// Rounds to nearest even; the argument is within int32.
static inline I i_from(F a) {
  I r;
  SARTOR_EACH r.v[i] = static_cast<int32_t>(__builtin_nearbyintf(a.v[i]));
  return r;
}
// 2^n for n within [-126, 127].
static inline F f_exp2i(I n) {
  F r;
  SARTOR_EACH {
    const int32_t bits = (n.v[i] + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
// a where x < y, else b.
static inline F f_where_less(F x, F y, F a, F b) {
  SARTOR_EACH b.v[i] = x.v[i] < y.v[i] ? a.v[i] : b.v[i];
  return b;
}
// Bit i: x[i] >= y[i].
static inline uint32_t f_at_least(F x, F y) {
  uint32_t bits = 0;
  SARTOR_EACH bits |= static_cast<uint32_t>(x.v[i] >= y.v[i]) << i;
  return bits;
}
static inline I i_set(int32_t x) {
  I r;
  SARTOR_EACH r.v[i] = x;
  return r;
}
static inline void i_store(int32_t* p, I a) { std::memcpy(p, a.v, 64); }
static inline float f_sum(F a) {
  float total = a.v[0];
  for (int i = 1; i < 16; ++i) total += a.v[i];
  return total;
}
static inline float f_top(F a) {
  float top = a.v[0];
  for (int i = 1; i < 16; ++i) top = a.v[i] > top ? a.v[i] : top;
  return top;
}
static inline F f_copysign(F magnitude, F sign) {
  SARTOR_EACH magnitude.v[i] = __builtin_copysignf(magnitude.v[i], sign.v[i]);
  return magnitude;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 1023u;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u | (mantissa << 13)
                                               : ((exponent + 112u) << 23) | (mantissa << 13));
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) {  // 65536 and above, infinities, NaN
    return static_cast<uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  }
  if (bits < 0x38800000u) {  // below the least normal: round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(
        sign | static_cast<uint32_t>(__builtin_nearbyintf(magnitude * 16777216.0f)));
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
static inline F f_load_fp16(const uint16_t* p) {
  F r;
  SARTOR_EACH r.v[i] = half_to_float(p[i]);
  return r;
}
static inline F f_load_bf16(const uint16_t* p) {
  F r;
  SARTOR_EACH {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
// Of sixteen pairs the first, and the second, of each.
static inline F f_load_even_bf16(const uint8_t* p) {
  F r;
  SARTOR_EACH {
    uint32_t pair;
    std::memcpy(&pair, p + 4 * i, 4);
    pair <<= 16;
    std::memcpy(&r.v[i], &pair, 4);
  }
  return r;
}
static inline F f_load_odd_bf16(const uint8_t* p) {
  F r;
  SARTOR_EACH {
    uint32_t pair;
    std::memcpy(&pair, p + 4 * i, 4);
    pair &= 0xffff0000u;
    std::memcpy(&r.v[i], &pair, 4);
  }
  return r;
}
static inline void f_store_fp16(uint16_t* p, F a) { SARTOR_EACH p[i] = float_to_half(a.v[i]); }
static inline void f_store_bf16(uint16_t* p, F a) {
  SARTOR_EACH {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u
                                     : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

static inline Q q_load(const uint8_t* p) {
  Q r;
  std::memcpy(r.v, p, 64);
  return r;
}
static inline void q_store(uint8_t* p, Q a) { std::memcpy(p, a.v, 64); }
static inline Q q_minus(Q a, uint8_t b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] - b);
  return a;
}
// (a >> shift) & mask on every byte.
template <int kShift>
static inline Q q_field(Q a, uint8_t mask) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] >> kShift) & mask);
  return a;
}
// a | ((b >> shift) & 3) << 4
template <int kShift>
static inline Q q_or_high2(Q a, Q b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= static_cast<uint8_t>(((b.v[i] >> kShift) & 3) << 4);
  return a;
}
// Adds `value` to the bytes whose bit is set in 64 bits at `mask`.
static inline Q q_add_masked(Q a, const uint8_t* mask, uint8_t value) {
  for (int i = 0; i < 64; ++i)
    if (mask[i >> 3] >> (i & 7) & 1) a.v[i] = static_cast<uint8_t>(a.v[i] + value);
  return a;
}
// table[code] + 128 for 4-bit codes.
static inline Q q_lookup(Q codes, const int8_t* table) {
  for (int i = 0; i < 64; ++i) codes.v[i] = static_cast<uint8_t>(table[codes.v[i] & 15] + 128);
  return codes;
}
// acc + sum of 4 products a lane: unsigned bytes of w times the 4 signed bytes at a. Exact.
struct A {
  const int8_t* v;
};
static inline A a_load(const int8_t* p) { return {p}; }
template <int kBits>
static inline I i_dot(I acc, Q w, A a) {
  SARTOR_EACH acc.v[i] += w.v[4 * i] * a.v[0] + w.v[4 * i + 1] * a.v[1] + w.v[4 * i + 2] * a.v[2] +
                          w.v[4 * i + 3] * a.v[3];
  return acc;
}
#include "vec_dot.hpp"
static inline void i_store_bytes(int8_t* p, I a) { SARTOR_EACH p[i] = static_cast<int8_t>(a.v[i]); }
static inline I i_load_bytes(const int8_t* p) {
  I r;
  SARTOR_EACH r.v[i] = p[i];
  return r;
}
// The sums of 16 and 16 signed bytes.
static inline void sum_bytes(const int8_t* p, int32_t* sums) {
  sums[0] = sums[1] = 0;
  for (int i = 0; i < 32; ++i) sums[i / 16] += p[i];
}
#include "vec_fours.hpp"
#include "vec_planes.hpp"
#include "vec_wide64.hpp"
// Byte k of each lane as float.
template <int kByte>
static inline F f_byte(Q w) {
  F r;
  SARTOR_EACH r.v[i] = static_cast<float>(w.v[4 * i + kByte]);
  return r;
}
#undef SARTOR_EACH
