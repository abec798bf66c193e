// Sixteen lanes as four 128-bit registers (ARMv8.2-A with the integer dot product).
// Included inside a namespace of its own.

constexpr int kRowTile = 4;   // of float32 rows: sixteen of the thirty-two registers hold totals
constexpr int kTileRows = 4;  // of int8 rows: sixteen hold sums
constexpr int kTileBlocks = 1;
constexpr bool kKeepTotals = false;  // in registers, for a panel
constexpr int kDirectRows = 2;       // more read unpacked codes
constexpr int kStreams = 1;          // column blocks that few rows read at once
constexpr bool kWideCodesCostMore = true;
constexpr int kAttentionRows = 4;   // query rows of a tile
constexpr int kAttentionSums = 16;  // and vectors of its sums

struct F {
  float32x4_t a, b, c, d;
};
struct I {
  int32x4_t a, b, c, d;
};
struct Q {
  uint8x16_t a, b, c, d;
};

// The operation on each of the four registers of its arguments.
template <typename Result, typename Op, typename... X>
static inline Result each(Op op, X... x) {
  return {op(x.a...), op(x.b...), op(x.c...), op(x.d...)};
}

static inline F f_load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
static inline void f_store(float* p, F x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
static inline void f_widen(const float* p, double* out) {
  for (int i = 0; i < 16; i += 4) {
    const float32x4_t four = vld1q_f32(p + i);
    vst1q_f64(out + i, vcvt_f64_f32(vget_low_f32(four)));
    vst1q_f64(out + i + 2, vcvt_high_f64_f32(four));
  }
}
static inline F f_set(float x) {
  const float32x4_t all = vdupq_n_f32(x);
  return {all, all, all, all};
}
#define SARTOR_BINARY(name, op)                                                  \
  static inline F name(F x, F y) {                                               \
    return each<F>([](float32x4_t p, float32x4_t q) { return op(p, q); }, x, y); \
  }
SARTOR_BINARY(f_add, vaddq_f32)
SARTOR_BINARY(f_sub, vsubq_f32)
SARTOR_BINARY(f_mul, vmulq_f32)
SARTOR_BINARY(f_div, vdivq_f32)
SARTOR_BINARY(f_max, vmaxq_f32)
SARTOR_BINARY(f_min, vminq_f32)
#undef SARTOR_BINARY
static inline F f_fma(F x, F y, F z) {
  return each<F>([](float32x4_t p, float32x4_t q, float32x4_t r) { return vfmaq_f32(r, p, q); }, x,
                 y, z);
}
static inline F f_abs(F x) {
  return each<F>([](float32x4_t p) { return vabsq_f32(p); }, x);
}
static inline F f_round(F x) {
  return each<F>([](float32x4_t p) { return vrndnq_f32(p); }, x);
}
static inline F f_from(I x) {
  return each<F>([](int32x4_t p) { return vcvtq_f32_s32(p); }, x);
}
static inline I i_from(F x) {
  return each<I>([](float32x4_t p) { return vcvtnq_s32_f32(p); }, x);
}
static inline F f_exp2i(I n) {
  return each<F>(
      [](int32x4_t p) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(p, vdupq_n_s32(127)), 23));
      },
      n);
}
static inline F f_where_less(F x, F y, F yes, F no) {
  return each<F>([](float32x4_t p, float32x4_t q, float32x4_t r,
                    float32x4_t s) { return vbslq_f32(vcltq_f32(p, q), r, s); },
                 x, y, yes, no);
}
// Bit i: x[i] >= y[i].
static inline uint32_t f_at_least(F x, F y) {
  const uint32_t each[4] = {1, 2, 4, 8};
  const uint32x4_t weight = vld1q_u32(each);
  const auto bits = [weight](float32x4_t p, float32x4_t q) {
    return vaddvq_u32(vandq_u32(vcgeq_f32(p, q), weight));
  };
  return bits(x.a, y.a) | bits(x.b, y.b) << 4 | bits(x.c, y.c) << 8 | bits(x.d, y.d) << 12;
}
static inline I i_set(int32_t x) {
  const int32x4_t all = vdupq_n_s32(x);
  return {all, all, all, all};
}
static inline void i_store(int32_t* p, I x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
static inline float f_sum(F x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d)));
}
static inline float f_top(F x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d)));
}
static inline F f_copysign(F magnitude, F sign) {
  return each<F>(
      [](float32x4_t m, float32x4_t s) { return vbslq_f32(vdupq_n_u32(0x80000000u), s, m); },
      magnitude, sign);
}

