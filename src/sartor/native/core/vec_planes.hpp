// 16-bit whole numbers times unsigned bytes, where products of bytes are the fast ones: a row of n
// numbers is a plane of n high bytes and one of n low bytes, both with a sign. Included by vector
// headers, inside a namespace of their own.
constexpr int kWideBytes = 4;  // of a plane, for the four bytes that a lane multiplies
constexpr int kWideSums = 2;   // vectors of a sum

using WideStep = Q;
struct WideSum {
  I high, low;
};

// Sixteen numbers within 127 * 257 as numbers `at` and on of a row.
static inline void wide_store(int8_t* row, int64_t n, int64_t at, F x) {
  // Ties go up, so that the low byte is within [-128, 127].
  const F high = f_round(f_fma(x, f_set(1.0f / 256.0f), f_set(1.0f / 1024.0f)));
  i_store_bytes(row + at, i_from(high));
  i_store_bytes(row + n + at, i_from(f_fma(high, f_set(-256.0f), x)));
}
static inline WideStep wide_load(const uint8_t* p) { return q_load(p); }
static inline WideSum wide_start(int32_t from) { return {i_set(from >> 8), i_set(from & 255)}; }
// Four numbers of a row of n, whose high bytes are at y.
static inline WideSum wide_dot(WideSum sum, WideStep x, const int8_t* y, int64_t n) {
  return {i_dot<8>(sum.high, x, a_load(y)), i_dot<8>(sum.low, x, a_load(y + n))};
}
// Exact but for one rounding: both parts are below 2^24.
static inline F wide_total(WideSum sum) {
  return f_fma(f_from(sum.high), f_set(256.0f), f_from(sum.low));
}
