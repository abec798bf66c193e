// The path of any machine: plain C++.
#define SARTOR_ISA portable
#define SARTOR_VEC "vec_portable.hpp"
#include "kernels_impl.inc.hpp"

namespace sartor {
const Kernels* portable_kernels() { return &portable::kTable; }
}  // namespace sartor
