// Linear layers over packed weights: int8 and float32 activations.

// 32 features of a row; zeros past its end.
static inline void load_chunk(const float* row, int64_t begin, int64_t k, F& a, F& b) {
  if (begin + kChunk <= k) {
    a = f_load(row + begin);
    b = f_load(row + begin + 16);
    return;
  }
  const int64_t rest = k > begin ? k - begin : 0;
  a = load_part(row + begin, rest < 16 ? rest : 16);
  b = load_part(row + begin + 16, rest > 16 ? rest - 16 : 0);
}

// Rounds to nearest even; codes stay within [-127, 127].
static inline void store_codes(F a, F b, int8_t* codes, int32_t* half_sums) {
  const F top = f_set(127.0f), bottom = f_set(-127.0f);
  int32_t whole[32];
  i_store(whole, i_from(f_max(f_min(a, top), bottom)));
  i_store(whole + 16, i_from(f_max(f_min(b, top), bottom)));
  half_sums[0] = half_sums[1] = 0;
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<int8_t>(whole[i]);
    half_sums[i / 16] += whole[i];
  }
}

static void quantize_rows(const float* x, int64_t rows, int64_t k, int64_t x_stride, int8_t* codes,
                          float* scales, int32_t* half_sums, int64_t stride) {
  const int64_t chunks = stride / kChunk;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < chunks; ++c) {
      F a, b;
      load_chunk(x + r * x_stride, c * kChunk, k, a, b);
      const float scale = f_top(f_max(f_abs(a), f_abs(b))) / 127.0f;
      const F inverse = f_set(scale > 0.0f ? 1.0f / scale : 0.0f);
      scales[r * chunks + c] = scale;
      store_codes(f_mul(a, inverse), f_mul(b, inverse), codes + r * stride + c * kChunk,
                  half_sums + (r * chunks + c) * 2);
    }
  }
}

static void quantize_residual(const float* x, int64_t rows, int64_t k, int64_t x_stride,
                              float threshold, const int8_t* codes, const float* scales,
                              int8_t* residual_codes, float* residual_scales, int32_t* half_sums,
                              int64_t stride) {
  const int64_t chunks = stride / kChunk;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row_scales = scales + r * chunks;
    float squares = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) squares += row_scales[c] * row_scales[c];
    const float least =
        threshold * __builtin_sqrtf(squares / static_cast<float>((k + kChunk - 1) / kChunk));
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = r * chunks + c;
      const float scale = row_scales[c];
      if (scale <= least || scale == 0.0f) {
        residual_scales[at] = 0.0f;
        half_sums[2 * at] = half_sums[2 * at + 1] = 0;
        std::memset(residual_codes + at * kChunk, 0, kChunk);
        continue;
      }
      F a, b;
      load_chunk(x + r * x_stride, c * kChunk, k, a, b);
      float widened[32];
      for (int i = 0; i < 32; ++i) widened[i] = static_cast<float>(codes[at * kChunk + i]);
      const F minus = f_set(-scale);
      const float fine = scale / 256.0f;
      const F inverse = f_set(1.0f / fine);
      residual_scales[at] = fine;
      store_codes(f_mul(f_fma(f_load(widened), minus, a), inverse),
                  f_mul(f_fma(f_load(widened + 16), minus, b), inverse),
                  residual_codes + at * kChunk, half_sums + 2 * at);
    }
  }
}

// One chunk of codes, 64 * kBits bytes, as 8 registers of bytes: register i holds inputs
// 4i .. 4i + 3 of the chunk for each of 16 outputs (layout: packing.hpp).
template <int kBits>
static inline void unpack(const uint8_t* p, Q (&out)[8]) {
  if constexpr (kBits == 8) {
    for (int i = 0; i < 8; ++i) out[i] = q_load(p + 64 * i);
    return;
  }
  if constexpr (kBits >= 4) {
    for (int i = 0; i < 4; ++i) {
      const Q both = q_load(p + 64 * i);
      out[i] = q_field<0>(both, 15);
      out[i + 4] = q_field<4>(both, 15);
    }
    p += 256;
  }
  if constexpr (kBits == 2 || kBits == 3) {
    for (int h = 0; h < 2; ++h) {
      const Q four = q_load(p + 64 * h);
      out[4 * h] = q_field<0>(four, 3);
      out[4 * h + 1] = q_field<2>(four, 3);
      out[4 * h + 2] = q_field<4>(four, 3);
      out[4 * h + 3] = q_field<6>(four, 3);
    }
    p += 128;
  }
  if constexpr (kBits == 6 || kBits == 7) {
    for (int h = 0; h < 2; ++h) {
      const Q four = q_load(p + 64 * h);
      out[4 * h] = q_or_high2<0>(out[4 * h], four);
      out[4 * h + 1] = q_or_high2<2>(out[4 * h + 1], four);
      out[4 * h + 2] = q_or_high2<4>(out[4 * h + 2], four);
      out[4 * h + 3] = q_or_high2<6>(out[4 * h + 3], four);
    }
    p += 128;
  }
  if constexpr (kBits == 3 || kBits == 5 || kBits == 7) {
    for (int i = 0; i < 8; ++i)
      out[i] = q_add_masked(out[i], p + 8 * i, static_cast<uint8_t>(1 << (kBits - 1)));
  }
}

