// x86-64 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#include <immintrin.h>
#define SARTOR_ISA avx2
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx2.hpp"
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace sartor
#endif
