// From canonical weights to the layout that the kernels stream.
//
// Codes of 16 outputs by 32 inputs make a chunk of 64 * bits bytes. Quad q (inputs 4q .. 4q + 3)
// of the chunk is a register of 64 bytes: byte 4n + j is output n, input 4q + j. The planes of a
// chunk follow each other:
//   8 bits        register q as it is
//   4 low bits    byte b of register i is quad i (low nibble) and quad i + 4 (high nibble)
//   2 bits        byte b of register h holds quads 4h .. 4h + 3, two bits each, low to high
//   1 bit         bit b of 64-bit word q
// 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, 3 = 2 + 1.
#pragma once

#include <cstdint>

#include "thread_pool.hpp"

namespace sartor {

// codes [n][k] -> out [ceil(n / 16)][k_padded / 32][64 * bits]; padding is `zero`.
void pack_codes(ThreadPool& pool, const uint8_t* codes, int64_t n, int64_t k, int64_t k_padded,
                int bits, int zero, uint8_t* out);

// values [n][groups] -> fp16 out [ceil(n / 16)][padded_groups][16] of value * factor.
// Returns how many nonzero values lost precision: fell below the least normal number.
int64_t pack_scales(const float* values, int64_t n, int64_t groups, int64_t padded_groups,
                    float factor, uint16_t* out);

// values [n][k] of 2- or 4-byte elements -> out [ceil(n / 16)][k_padded][16]; padding is 0.
void pack_dense(ThreadPool& pool, const uint8_t* values, int64_t n, int64_t k, int64_t k_padded,
                int element_bytes, uint8_t* out);

}  // namespace sartor
