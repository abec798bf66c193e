// Register-only loops that measure what this instruction-set path can reach.

static double probe_int8(int64_t iterations) {
  uint8_t bytes[64];
  int8_t four[4] = {1, -1, 2, -2};
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i & 15);
  const Q w = q_load(bytes);
  I sum[12];
  for (int j = 0; j < 12; ++j) sum[j] = i_set(j);
  for (int64_t n = 0; n < iterations; ++n) {
    // The compiler must not know the bytes, or it multiplies once and adds ever after.
    asm volatile("" : : "r"(four) : "memory");
    SARTOR_UNROLL
    for (int j = 0; j < 12; ++j) sum[j] = i_dot<4>(sum[j], w, a_load(four));
  }
  int32_t sink[16];
  volatile int32_t keep = 0;
  for (int j = 0; j < 12; ++j) {
    i_store(sink, sum[j]);
    keep = keep + sink[j];
  }
  return static_cast<double>(iterations) * 12 * 128;
}

static double probe_fp32(int64_t iterations) {
  const F x = f_set(0.999999f), y = f_set(1e-6f);
  F sum[12];
  for (int j = 0; j < 12; ++j) sum[j] = f_set(static_cast<float>(j));
  for (int64_t n = 0; n < iterations; ++n) SARTOR_UNROLL
  for (int j = 0; j < 12; ++j) sum[j] = f_fma(sum[j], x, y);
  volatile float keep = 0;
  for (int j = 0; j < 12; ++j) keep = keep + f_sum(sum[j]);
  return static_cast<double>(iterations) * 12 * 32;
}

static double probe_read(const uint8_t* data, int64_t bytes) {
  F sum[4];
  for (int j = 0; j < 4; ++j) sum[j] = f_set(0.0f);
  for (int64_t at = 0; at + 256 <= bytes; at += 256)
    for (int j = 0; j < 4; ++j)
      sum[j] = f_max(sum[j], f_load(reinterpret_cast<const float*>(data + at + 64 * j)));
  volatile float keep = 0;
  for (int j = 0; j < 4; ++j) keep = keep + f_sum(sum[j]);
  return static_cast<double>(bytes);
}
