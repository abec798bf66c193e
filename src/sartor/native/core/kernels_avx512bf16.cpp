// x86-64 with AVX-512 BF16 on top of the AVX-512 path: attention over a bf16 state.
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define SARTOR_ISA avx512bf16
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx512.hpp"
#define SARTOR_ATTENTION_ONLY
#include "kernels_impl.inc.hpp"

namespace sartor {
namespace avx512bf16 {

static void attention_pairs(const AttentionTask& t) {
  if (t.layout.storage == Storage::kBf16) attend<Lanes<KvBf16Pairs>>(t);
  else avx512_kernels()->attention(t);
}

}  // namespace avx512bf16

const Kernels* avx512bf16_kernels() {
  static const Kernels table = [] {
    Kernels kernels = *avx512_kernels();
    kernels.name = "avx512bf16";
    kernels.attention = avx512bf16::attention_pairs;
    return kernels;
  }();
  return &table;
}
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace sartor
#endif
