// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define SARTOR_ISA avx512
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_avx512.hpp"
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace sartor
#endif
