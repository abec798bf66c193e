#include "cpu_features.hpp"

namespace sartor {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> usable_paths() {
  std::vector<std::string> names;
  if (avx512_kernels() && has_avx512()) names.emplace_back("avx512");
  if (avx2_kernels() && has_avx2()) names.emplace_back("avx2");
  names.emplace_back("portable");
  return names;
}

const Kernels* select_kernels(const std::string& name) {
  for (const std::string& usable : usable_paths()) {
    if (name != "auto" && name != usable) continue;
    if (usable == "avx512") return avx512_kernels();
    if (usable == "avx2") return avx2_kernels();
    return portable_kernels();
  }
  return nullptr;
}

}  // namespace sartor
