// 2^(16 t) in double by multiplications and additions alone: of doubles or of vectors of them, and
// for every instruction set the same bits.
#pragma once

#include <cstdint>
#include <cstring>

// Unrolled, so that the arrays are registers: N chains of operations run side by side, and none
// waits for the one before it.
#define SARTOR_CHAINS _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)

namespace sartor {

// D and L are double and int64_t, or vectors of as many. For t within [-60, 60]; relative error
// below 1e-13, and none for whole 16 t. Static: code for a wide instruction set must not be merged
// into that of an older machine.
template <typename D, typename L, int N>
static inline void exp2_of_16(const D (&t)[N], D (&power)[N]) {
  D shifted[N], r[N], p[N];
  SARTOR_CHAINS shifted[i] = t[i] + 0x1.8p48;  // the nearest whole 16 t stands in its low bits
  SARTOR_CHAINS r[i] = t[i] - (shifted[i] - 0x1.8p48);
  // 2^r on [-1/32, 1/32], fitted for the least relative error; then to the 16th power.
  SARTOR_CHAINS p[i] = r[i] * 0x1.5d862bf8aca02p-10 + 0x1.3b2c78bd3d736p-7;
  SARTOR_CHAINS p[i] = p[i] * r[i] + 0x1.c6b08d771de92p-5;
  SARTOR_CHAINS p[i] = p[i] * r[i] + 0x1.ebfbdff5ffbfep-3;
  SARTOR_CHAINS p[i] = p[i] * r[i] + 0x1.62e42fefa3981p-1;
  SARTOR_CHAINS p[i] = p[i] * r[i] + 1.0;
  SARTOR_CHAINS p[i] = p[i] * p[i];
  SARTOR_CHAINS p[i] = p[i] * p[i];
  SARTOR_CHAINS p[i] = p[i] * p[i];
  SARTOR_CHAINS p[i] = p[i] * p[i];
  SARTOR_CHAINS {
    L whole, bits;
    std::memcpy(&whole, &shifted[i], sizeof(D));
    std::memcpy(&bits, &p[i], sizeof(D));
    bits += whole << 52;
    std::memcpy(&power[i], &bits, sizeof(D));
  }
}

}  // namespace sartor

#undef SARTOR_CHAINS