// kBits 0 stands for the lookup family: 4-bit codes through a table.
template <int kBits>
static inline void unpack_codes(const Matrix& w, const uint8_t* p, Q (&out)[8]) {
  if constexpr (kBits == 0) {
    unpack<4>(p, out);
    for (int i = 0; i < 8; ++i) out[i] = q_lookup(out[i], w.table);
  } else {
    unpack<kBits>(p, out);
  }
}
template <int kBits>
constexpr int kStoredBits = kBits == 0 ? 4 : kBits;
template <int kBits>
constexpr int kByteBits = kBits == 0 ? 8 : kBits;  // bits that an unpacked byte may use

static inline void store_columns(const Matrix& w, int64_t block, const LinearOutput& out,
                                 int64_t row, F value) {
  const int64_t column = block * kLanes;
  const int64_t left = w.n - column;
  if (out.bias) value = f_add(value, load_n(out.bias + column, left < 16 ? left : 16));
  float* to = out.data + row * out.stride + column;
  if (out.accumulate) value = f_add(value, load_n(to, left < 16 ? left : 16));
  left >= 16 ? f_store(to, value) : store_part(to, value, left);
}

// The activations of a row tile, rearranged by chunks so that the kernel walks one pointer.
// `correction` is -zero * (sum of codes) and `sum` is scale * (sum of codes): one a scale group
// within the chunk, two where groups are of 16.
template <int kRows>
struct TileChunk {
  int8_t codes[kRows][kChunk];
  int32_t correction[2][kRows];
  float sum[2][kRows];
  float scale[kRows];
  int32_t chunk;  // which chunk of the inputs this is
  int32_t group;  // and its first scale group
};

// Returns how many chunks it wrote: one whose scales are all 0 adds exactly nothing.
template <bool kHalves, int kRows>
static inline int64_t gather_tile(const Matrix& w, const QuantizedRows& x, int64_t row,
                                  TileChunk<kRows>* tile) {
  const int64_t chunks = w.chunks(), x_chunks = x.stride / kChunk;
  const int32_t chunks_a_group = kHalves ? 1 : w.group / kChunk;
  const float ratio = w.offset_multiplier / w.scale_multiplier;
  TileChunk<kRows>* to = tile;
  for (int64_t c = 0; c < chunks; ++c) {
    bool used = false;
    for (int m = 0; m < kRows; ++m) used |= x.scales[(row + m) * x_chunks + c] != 0.0f;
    if (!used) continue;
    to->chunk = static_cast<int32_t>(c);
    to->group = kHalves ? to->chunk * 2 : to->chunk / chunks_a_group;
    for (int m = 0; m < kRows; ++m) {
      const int64_t at = (row + m) * x_chunks + c;
      const int32_t first = x.half_sums[2 * at], second = x.half_sums[2 * at + 1];
      const int32_t sums[2] = {kHalves ? first : first + second, second};
      std::memcpy(to->codes[m], x.codes + at * kChunk, kChunk);
      to->scale[m] = x.scales[at];
      for (int part = 0; part < 2; ++part) {
        to->correction[part][m] = -w.zero * sums[part];
        to->sum[part][m] = x.scales[at] * static_cast<float>(sums[part]) * ratio;
      }
    }
    ++to;
  }
  return to - tile;
}

// kRows rows by one column block.
template <int kBits, bool kHalves, bool kOffset, int kRows>
static inline void int8_tile(const Matrix& w, int64_t block, const TileChunk<kRows>* tile,
                             int64_t count, int64_t row, const LinearOutput& out) {
  constexpr int kParts = kHalves ? 2 : 1;
  constexpr int kBytes = 64 * kStoredBits<kBits>;
  const int64_t chunks = w.chunks(), groups = w.k_padded / w.group;
  const uint8_t* block_codes = w.codes + block * chunks * kBytes;
  const uint16_t* block_scales = w.scales + block * groups * kLanes;
  const uint16_t* block_offsets = kOffset ? w.offsets + block * groups * kLanes : nullptr;
  F total[kRows];
  SARTOR_UNROLL
  for (int m = 0; m < kRows; ++m) total[m] = f_set(0.0f);
  // The rows are unrolled so that the totals stay in registers; unrolling the chunks as well
  // would push them out (gcc 12).
  SARTOR_NO_UNROLL
  for (const TileChunk<kRows>* end = tile + count; tile < end; ++tile) {
    const uint8_t* codes = block_codes + tile->chunk * kBytes;
    const uint16_t* scales = block_scales + tile->group * kLanes;
    const uint16_t* offsets = kOffset ? block_offsets + tile->group * kLanes : nullptr;
    // Few rows wait for memory: a column block is too short for the hardware to run ahead of.
    if constexpr (kRows <= 4)
      for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(codes + kPrefetchBytes + i);
    Q bytes[8];
    unpack_codes<kBits>(w, codes, bytes);
    SARTOR_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const F s = f_load_fp16(scales + part * kLanes);
      const F o = kOffset ? f_load_fp16(offsets + part * kLanes) : s;
      SARTOR_UNROLL
      for (int m = 0; m < kRows; ++m) {
        I dot = i_set(tile->correction[part][m]);
        SARTOR_UNROLL
        for (int i = part * 4; i < (kHalves ? part * 4 + 4 : 8); ++i)
          dot = i_dot<kByteBits<kBits>>(dot, bytes[i], tile->codes[m] + 4 * i);
        total[m] = f_fma(f_from(dot), f_mul(s, f_set(tile->scale[m])), total[m]);
        if constexpr (kOffset) total[m] = f_fma(o, f_set(tile->sum[part][m]), total[m]);
      }
    }
  }
  const F multiplier = f_set(w.scale_multiplier);
  for (int m = 0; m < kRows; ++m)
    store_columns(w, block, out, row + m, f_mul(total[m], multiplier));
}

