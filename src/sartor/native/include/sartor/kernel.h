/* The public interface of the CPU backend's row kernels.
 *
 * A kernel takes the place of Sartor's own for one operator that treats every row by itself:
 * rms_norm, layer_norm, l2_norm, add_rms_norm, activation, gated_activation, add, mul, scale,
 * softcap. What an operator means is defined in numpy (sartor/ops/functions.py), and
 * `sartor conformance` compares.
 *
 * A kernel is called from several threads at once, each with its own range of rows. It must
 * write rows [row_begin, row_end) of every output, nothing else, and give a row the same result
 * whatever the range is. It must not throw, and must not call back.
 */
#ifndef SARTOR_KERNEL_H
#define SARTOR_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SARTOR_KERNEL_ABI 1

/* float32, row-major: row r begins at data + r * width. */
typedef struct sartor_rows {
  float* data;
  int64_t width;
} sartor_rows;

/* A weight of the operator: `size` floats, or a null pointer where an optional one is absent. */
typedef struct sartor_vector {
  const float* data;
  int64_t size;
} sartor_vector;

typedef struct sartor_kernel_call {
  uint32_t abi;     /* SARTOR_KERNEL_ABI of the caller */
  const char* op;   /* the operator's name */
  const char* kind; /* of activations: "silu", ...; else "" */
  int32_t inputs;   /* entries of `input` */
  const sartor_rows* input;
  int32_t weights; /* entries of `weight`, in the operator's order */
  const sartor_vector* weight;
  int32_t outputs; /* entries of `output` */
  const sartor_rows* output;
  int64_t row_begin, row_end;
  float eps, weight_offset; /* norms */
  float factor, cap;        /* scale, softcap */
  int64_t run;              /* features that are normalised together; 0: the whole row */
} sartor_kernel_call;

/* `context` is the pointer that was registered beside the function. */
typedef void (*sartor_kernel)(const sartor_kernel_call* call, void* context);

#ifdef __cplusplus
}
#endif

#endif
