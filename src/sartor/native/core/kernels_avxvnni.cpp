// The AVX2 path with the byte products of AVX-VNNI: one instruction where AVX2 needs two or more.
#if defined(__AVXVNNI__)
#include <immintrin.h>
#define SARTOR_ISA avxvnni
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx2.hpp"
#define SARTOR_LINEAR_ONLY
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* avxvnni_kernels() {
  static const Kernels table = [] {
    Kernels kernels = *avx2_kernels();
    kernels.name = "avxvnni";
    kernels.arrange_rows = avxvnni::arrange_rows;
    kernels.linear_int8 = avxvnni::linear_int8;
    return kernels;
  }();
  return &table;
}
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* avxvnni_kernels() { return nullptr; }
}  // namespace sartor
#endif
