// ARMv8.2-A with the integer dot product.
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define SARTOR_ISA neon
#define SARTOR_REGISTERS
#define SARTOR_VEC "vec_neon.hpp"
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* neon_kernels() { return &neon::kTable; }
}  // namespace sartor
#else
#include "kernels.hpp"
namespace sartor {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace sartor
#endif
