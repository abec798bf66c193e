// Activations as int8 codes by chunks of 32 features, and what the codes leave over.

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
static inline I codes_of(F x) { return i_from(f_max(f_min(x, f_set(127.0f)), f_set(-127.0f))); }

// Four chunks at once: the largest of each takes as long to find as that of one.
constexpr int kQuantized = 4;
static inline void quantize_chunks(const float* x, int8_t* codes, float* scales,
                                   int32_t* half_sums) {
  F halves[2 * kQuantized], tops[kQuantized];
  SARTOR_UNROLL
  for (int j = 0; j < kQuantized; ++j) {
    halves[2 * j] = f_load(x + j * kChunk);
    halves[2 * j + 1] = f_load(x + j * kChunk + 16);
    tops[j] = f_max(f_abs(halves[2 * j]), f_abs(halves[2 * j + 1]));
  }
  // As one vector: scalar divisions would wait for each other.
  using Four = float __attribute__((vector_size(16)));
  static_assert(sizeof(Four) == kQuantized * sizeof(float));
  float top[kQuantized], inverse[kQuantized];
  f_tops(tops, top);
  Four scale;
  std::memcpy(&scale, top, sizeof scale);
  scale /= 127.0f;
  const Four reciprocal = scale > 0.0f ? 1.0f / scale : Four{};
  std::memcpy(scales, &scale, sizeof scale);
  std::memcpy(inverse, &reciprocal, sizeof inverse);
  SARTOR_UNROLL
  for (int j = 0; j < kQuantized; j += 2) {
    const F first = f_set(inverse[j]), second = f_set(inverse[j + 1]);
    const I four[4] = {
        codes_of(f_mul(halves[2 * j], first)), codes_of(f_mul(halves[2 * j + 1], first)),
        codes_of(f_mul(halves[2 * j + 2], second)), codes_of(f_mul(halves[2 * j + 3], second))};
    i_store_bytes(codes + j * kChunk, four);
  }
  sum_bytes_of_128(codes, half_sums);
}

static void quantize_rows(const float* x, int64_t rows, int64_t k, int64_t x_stride, int8_t* codes,
                          float* scales, int32_t* half_sums, int64_t stride) {
  constexpr int64_t kStep = kQuantized * kChunk;
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    for (int64_t i = 0; i < stride; i += kStep) {
      const int64_t at = (r * stride + i) / kChunk;
      const float* from = x + i;
      float end[kStep];
      if (i + kStep > k) {
        const int64_t left = k > i ? k - i : 0;
        for (int64_t j = 0; j < kStep; ++j) end[j] = j < left ? from[j] : 0.0f;
        from = end;
      }
      quantize_chunks(from, codes + at * kChunk, scales + at, half_sums + 2 * at);
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
        residual_scales[at] = 0.0f;  // its codes are not read
        continue;
      }
      F a, b;
      load_chunk(x + r * x_stride, c * kChunk, k, a, b);
      const int8_t* coarse = codes + at * kChunk;
      const F minus = f_set(-scale);
      const float fine = scale / 256.0f;
      const F inverse = f_set(1.0f / fine);
      residual_scales[at] = fine;
      int8_t* to = residual_codes + at * kChunk;
      i_store_bytes(to, codes_of(f_mul(f_fma(f_from(i_load_bytes(coarse)), minus, a), inverse)));
      i_store_bytes(to + 16,
                    codes_of(f_mul(f_fma(f_from(i_load_bytes(coarse + 16)), minus, b), inverse)));
      sum_bytes(to, half_sums + 2 * at);
    }
  }
}

// The activations of kRows rows for one chunk of inputs. `correction` is -zero * (sum of codes);
// for matrices with stored offsets `sum` is scale * (sum of codes) instead. One a scale group
// within the chunk: two where groups are of 16. Rows past the last are zeros.
template <int kRows>
struct alignas(64) TileEntry {
  int8_t codes[kRows][kChunk];
  float scale[kRows];
  union {
    int32_t correction;
    float sum;
  } term[2][kRows];
  int32_t chunk;  // which chunk of the inputs this is
  int32_t group;  // and its first scale group
};

// The entries of a row tile follow its header: for every panel of kPanelChunks chunks the chunks
// as int8 codes first, then what these left over where some row keeps 16 bits. All kernels add
// in this order. header[p] is the first entry of panel p.
template <int kRows>
static const TileEntry<kRows>* entries_of(const Matrix& w, const int32_t* tile) {
  return reinterpret_cast<const TileEntry<kRows>*>(tile + tile_header_ints(w.k_padded));
}

