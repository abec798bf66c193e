// What the probes of all paths share: a chain of instructions to tell the clock by, and data.
#pragma once

#include <cstdint>

namespace sartor {

// Cycles of a link; 0 where we know no instruction for it.
#if defined(__x86_64__) || defined(__aarch64__)
constexpr int kLinkCycles = 3;
#else
constexpr int kLinkCycles = 0;
#endif

// Links that wait for each other, beside whatever else a loop does. Not additions on x86-64: some
// processors add small constants while they rename registers. A product takes three cycles on
// Intel's cores since Nehalem and AMD's since Zen.
static inline void chain([[maybe_unused]] uint64_t& x, [[maybe_unused]] int64_t links) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < links; ++i) asm volatile("imul %0, %0" : "+r"(x));
#elif defined(__aarch64__)
  const uint64_t y = 5;
  for (int64_t i = 0; i < links; ++i)
    asm volatile("eor %0, %0, %1\n\teor %0, %0, %1\n\teor %0, %0, %1" : "+r"(x) : "r"(y));
#endif
}

// Bytes without a pattern: a processor may run faster on zeros, as they need less power.
template <int kBytes>
struct ProbeData {
  alignas(64) uint8_t bytes[kBytes];

  ProbeData() {
    uint32_t state = 1;
    for (uint8_t& byte : bytes) {
      state = state * 1664525u + 1013904223u;
      byte = static_cast<uint8_t>(state >> 24);
    }
  }
  // Numbers in [0.5, 1), whose sums stay finite, from every pair or four bytes.
  void make_bf16() {
    for (int i = 1; i < kBytes; i += 2) bytes[i] = 0x3f;
    for (int i = 0; i < kBytes; i += 2) bytes[i] &= 0x7f;
  }
  void make_fp32() {
    for (int i = 3; i < kBytes; i += 4) bytes[i] = 0x3f;
    for (int i = 2; i < kBytes; i += 4) bytes[i] &= 0x7f;
  }
};

}  // namespace sartor
