// How a block of the paged state holds the keys and values of one kv head.
//
//   keys    [block_size / 16][key steps][16 positions][pack]   a step: `pack` features
//   values  [value runs][block_size / pack][16 features][pack] a run: 16 features
//
// Sixteen lanes lie side by side, and bf16 in pairs, as its dot products read them: pairs of
// features in keys, of positions in values. Both are whole tiles of AMX as they are.
#pragma once

#include <cstdint>

#include "storage.hpp"

namespace sartor {

struct KvLayout {
  Storage storage = Storage::kBf16;
  int64_t head_dim = 64, value_dim = 64, block_size = 32;

  SARTOR_INLINE int64_t pack() const { return storage == Storage::kBf16 ? 2 : 1; }
  SARTOR_INLINE int64_t step_bytes() const { return kLanes * pack() * storage_bytes(storage); }
  SARTOR_INLINE int64_t key_steps() const { return (head_dim + pack() - 1) / pack(); }
  SARTOR_INLINE int64_t group_bytes() const {
    return key_steps() * step_bytes();
  }  // keys of 16 positions
  SARTOR_INLINE int64_t key_bytes() const { return block_size / kLanes * group_bytes(); }
  // Positions whose values are weighed as a whole: those not yet written are zero.
  SARTOR_INLINE int64_t chunk() const { return block_size < 32 ? block_size : 32; }
  SARTOR_INLINE int64_t chunk_bytes() const {
    return chunk() / pack() * step_bytes();
  }  // of one run
  SARTOR_INLINE int64_t value_stride() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
  SARTOR_INLINE int64_t run_bytes() const { return block_size / pack() * step_bytes(); }
  SARTOR_INLINE int64_t value_bytes() const { return value_stride() / kLanes * run_bytes(); }
};

}  // namespace sartor
