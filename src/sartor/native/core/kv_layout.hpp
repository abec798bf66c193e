// How a block of the paged state holds the keys and values of one kv head.
//
//   keys    [block_size / 16][key steps][16 positions][pack]   a step: `pack` features
//   values  [value runs][block_size / pack][16 features][pack] a run: 16 features
//
// Sixteen lanes lie side by side, and bf16 in pairs, int8 in fours, as their dot products read
// them: of features in keys, of positions in values. Both are whole tiles of AMX as they are.
//
// int8 (ops/kv.py): codes are unsigned, 128 more than they mean. Behind the keys of a block are its
// scales in fp16, [block_size] of keys and [block_size] of values.
#pragma once

#include <cstdint>

#include "storage.hpp"

namespace sartor {

constexpr int64_t kScaleBytes = 2;

struct KvLayout {
  Storage storage = Storage::kBf16;
  int64_t head_dim = 64, value_dim = 64, block_size = 32;

  // Shifts, not divisions: kernels ask often.
  SARTOR_INLINE int64_t pack() const { return int64_t{1} << pack_bits(); }
  SARTOR_INLINE int64_t step_bytes() const {
    return (kLanes << pack_bits()) * storage_bytes(storage);
  }
  SARTOR_INLINE int64_t key_steps() const { return (head_dim + pack() - 1) >> pack_bits(); }
  SARTOR_INLINE int64_t group_bytes() const { return key_steps() * step_bytes(); }  // 16 positions
  SARTOR_INLINE int64_t scales_at() const { return block_size / kLanes * group_bytes(); }
  SARTOR_INLINE int64_t key_bytes() const {
    return scales_at() + (storage == Storage::kInt8 ? 2 * block_size * kScaleBytes : 0);
  }
  // Positions whose values are weighed as a whole: those not yet written are zero.
  SARTOR_INLINE int64_t chunk() const {
    const int64_t most = storage == Storage::kInt8 ? 64 : 32;
    return block_size < most ? block_size : most;
  }
  SARTOR_INLINE int64_t chunk_bytes() const { return chunk() * kLanes * storage_bytes(storage); }
  SARTOR_INLINE int64_t value_stride() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
  SARTOR_INLINE int64_t run_bytes() const { return block_size * kLanes * storage_bytes(storage); }
  SARTOR_INLINE int64_t value_bytes() const { return value_stride() / kLanes * run_bytes(); }

 private:
  SARTOR_INLINE int pack_bits() const {
    return storage == Storage::kInt8 ? 2 : storage == Storage::kBf16 ? 1 : 0;
  }
};

}  // namespace sartor
