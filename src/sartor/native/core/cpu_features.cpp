#include "cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// CPUID leaf 7, for what gcc 12 has no name for.
Leaf leaf7([[maybe_unused]] unsigned part) {
  Leaf found;
#if defined(__x86_64__)
  __get_cpuid_count(7, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
#endif
  return found;
}

// EDX bits 24 (tiles) and 25 (int8).
bool has_amx() { return (leaf7(0).edx >> 24 & 3) == 3; }

}  // namespace

bool has_bf16_vectors() { return has_avx512() && (leaf7(1).eax >> 5 & 1); }
bool has_bf16_tiles() { return has_amx() && (leaf7(0).edx >> 22 & 1); }

std::vector<std::string> usable_paths() {
  std::vector<std::string> names;
  if (avx512_kernels() && has_avx512() && has_amx() && amx_kernels()) names.emplace_back("amx");
  if (avx512_kernels() && has_avx512()) names.emplace_back("avx512");
  if (avx2_kernels() && has_avx2()) names.emplace_back("avx2");
  names.emplace_back("portable");
  return names;
}

const Kernels* select_kernels(const std::string& name) {
  for (const std::string& usable : usable_paths()) {
    if (name != "auto" && name != usable) continue;
    if (usable == "amx") return amx_kernels();
    if (usable == "avx512") return avx512_kernels();
    if (usable == "avx2") return avx2_kernels();
    return portable_kernels();
  }
  return nullptr;
}

}  // namespace sartor