// A chunk of `count` rows as an entry. kFine: rows without a scale have no codes.
template <int kRows, bool kOffset, bool kHalves, bool kFine>
static void arrange_chunk(const Matrix& w, const QuantizedRows& x, int64_t row, int count,
                          int64_t chunk, TileEntry<kRows>* to) {
  const int64_t chunks = x.stride / kChunk;
  const float ratio = w.offset_multiplier / w.scale_multiplier;
  to->chunk = static_cast<int32_t>(chunk);
  to->group = static_cast<int32_t>(chunk * kChunk / w.group);
  int64_t at = row * chunks + chunk;
  for (int m = 0; m < count; ++m, at += chunks) {
    const float scale = x.scales[at];
    to->scale[m] = scale;
    if (kFine && scale == 0.0f) {
      std::memset(to->codes[m], 0, kChunk);
      to->term[0][m].correction = to->term[1][m].correction = 0;
      continue;
    }
    std::memcpy(to->codes[m], x.codes + at * kChunk, kChunk);
    const int32_t head = x.half_sums[2 * at], tail = x.half_sums[2 * at + 1];
    const int32_t sum = kHalves ? head : head + tail;
    if constexpr (kOffset) {
      to->term[0][m].sum = scale * static_cast<float>(sum) * ratio;
      if (kHalves) to->term[1][m].sum = scale * static_cast<float>(tail) * ratio;
    } else {
      to->term[0][m].correction = -w.zero * sum;
      if (kHalves) to->term[1][m].correction = -w.zero * tail;
    }
  }
  for (int m = count; m < kRows; ++m) {
    std::memset(to->codes[m], 0, kChunk);
    to->scale[m] = 0.0f;
    to->term[0][m].correction = to->term[1][m].correction = 0;
  }
}

template <int kRows, bool kOffset, bool kHalves>
static void arrange_chunks(const Matrix& w, const QuantizedRows& coarse, const QuantizedRows* fine,
                           int64_t row, int count, int32_t* tile) {
  const int64_t chunks = w.chunks(), x_chunks = coarse.stride / kChunk;
  auto* first = reinterpret_cast<TileEntry<kRows>*>(tile + tile_header_ints(w.k_padded));
  TileEntry<kRows>* to = first;
  // A chunk whose scales are all 0 adds exactly nothing. (No scale is negative.)
  const auto used = [&](const QuantizedRows& x, int64_t c) {
    float sum = 0.0f;
    for (int m = 0; m < count; ++m) sum += x.scales[(row + m) * x_chunks + c];
    return sum != 0.0f;
  };
  for (int64_t panel = 0; panel * kPanelChunks < chunks; ++panel) {
    const int64_t begin = panel * kPanelChunks;
    const int64_t end = begin + kPanelChunks < chunks ? begin + kPanelChunks : chunks;
    tile[panel] = static_cast<int32_t>(to - first);
    for (int64_t c = begin; c < end; ++c)
      if (used(coarse, c))
        arrange_chunk<kRows, kOffset, kHalves, false>(w, coarse, row, count, c, to++);
    for (int64_t c = begin; fine && c < end; ++c)
      if (used(*fine, c))
        arrange_chunk<kRows, kOffset, kHalves, true>(w, *fine, row, count, c, to++);
    tile[panel + 1] = static_cast<int32_t>(to - first);
  }
}

template <int kRows>
static void arrange_tile(const Matrix& w, const QuantizedRows& coarse, const QuantizedRows* fine,
                         int64_t row, int64_t rows, int32_t* tile) {
  static_assert(sizeof(TileEntry<kRows>) <= kRows * kEntryInts * 4);
  using Function =
      void (*)(const Matrix&, const QuantizedRows&, const QuantizedRows*, int64_t, int, int32_t*);
  static constexpr Function kFunctions[2][2] = {
      {arrange_chunks<kRows, false, false>, arrange_chunks<kRows, false, true>},
      {arrange_chunks<kRows, true, false>, arrange_chunks<kRows, true, true>}};
  kFunctions[w.has_offset][w.group == 16](w, coarse, fine, row,
                                          static_cast<int>(rows < kRows ? rows : kRows), tile);
}
