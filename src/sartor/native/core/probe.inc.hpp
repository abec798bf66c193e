// Loops that measure what this instruction-set path can reach (see probe.hpp).
//
// The arithmetic ones touch registers alone. Where a path has instructions of its own they are
// written out: a compiler that knows what they do would fold them, and one that is made to forget
// it would go through memory.

#if defined(__AVX2__)
// Twelve totals, as the latency is up to 6 cycles and two instructions start in each. All in one
// statement: an array that a loop walks through would be kept in memory.
#define SARTOR_TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define SARTOR_SUMS(c)                                                                    \
  c(sum[0]), c(sum[1]), c(sum[2]), c(sum[3]), c(sum[4]), c(sum[5]), c(sum[6]), c(sum[7]), \
      c(sum[8]), c(sum[9]), c(sum[10]), c(sum[11])
constexpr int kPeakSums = 12, kPeakSteps = 4 * kPeakSums;

#if defined(__AVX512VNNI__)
using PeakInts = __m512i;
using PeakFloats = __m512;
static PeakWidths peak_widths() {
  const double ports = multiplies_per_cycle(512);
  return {ports * 64 * 2, ports * 16 * 2, ports * 32 * 2};
}

static PeakInts peak_ints(const void* data) { return _mm512_load_si512(data); }
static PeakFloats peak_floats(const void* data) { return _mm512_load_ps(data); }
static inline void peak_int8(PeakInts (&sum)[12], PeakInts a, PeakInts b) {
#define SARTOR_LINE(i) "vpdpbusd %13, %12, %" #i "\n\t"
  asm volatile(SARTOR_TWELVE(SARTOR_LINE) : SARTOR_SUMS("+v") : "v"(a), "v"(b));
#undef SARTOR_LINE
}
static inline void peak_fp32(PeakFloats (&sum)[12], PeakFloats a, PeakFloats b) {
#define SARTOR_LINE(i) "vfmadd231ps %13, %12, %" #i "\n\t"
  asm volatile(SARTOR_TWELVE(SARTOR_LINE) : SARTOR_SUMS("+v") : "v"(a), "v"(b));
#undef SARTOR_LINE
}
static inline void peak_bf16(PeakFloats (&sum)[12], PeakFloats a, PeakFloats b) {
#define SARTOR_LINE(i) "vdpbf16ps %13, %12, %" #i "\n\t"
  asm volatile(SARTOR_TWELVE(SARTOR_LINE) : SARTOR_SUMS("+v") : "v"(a), "v"(b));
#undef SARTOR_LINE
}

#else
using PeakInts = __m256i;
using PeakFloats = __m256;
static PeakWidths peak_widths() {
  const double ports = multiplies_per_cycle(256);
  return {ports * 32 * 2, ports * 8 * 2, 0};
}

static PeakInts peak_ints(const void* data) {
  return _mm256_load_si256(static_cast<const __m256i*>(data));
}
static PeakFloats peak_floats(const void* data) {
  return _mm256_load_ps(static_cast<const float*>(data));
}
static inline void peak_int8(PeakInts (&sum)[12], PeakInts a, PeakInts b) {
  // No kernel does without these, and some sum the pairs on a third port.
#define SARTOR_LINE(i) "vpmaddubsw %13, %12, %" #i "\n\t"
  asm volatile(SARTOR_TWELVE(SARTOR_LINE) : SARTOR_SUMS("+x") : "x"(a), "x"(b));
#undef SARTOR_LINE
}
static inline void peak_fp32(PeakFloats (&sum)[12], PeakFloats a, PeakFloats b) {
#define SARTOR_LINE(i) "vfmadd231ps %13, %12, %" #i "\n\t"
  asm volatile(SARTOR_TWELVE(SARTOR_LINE) : SARTOR_SUMS("+x") : "x"(a), "x"(b));
#undef SARTOR_LINE
}
#endif
#undef SARTOR_TWELVE
#undef SARTOR_SUMS

template <typename Register, typename Step>
static void peak_loop(int64_t iterations, int64_t links, Register start, const Step& step) {
  Register sum[kPeakSums] = {start, start, start, start, start, start,
                             start, start, start, start, start, start};
  uint64_t x = 3;
  SARTOR_NO_UNROLL
  for (int64_t n = 0; n < iterations; ++n) {
    // Four times, as the loop's own instructions may take a slot of these.
    step(sum), step(sum), step(sum), step(sum);
    chain(x, links);
  }
}