static inline float32x4_t four_fp16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
static inline F f_load_fp16(const uint16_t* p) {
  return {four_fp16(p), four_fp16(p + 4), four_fp16(p + 8), four_fp16(p + 12)};
}
static inline float32x4_t four_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
static inline F f_load_bf16(const uint16_t* p) {
  return {four_bf16(p), four_bf16(p + 4), four_bf16(p + 8), four_bf16(p + 12)};
}
static inline void store_halves(uint16_t* p, uint16x4_t a, uint16x4_t b, uint16x4_t c,
                                uint16x4_t d) {
  vst1q_u16(p, vcombine_u16(a, b));
  vst1q_u16(p + 8, vcombine_u16(c, d));
}
static inline uint16x4_t fp16_bits(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
// Of sixteen pairs the first, and the second, of each.
static inline F f_load_even_bf16(const uint8_t* p) {
  const auto first = [](const uint8_t* q) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(q)), 16));
  };
  return {first(p), first(p + 16), first(p + 32), first(p + 48)};
}
static inline F f_load_odd_bf16(const uint8_t* p) {
  const auto second = [](const uint8_t* q) {
    return vreinterpretq_f32_u32(
        vandq_u32(vreinterpretq_u32_u8(vld1q_u8(q)), vdupq_n_u32(0xffff0000u)));
  };
  return {second(p), second(p + 16), second(p + 32), second(p + 48)};
}
static inline void f_store_fp16(uint16_t* p, F x) {
  store_halves(p, fp16_bits(x.a), fp16_bits(x.b), fp16_bits(x.c), fp16_bits(x.d));
}
static inline uint16x4_t bf16_bits(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t lsb = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(lsb, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
static inline void f_store_bf16(uint16_t* p, F x) {
  store_halves(p, bf16_bits(x.a), bf16_bits(x.b), bf16_bits(x.c), bf16_bits(x.d));
}

static inline Q q_load(const uint8_t* p) {
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
static inline void q_store(uint8_t* p, Q x) {
  vst1q_u8(p, x.a);
  vst1q_u8(p + 16, x.b);
  vst1q_u8(p + 32, x.c);
  vst1q_u8(p + 48, x.d);
}
static inline Q q_minus(Q x, uint8_t y) {
  const uint8x16_t value = vdupq_n_u8(y);
  return each<Q>([value](uint8x16_t p) { return vsubq_u8(p, value); }, x);
}
template <int kShift>
static inline Q q_field(Q x, uint8_t mask) {
  return each<Q>(
      [mask](uint8x16_t p) {
        if constexpr (kShift > 0) p = vshrq_n_u8(p, kShift);
        return mask == 255 >> kShift ? p : vandq_u8(p, vdupq_n_u8(mask));
      },
      x);
}
template <int kShift>
static inline Q q_or_high2(Q x, Q y) {
  return each<Q>(
      [](uint8x16_t p, uint8x16_t q) {
        if constexpr (kShift < 4) q = vshlq_n_u8(q, 4 - kShift);
        if constexpr (kShift > 4) q = vshrq_n_u8(q, kShift - 4);
        return vorrq_u8(p, vandq_u8(q, vdupq_n_u8(0x30)));
      },
      x, y);
}
// Bits 16 * kPart and up of the mask: `value` in the bytes whose bit is set.
template <int kPart>
static inline uint8x16_t masked_bytes(uint8x16_t mask, uint8_t value) {
  // Byte i gets the mask's byte that holds its bit, and tests it.
  const uint8x16_t spread =
      vcombine_u8(vdup_laneq_u8(mask, 2 * kPart), vdup_laneq_u8(mask, 2 * kPart + 1));
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  return vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(value));
}
static inline Q q_add_masked(Q x, const uint8_t* mask, uint8_t value) {
  const uint8x8_t bits = vld1_u8(mask);
  const uint8x16_t m = vcombine_u8(bits, bits);
  return {vaddq_u8(x.a, masked_bytes<0>(m, value)), vaddq_u8(x.b, masked_bytes<1>(m, value)),
          vaddq_u8(x.c, masked_bytes<2>(m, value)), vaddq_u8(x.d, masked_bytes<3>(m, value))};
}
static inline Q q_lookup(Q codes, const int8_t* table) {
  const uint8x16_t values = veorq_u8(vreinterpretq_u8_s8(vld1q_s8(table)), vdupq_n_u8(128));
  return each<Q>([values](uint8x16_t p) { return vqtbl1q_u8(values, p); }, codes);
}
// The same 4 activations for every lane.
struct A {
  int8x16_t v;
};
static inline A a_load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
template <int kBits>
static inline I i_dot(I acc, Q w, A x) {
  const int8x16_t wide = x.v;
  if constexpr (kBits < 8) {
    // Codes below 128 are the same numbers with a sign.
    return each<I>([wide](int32x4_t sum,
                          uint8x16_t p) { return vdotq_s32(sum, vreinterpretq_s8_u8(p), wide); },
                   acc, w);
  } else {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return each<I>([wide](int32x4_t sum, uint8x16_t p) { return vusdotq_s32(sum, p, wide); }, acc,
                   w);
#else
    // A code is 128 more than itself with the top bit turned over, read with a sign.
    const int8x16_t half = vdupq_n_s8(64);
    const int32x4_t more = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, wide), half, wide);
    return each<I>(
        [wide, more](int32x4_t sum, uint8x16_t p) {
          const int8x16_t turned = vreinterpretq_s8_u8(veorq_u8(p, vdupq_n_u8(128)));
          return vdotq_s32(vaddq_s32(sum, more), turned, wide);
        },
        acc, w);
#endif
  }
}
#include "vec_dot.hpp"
static inline void i_store_bytes(int8_t* p, I x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
static inline I i_load_bytes(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
          vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
}
// The sums of 16 and 16 signed bytes.
static inline void sum_bytes(const int8_t* p, int32_t* sums) {
  sums[0] = vaddlvq_s8(vld1q_s8(p));
  sums[1] = vaddlvq_s8(vld1q_s8(p + 16));
}
#include "vec_fours.hpp"
#include "vec_planes.hpp"
#include "vec_wide64.hpp"
template <int kByte>
static inline F f_byte(Q w) {
  return each<F>(
      [](uint8x16_t p) {
        uint32x4_t lanes = vreinterpretq_u32_u8(p);
        if constexpr (kByte > 0) lanes = vshrq_n_u32(lanes, 8 * kByte);
        return vcvtq_f32_u32(vandq_u32(lanes, vdupq_n_u32(255)));
      },
      w);
}
