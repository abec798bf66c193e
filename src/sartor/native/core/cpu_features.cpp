#include "cpu_features.hpp"

#include <algorithm>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
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

}  // namespace

namespace {

// Family and model as AMD's and Intel's manuals count them; 0 for other vendors.
struct Model {
  unsigned family = 0, model = 0;
};

Model amd_or_intel_model([[maybe_unused]] const char* vendor) {
  Model found;
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool amd = vendor[0] == 'a';
  if (!(amd ? __builtin_cpu_is("amd") : __builtin_cpu_is("intel"))) return found;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  found = {eax >> 8 & 15, eax >> 4 & 15};
  if (found.family == 6 || found.family == 15) found.model |= eax >> 12 & 0xf0;
  if (found.family == 15) found.family += eax >> 20 & 0xff;
#endif
  return found;
}

bool one_of(unsigned model, std::initializer_list<unsigned> models) {
  return std::find(models.begin(), models.end(), model) != models.end();
}

}  // namespace

// Throughput of VFMADD231PS, VPMADDUBSW and VPDPBUSD by microarchitecture: uops.info, and Agner
// Fog, "Instruction tables".
int multiplies_per_cycle(int bits) {
  const bool wide = bits == 512;
  if (const auto [family, model] = amd_or_intel_model("amd"); family) {
    if (family == 0x17) return wide ? 0 : model < 0x30 ? 1 : 2;  // Zen and Zen+: halves; Zen 2
    if (family == 0x19) return wide ? 1 : 2;                     // Zen 3 and 4
    if (family != 0x1a) return 0;
    // Zen 5: servers and desktops have all of it, two kinds for laptops a half.
    if (!wide || model < 0x20 || (model & 0xf0) == 0x40) return 2;
    return model < 0x40 || (model & 0xf0) == 0x60 ? 1 : 0;
  }
  if (const auto [family, model] = amd_or_intel_model("intel"); family == 6) {
    if (leaf7(0).edx >> 15 & 1) return 0;                   // large and small cores
    if (one_of(model, {0xbe, 0xaf, 0xb6, 0xdd})) return 0;  // small cores alone
    if (!wide) return 2;
    if (one_of(model, {0x6a, 0x6c, 0x8f, 0xcf, 0xad, 0xae})) return 2;  // servers from Ice Lake on
    if (one_of(model, {0x7d, 0x7e, 0x8c, 0x8d, 0xa7})) return 1;        // Ice, Tiger, Rocket Lake
    // Skylake and Cascade Lake have one or two, which only the product's name tells.
  }
  return 0;
}

// EAX bit 5.
bool has_avx512bf16() { return has_avx512() && (leaf7(1).eax >> 5 & 1); }

namespace {

// Whether pairs of bf16 are multiplied faster than float32: to be expected of AMD's processors
// (not measured), and not of Intel's (the probe of the avx512 path finds half the speed).
bool has_fast_bf16() {
#if defined(__x86_64__)
  return has_avx512bf16() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}
bool has_slow_bf16() { return has_avx512bf16() && !has_fast_bf16(); }

// EDX bits 22 (bf16), 24 (tiles) and 25 (int8).
bool has_amx() { return has_avx512bf16() && (leaf7(0).edx >> 22 & 13) == 13; }

// Linux, arch/arm64/include/uapi/asm/hwcap.h: spelt out, as older headers lack the later ones.
bool has_neon() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kFphp = 1 << 9, kAsimdhp = 1 << 10, kAsimddp = 1 << 20;
  constexpr unsigned long kNeeded = kFphp | kAsimdhp | kAsimddp;
  return (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kI8mm = 1 << 13;
  return has_neon() && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#else
  return false;
#endif
}

// EAX bit 4.
bool has_avxvnni() { return has_avx2() && (leaf7(1).eax >> 4 & 1); }

bool always() { return true; }

struct Path {
  const char* name;
  bool (*runs)();
  const Kernels* (*kernels)();  // asked only where it runs
};

// Best first.
constexpr Path kPaths[] = {{"amx", has_amx, amx_kernels},
                           {"avx512bf16", has_fast_bf16, avx512bf16_kernels},
                           {"avx512", has_avx512, avx512_kernels},
                           {"avx512bf16", has_slow_bf16, avx512bf16_kernels},
                           {"avxvnni", has_avxvnni, avxvnni_kernels},
                           {"avx2", has_avx2, avx2_kernels},
                           {"i8mm", has_i8mm, i8mm_kernels},
                           {"neon", has_neon, neon_kernels},
                           {"portable", always, portable_kernels}};

}  // namespace

std::vector<std::string> usable_paths() {
  std::vector<std::string> names;
  for (const Path& path : kPaths)
    if (path.runs() && path.kernels()) names.emplace_back(path.name);
  return names;
}

const Kernels* select_kernels(const std::string& name) {
  for (const Path& path : kPaths) {
    if (name != "auto" && name != path.name) continue;
    if (const Kernels* kernels = path.runs() ? path.kernels() : nullptr) return kernels;
  }
  return nullptr;
}

}  // namespace sartor
