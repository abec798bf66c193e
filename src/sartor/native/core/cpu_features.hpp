// Which instruction-set paths this build has and this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace sartor {

// Names of usable paths, best first.
std::vector<std::string> usable_paths();

// The path of that name, or the best one for "auto"; null where it cannot run here.
const Kernels* select_kernels(const std::string& name);

// Whether the processor multiplies pairs of bfloat16.
bool has_avx512bf16();

// Instructions of 256 or 512 bits that multiply and add which a core can start in a cycle: a
// property of the processor, not of the instruction set. 0 where it is not known.
int multiplies_per_cycle(int bits);

}  // namespace sartor
