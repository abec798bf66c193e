// Whether a program's parts fit each other: what the executor then relies on without looking.
#pragma once

#include "executor.hpp"

namespace sartor {

// Throws std::invalid_argument, which names the instruction and what does not fit.
void check_program(const ProgramInfo& program);

}  // namespace sartor
