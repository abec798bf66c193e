#include "packing.hpp"

#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace sartor {
namespace {

void pack_chunk(const uint8_t (&quads)[8][64], int bits, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(64 * bits));
  if (bits == 8) {
    std::memcpy(out, quads, 512);
    return;
  }
  int done = 0;
  if (bits >= 4) {
    for (int i = 0; i < 4; ++i)
      for (int b = 0; b < 64; ++b)
        out[64 * i + b] = static_cast<uint8_t>((quads[i][b] & 15) | ((quads[i + 4][b] & 15) << 4));
    out += 256;
    done = 4;
  }
  if (bits - done >= 2) {
    for (int q = 0; q < 8; ++q)
      for (int b = 0; b < 64; ++b)
        out[64 * (q / 4) + b] |= static_cast<uint8_t>(((quads[q][b] >> done) & 3) << (2 * (q % 4)));
    out += 128;
    done += 2;
  }
  if (bits - done == 1) {
    for (int q = 0; q < 8; ++q)
      for (int b = 0; b < 64; ++b)
        out[8 * q + b / 8] |= static_cast<uint8_t>(((quads[q][b] >> done) & 1) << (b % 8));
  }
}

}  // namespace

void pack_codes(ThreadPool& pool, const uint8_t* codes, int64_t n, int64_t k, int64_t k_padded,
                int bits, int zero, uint8_t* out) {
  const int64_t blocks = (n + kLanes - 1) / kLanes, chunks = k_padded / kChunk;
  pool.run(blocks, [&](int64_t block, int) {
    for (int64_t c = 0; c < chunks; ++c) {
      uint8_t quads[8][64];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = block * kLanes + lane;
        uint8_t run[kChunk];
        const int64_t begin = c * kChunk;
        const int64_t count =
            row < n ? (k - begin < kChunk ? (k > begin ? k - begin : 0) : kChunk) : 0;
        if (count > 0) std::memcpy(run, codes + row * k + begin, static_cast<size_t>(count));
        std::memset(run + count, zero, static_cast<size_t>(kChunk - count));
        for (int q = 0; q < 8; ++q) std::memcpy(&quads[q][4 * lane], run + 4 * q, 4);
      }
      pack_chunk(quads, bits, out + (block * chunks + c) * 64 * bits);
    }
  });
}

int64_t pack_scales(const float* values, int64_t n, int64_t groups, int64_t padded_groups,
                    float factor, uint16_t* out) {
  const Kernels& kernels = *portable_kernels();
  const int64_t blocks = (n + kLanes - 1) / kLanes;
  int64_t lost = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t g = 0; g < padded_groups; ++g) {
      float lanes[kLanes] = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = block * kLanes + lane;
        if (row < n && g < groups) lanes[lane] = values[row * groups + g] * factor;
        const float size = std::fabs(lanes[lane]);
        if (size != 0.0f && size < 6.103515625e-05f) ++lost;
      }
      kernels.narrow(lanes, kLanes, Storage::kFp16,
                     reinterpret_cast<uint8_t*>(out + (block * padded_groups + g) * kLanes));
    }
  }
  return lost;
}

void pack_dense(ThreadPool& pool, const uint8_t* values, int64_t n, int64_t k, int64_t k_padded,
                int element_bytes, uint8_t* out) {
  const int64_t blocks = (n + kLanes - 1) / kLanes;
  const auto size = static_cast<size_t>(element_bytes);
  pool.run(blocks, [&](int64_t block, int) {
    uint8_t* to = out + block * k_padded * kLanes * element_bytes;
    std::memset(to, 0, static_cast<size_t>(k_padded * kLanes) * size);
    for (int lane = 0; lane < kLanes && block * kLanes + lane < n; ++lane) {
      const uint8_t* from = values + (block * kLanes + lane) * k * element_bytes;
      for (int64_t i = 0; i < k; ++i)
        std::memcpy(to + (i * kLanes + lane) * element_bytes, from + i * element_bytes, size);
    }
  });
}

}  // namespace sartor
