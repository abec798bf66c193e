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

bool has_avx512bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// CPUID leaf 7: EDX bits 22 (bf16), 24 (tiles) and 25 (int8); gcc 12 has no name for them.
bool has_amx() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 13) == 13;
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> usable_paths() {
  std::vector<std::string> names;
  if (avx512_kernels() && has_avx512bf16() && has_amx() && amx_kernels()) names.emplace_back("amx");
  if (avx512_kernels() && has_avx512()) {
    names.emplace_back("avx512");
    // AMD's multiply bf16 pairs twice as fast as float32; Intel's half as fast (measured on
    // Sapphire Rapids: 32 operations a cycle).
    if (avx512bf16_kernels() && has_avx512bf16())
      names.insert(is_amd() ? names.end() - 1 : names.end(), "avx512bf16");
  }
  if (avx2_kernels() && has_avx2()) names.emplace_back("avx2");
  names.emplace_back("portable");
  return names;
}

const Kernels* select_kernels(const std::string& name) {
  for (const std::string& usable : usable_paths()) {
    if (name != "auto" && name != usable) continue;
    if (usable == "amx") return amx_kernels();
    if (usable == "avx512bf16") return avx512bf16_kernels();
    if (usable == "avx512") return avx512_kernels();
    if (usable == "avx2") return avx2_kernels();
    return portable_kernels();
  }
  return nullptr;
}

}  // namespace sartor
