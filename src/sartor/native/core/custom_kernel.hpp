// Kernels of other packages, called through the public C interface (include/sartor/kernel.h).
#pragma once

#include <string>

#include "sartor/kernel.h"

namespace sartor {

struct RowKernel {
  sartor_kernel function = nullptr;
  void* context = nullptr;
  std::string op, kind;  // what the call says of the operator
};

}  // namespace sartor