static double probe_int8(int64_t iterations, int64_t links) {
  const ProbeData<128> data;
  const PeakInts a = peak_ints(data.bytes), b = peak_ints(data.bytes + 64);
  peak_loop(iterations, links, a, [&](auto& sum) { peak_int8(sum, a, b); });
  return static_cast<double>(iterations) * kPeakSteps * (sizeof(PeakInts) * 2);
}

static double probe_fp32(int64_t iterations, int64_t links) {
  ProbeData<128> data;
  data.make_fp32();
  const PeakFloats a = peak_floats(data.bytes), b = peak_floats(data.bytes + 64);
  peak_loop(iterations, links, a, [&](auto& sum) { peak_fp32(sum, a, b); });
  return static_cast<double>(iterations) * kPeakSteps * (sizeof(PeakFloats) / 4 * 2);
}

#else
// What the compiler makes of this path's own steps; nobody can say what the most would be.
static PeakWidths peak_widths() { return {}; }
// Little at a time on the portable path: the chain must find its place beside it.
constexpr int kSums = kRowTile < 4 ? 1 : 4;

static double probe_int8(int64_t iterations, int64_t links) {
  const ProbeData<64> data;
  const int8_t four[4] = {1, -1, 2, -2};
  const Q w = q_field<0>(q_load(data.bytes), 15);
  I sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = i_set(j);
  uint64_t x = 3;
  for (int64_t n = 0; n < iterations; ++n) {
    // The compiler must not know the bytes, or it multiplies once and adds ever after.
    asm volatile("" : : "r"(four) : "memory");
    SARTOR_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = i_dot<4>(sum[j], w, a_load(four));
    chain(x, links);
  }
  int32_t sink[16];
  volatile int32_t keep = 0;
  for (int j = 0; j < kSums; ++j) {
    i_store(sink, sum[j]);
    keep = keep + sink[j];
  }
  return static_cast<double>(iterations) * kSums * 128;
}

static double probe_fp32(int64_t iterations, int64_t links) {
  const F x = f_set(0.999999f), y = f_set(1e-6f);
  F sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = f_set(static_cast<float>(j));
  uint64_t link = 3;
  for (int64_t n = 0; n < iterations; ++n) {
    SARTOR_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = f_fma(sum[j], x, y);
    chain(link, links);
  }
  volatile float keep = 0;
  for (int j = 0; j < kSums; ++j) keep = keep + f_sum(sum[j]);
  return static_cast<double>(iterations) * kSums * 32;
}
#endif

static double probe_bf16([[maybe_unused]] int64_t iterations, [[maybe_unused]] int64_t links) {
#if defined(__AVX512VNNI__)
  if (!has_avx512bf16()) return 0;
  ProbeData<128> data;
  data.make_bf16();
  const PeakFloats a = peak_floats(data.bytes), b = peak_floats(data.bytes + 64);
  peak_loop(iterations, links, _mm512_setzero_ps(), [&](auto& sum) { peak_bf16(sum, a, b); });
  return static_cast<double>(iterations) * kPeakSteps * (sizeof(PeakFloats) / 2 * 2);
#else
  return 0;
#endif
}

// Reads `streams` parts of the memory side by side; returns how many bytes that were. A prefetcher
// stays within its page of 4 KiB, so that a single stream waits at the beginning of each.
static double probe_read(const uint8_t* data, int64_t bytes, int streams) {
  constexpr int64_t kStep = 256;
  // An odd number of steps: parts that are a power of two apart meet in the same sets of a cache.
  const int64_t steps = ((bytes / streams / kStep) - 1) | 1, part = steps * kStep;
  F sum[4];
  for (int j = 0; j < 4; ++j) sum[j] = f_set(0.0f);
  for (int64_t at = 0; at < part; at += kStep)
    for (int s = 0; s < streams; ++s)
      for (int j = 0; j < 4; ++j)
        sum[j] =
            f_max(sum[j], f_load(reinterpret_cast<const float*>(data + s * part + at + 64 * j)));
  volatile float keep = 0;
  for (int j = 0; j < 4; ++j) keep = keep + f_sum(sum[j]);
  return static_cast<double>(part) * streams;
}
