// Measured ceilings of this machine: what the best loop can reach, in operations or bytes a second.
#pragma once

#include "kernels.hpp"
#include "thread_pool.hpp"

namespace sartor {

struct Ceilings {
  double read_bytes = 0;  // streaming read from memory
  double int8_ops = 0;    // multiply and add count as two
  double fp32_ops = 0;
};

// Takes about `seconds` for each of the three; every thread of the pool works.
Ceilings measure_ceilings(ThreadPool& pool, const Kernels& kernels, double seconds);

}  // namespace sartor
