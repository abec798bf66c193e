// 2^t in double by multiplications and additions alone: for a double or a vector of them, and for
// every instruction set the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace sartor {

// D and L are double and int64_t, or vectors of as many. For t within [-1000, 1000], relative
// error below 1e-12; exact for whole numbers. Static: code for a wide instruction set must not be
// merged into that of an older machine.
template <typename D, typename L>
static inline void exp2_of(const D& t, D& power) {
  const D shifted = t + 0x1.8p52;  // the nearest whole number stands in its low bits
  const D r = t - (shifted - 0x1.8p52);
  // (2^r - 1) / r on [-1/2, 1/2], fitted for the least relative error of 2^r.
  D p = r * 0x1.61c4f0efd47fap-20 + 0x1.00d85341ba845p-16;
  p = p * r + 0x1.430aa882b7bf6p-13;
  p = p * r + 0x1.5d874d06fe43ep-10;
  p = p * r + 0x1.3b2ab5ed6fb9cp-7;
  p = p * r + 0x1.c6b08dced3566p-5;
  p = p * r + 0x1.ebfbdff8ede86p-3;
  p = p * r + 0x1.62e42fef89d1ep-1;
  p = p * r + 1.0;
  L whole, bits;
  std::memcpy(&whole, &shifted, sizeof(D));
  std::memcpy(&bits, &p, sizeof(D));
  bits += whole << 52;
  std::memcpy(&power, &bits, sizeof(D));
}

}  // namespace sartor
