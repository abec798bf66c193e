// Measured ceilings of this machine: what the best loop can reach, in operations or bytes a second.
#pragma once

#include "kernels.hpp"
#include "thread_pool.hpp"

namespace sartor {

// One kind of arithmetic.
struct Peak {
  double ops = 0;    // a second, all threads together; 0 where there is no such arithmetic
  double clock = 0;  // cycles a second while it is done; 0 where we know no way to tell
  double width = 0;  // operations that a core can start in a cycle; 0 where that is not known
};

struct Ceilings {
  double read_bytes = 0;  // a second, streaming from memory
  Peak int8, fp32, bf16;
};

// Takes about `seconds` for each of the four; every thread of the pool works. With `own_cores`, a
// core for each thread, arithmetic is timed by what a thread ran: what other processes take does
// not count. Memory, and a core that threads share, are timed together.
Ceilings measure_ceilings(ThreadPool& pool, const Kernels& kernels, bool own_cores, double seconds);

}  // namespace sartor