// The next tile of `left` rows: as many as a kernel takes at once.
static inline int64_t tile_rows(int64_t left) {
  if (kRowTile >= 12 && left >= 12) return 12;
  return kRowTile >= 4 && left >= 4 ? 4 : 1;
}

template <int kRows>
static inline void arrange_tile(const Matrix& w, const QuantizedRows& x, int64_t row,
                                int32_t* arranged) {
  static_assert(sizeof(TileChunk<kRows>) == tile_chunk_ints(kRows) * 4);
  auto* tile = reinterpret_cast<TileChunk<kRows>*>(arranged + kTileHeader);
  const int64_t count =
      w.group == 16 ? gather_tile<true>(w, x, row, tile) : gather_tile<false>(w, x, row, tile);
  arranged[0] = static_cast<int32_t>(count);
}

#if !defined(SARTOR_LINEAR_ONLY)
static void arrange_rows(const Matrix& w, const QuantizedRows& x, int64_t rows, int32_t* arranged) {
  const int64_t stride = arranged_ints(w.k_padded);
  for (int64_t row = 0; row < rows;) {
    const int64_t count = tile_rows(rows - row);
    int32_t* to = arranged + row * stride;
    if (count == 12) arrange_tile<12>(w, x, row, to);
    else if (count == 4) arrange_tile<4>(w, x, row, to);
    else arrange_tile<1>(w, x, row, to);
    row += count;
  }
}
#endif

template <int kBits, bool kHalves, bool kOffset, int kRows>
static void int8_rows(const Matrix& w, int64_t block_begin, int64_t block_end,
                      const int32_t* arranged, int64_t row, const LinearOutput& out) {
  const int32_t* from = arranged + row * arranged_ints(w.k_padded);
  const auto* tile = reinterpret_cast<const TileChunk<kRows>*>(from + kTileHeader);
  for (int64_t block = block_begin; block < block_end; ++block)
    int8_tile<kBits, kHalves, kOffset, kRows>(w, block, tile, from[0], row, out);
}

template <int kBits, bool kHalves, bool kOffset>
static void int8_format(const Matrix& w, int64_t block_begin, int64_t block_end,
                        const int32_t* arranged, int64_t rows, const LinearOutput& out) {
  for (int64_t row = 0; row < rows;) {
    const int64_t count = tile_rows(rows - row);
    if constexpr (kRowTile >= 12)
      if (count == 12)
        int8_rows<kBits, kHalves, kOffset, 12>(w, block_begin, block_end, arranged, row, out);
    if constexpr (kRowTile >= 4)
      if (count == 4)
        int8_rows<kBits, kHalves, kOffset, 4>(w, block_begin, block_end, arranged, row, out);
    if (count == 1)
      int8_rows<kBits, kHalves, kOffset, 1>(w, block_begin, block_end, arranged, row, out);
    row += count;
  }
}

#if !defined(SARTOR_LINEAR_ONLY)
using Int8Function = void (*)(const Matrix&, int64_t, int64_t, const int32_t*, int64_t,
                              const LinearOutput&);
#define SARTOR_BITS(bits)                                                \
  {                                                                      \
    {int8_format<bits, false, false>, int8_format<bits, false, true>}, { \
      int8_format<bits, true, false>, int8_format<bits, true, true>      \
    }                                                                    \
  }
static const Int8Function kInt8Functions[9][2][2] = {
    SARTOR_BITS(0), {{nullptr, nullptr}, {nullptr, nullptr}},
    SARTOR_BITS(2), SARTOR_BITS(3),
    SARTOR_BITS(4), SARTOR_BITS(5),
    SARTOR_BITS(6), SARTOR_BITS(7),
    SARTOR_BITS(8)};
#undef SARTOR_BITS

static void linear_int8(const Matrix& w, int64_t block_begin, int64_t block_end,
                        const int32_t* arranged, int64_t rows, const LinearOutput& out, int32_t*) {
  const int bits = w.storage == Storage::kLookup ? 0 : w.bits;
  kInt8Functions[bits][w.group == 16][w.has_offset](w, block_begin, block_end, arranged, rows, out);
}

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
#endif
