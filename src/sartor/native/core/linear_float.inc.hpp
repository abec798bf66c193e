// Weights as float32: single rows (embedding), and linear layers whose activations stay float32.

template <int kBits>
static void dequantize_bits(const Matrix& w, int64_t block, int64_t chunk, float* out) {
  Q bytes[8];
  unpack_codes<kBits>(w, w.codes + (block * w.chunks() + chunk) * 64 * kStoredBits<kBits>, bytes);
  const int64_t groups = w.k_padded / w.group;
  const F zero = f_set(static_cast<float>(w.zero));
  for (int i = 0; i < 8; ++i) {
    const int64_t group = (chunk * kChunk + 4 * i) / w.group;
    const F s =
        f_mul(f_load_fp16(w.scales + (block * groups + group) * kLanes), f_set(w.scale_multiplier));
    F o = f_set(0.0f);
    if (w.has_offset)
      o = f_mul(f_load_fp16(w.offsets + (block * groups + group) * kLanes),
                f_set(w.offset_multiplier));
    f_store(out + 64 * i, f_fma(f_sub(f_byte<0>(bytes[i]), zero), s, o));
    f_store(out + 64 * i + 16, f_fma(f_sub(f_byte<1>(bytes[i]), zero), s, o));
    f_store(out + 64 * i + 32, f_fma(f_sub(f_byte<2>(bytes[i]), zero), s, o));
    f_store(out + 64 * i + 48, f_fma(f_sub(f_byte<3>(bytes[i]), zero), s, o));
  }
}

// One chunk of 32 inputs by 16 outputs as float32, whatever the storage: out [32][16].
static void dequantize_chunk(const Matrix& w, int64_t block, int64_t chunk, float* out) {
  const int64_t first = chunk * kChunk;
  switch (w.storage) {
    case Storage::kAffine:
      switch (w.bits) {
        case 2:
          return dequantize_bits<2>(w, block, chunk, out);
        case 3:
          return dequantize_bits<3>(w, block, chunk, out);
        case 4:
          return dequantize_bits<4>(w, block, chunk, out);
        case 5:
          return dequantize_bits<5>(w, block, chunk, out);
        case 6:
          return dequantize_bits<6>(w, block, chunk, out);
        case 7:
          return dequantize_bits<7>(w, block, chunk, out);
        default:
          return dequantize_bits<8>(w, block, chunk, out);
      }
    case Storage::kLookup:
      return dequantize_bits<0>(w, block, chunk, out);
    case Storage::kFp32: {
      const float* from =
          reinterpret_cast<const float*>(w.codes) + (block * w.k_padded + first) * 16;
      std::memcpy(out, from, 32 * 16 * 4);
      return;
    }
    case Storage::kFp8: {
      const uint8_t* from = w.codes + (block * w.k_padded + first) * 16;
      const int64_t groups = w.k_padded / w.group;
      for (int i = 0; i < 32; ++i) {
        // E4M3 has the layout of fp16 with four bits less of exponent bias and fewer bits.
        uint16_t halves[16];
        for (int lane = 0; lane < 16; ++lane) {
          const int byte = from[16 * i + lane];
          halves[lane] = static_cast<uint16_t>(((byte & 0x80) << 8) | ((byte & 0x7f) << 7));
        }
        const uint16_t* scales = w.scales + (block * groups + (first + i) / w.group) * kLanes;
        const F s = f_mul(f_load_fp16(scales), f_set(256.0f * w.scale_multiplier));
        f_store(out + 16 * i, f_mul(f_load_fp16(halves), s));
      }
      return;
    }
    default: {
      const uint16_t* from =
          reinterpret_cast<const uint16_t*>(w.codes) + (block * w.k_padded + first) * 16;
      for (int i = 0; i < 32; ++i)
        f_store(out + 16 * i, w.storage == Storage::kBf16 ? f_load_bf16(from + 16 * i)
                                                          : f_load_fp16(from + 16 * i));
    }
  }
}

template <int kRows>
static void fp32_rows(const Matrix& w, int64_t block, const float* x, int64_t x_stride, int64_t row,
                      const LinearOutput& out) {
  F total[kRows];
  SARTOR_UNROLL
  for (int m = 0; m < kRows; ++m) total[m] = f_set(0.0f);
  const float* a = x + row * x_stride;
  float buffer[32 * 16];
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const float* tile = buffer;
    if (w.storage == Storage::kFp32)
      tile = reinterpret_cast<const float*>(w.codes) + (block * w.k_padded + c * kChunk) * 16;
    else dequantize_chunk(w, block, c, buffer);
    const int64_t begin = c * kChunk;
    const int64_t count = w.k - begin < kChunk ? w.k - begin : kChunk;
    SARTOR_NO_UNROLL
    for (int64_t i = 0; i < count; ++i) {
      const F column = f_load(tile + 16 * i);
      SARTOR_UNROLL
      for (int m = 0; m < kRows; ++m)
        total[m] = f_fma(column, f_set(a[m * x_stride + begin + i]), total[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) store_columns(w, block, out, row + m, total[m]);
}

static void linear_fp32(const Matrix& w, int64_t block_begin, int64_t block_end, const float* x,
                        int64_t x_stride, int64_t rows, const LinearOutput& out) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    int64_t row = 0;
    for (; row + kRowTile <= rows; row += kRowTile)
      fp32_rows<kRowTile>(w, block, x, x_stride, row, out);
    if constexpr (kRowTile >= 4)
      for (; row + 4 <= rows; row += 4) fp32_rows<4>(w, block, x, x_stride, row, out);
    for (; row < rows; ++row) fp32_rows<1>(w, block, x, x_stride, row, out);
  }
}

static void dequantize_row(const Matrix& w, int64_t row, float factor, float* out) {
  const int64_t block = row / kLanes, lane = row % kLanes;
  float buffer[32 * 16];
  for (int64_t c = 0; c < w.chunks(); ++c) {
    dequantize_chunk(w, block, c, buffer);
    const int64_t begin = c * kChunk;
    const int64_t count = w.k - begin < kChunk ? w.k - begin : kChunk;
    for (int64_t i = 0; i < count; ++i)
      out[w.permutation ? w.permutation[begin + i] : begin + i] = buffer[16 * i + lane] * factor;
  }
}
