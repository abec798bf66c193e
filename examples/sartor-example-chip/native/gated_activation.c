/* gated_activation for Sartor's CPU backend: every kind from one polynomial of exp.
 *
 * What the operator means is defined in sartor/ops/functions.py; the call in sartor/kernel.h.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "sartor/kernel.h"

/* 2^n * e^r with x = n ln 2 + r, |r| <= ln(2) / 2; the Taylor series to r^7 leaves 5e-9. Plain
 * arithmetic without calls or branches, so that a compiler can make vectors of it. */
static inline float exp_by_polynomial(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f; /* ln 2 in two parts */
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  union {
    int32_t bits;
    float value;
  } power = {((int32_t)n + 127) << 23};
  return p * power.value;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_by_polynomial(-x)); }

static inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

/* One loop a kind, with x the gate and u what it gates. */
#define FOR_ROWS(expression)                                      \
  for (int64_t r = call->row_begin; r < call->row_end; ++r) {     \
    const float* restrict gate = call->input[0].data + r * width; \
    const float* restrict up = call->input[1].data + r * width;   \
    float* restrict out = call->output[0].data + r * width;       \
    for (int64_t i = 0; i < width; ++i) {                         \
      const float x = gate[i], u = up[i];                         \
      out[i] = (expression);                                      \
    }                                                             \
  }

static int is(const sartor_kernel_call* call, const char* kind) {
  return strcmp(call->kind, kind) == 0;
}

void example_gated_activation(const sartor_kernel_call* call, void* context) {
  (void)context;
  const int64_t width = call->output[0].width;
  if (is(call, "silu")) {
    FOR_ROWS(x * sigmoid(x) * u)
  } else if (is(call, "gelu_tanh")) { /* 0.5 (1 + tanh y) is sigmoid(2 y) */
    FOR_ROWS(x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)) * u)
  } else if (is(call, "gelu")) {
    FOR_ROWS(0.5f * x * (1.0f + erff(x * 0.707106781f)) * u)
  } else if (is(call, "relu")) {
    FOR_ROWS((x > 0.0f ? x : 0.0f) * u)
  } else if (is(call, "sigmoid")) {
    FOR_ROWS(sigmoid(x) * u)
  } else if (is(call, "softplus")) {
    FOR_ROWS(((x > 0.0f ? x : 0.0f) + log1pf(exp_by_polynomial(-fabsf(x)))) * u)
  } else if (is(call, "exp")) {
    FOR_ROWS(exp_by_polynomial(x) * u)
  } else if (is(call, "tanh")) {
    FOR_ROWS((2.0f * sigmoid(2.0f * x) - 1.0f) * u)
  } else if (is(call, "clamped_silu")) {
    FOR_ROWS((x > 7.0f ? 7.0f : x) * sigmoid(1.702f * (x > 7.0f ? 7.0f : x)) *
             (clamp(u, -7.0f, 7.0f) + 1.0f))
  } else { /* a kind of a later Sartor: what cannot be right must be seen */
    FOR_ROWS((x + u) * NAN)
  }
}
