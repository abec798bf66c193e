// ARMv8.2-A with the integer dot product and its unsigned-by-signed form: the bits of the NEON
// path, with one instruction where codes use all of a byte.
#if defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
#define SARTOR_ISA i8mm
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_neon.hpp"
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* i8mm_kernels() { return &i8mm::kTable; }
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* i8mm_kernels() { return nullptr; }
}  // namespace sartor
#endif
