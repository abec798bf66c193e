// Element types of weights and of the paged state.
#pragma once

#include <cstdint>

namespace sartor {

// For what several instruction-set paths call: a copy compiled for one must not serve another.
#define SARTOR_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;  // output features in a column block; lanes of a vector

enum class Storage : int32_t {
  kFp32 = 0,
  kFp16 = 1,
  kBf16 = 2,
  kAffine = 3,
  kLookup = 4,
  kFp8 = 5,
  kInt8 = 6  // of the state: codes, and a scale for each vector
};

SARTOR_INLINE int64_t storage_bytes(Storage storage) {
  return storage == Storage::kFp32                               ? 4
         : storage == Storage::kFp8 || storage == Storage::kInt8 ? 1
                                                                 : 2;
}

}  // namespace sartor
