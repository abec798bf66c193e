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
static inline void store_codes(F a, F b, int8_t* codes, int32_t* half_sums) {
  const F top = f_set(127.0f), bottom = f_set(-127.0f);
  const I first = i_from(f_max(f_min(a, top), bottom));
  const I second = i_from(f_max(f_min(b, top), bottom));
  i_store_bytes(codes, first);
  i_store_bytes(codes + 16, second);
  sum_bytes(codes, half_sums);
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
      store_codes(f_mul(f_fma(f_from(i_load_bytes(coarse)), minus, a), inverse),
                  f_mul(f_fma(f_from(i_load_bytes(coarse + 16)), minus, b), inverse),
                  residual_codes + at * kChunk, half_sums + 2 * at);
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

template <int kRows>
static void arrange_tile(const Matrix& w, const QuantizedRows& coarse, const QuantizedRows* fine,
                         int64_t row, int64_t rows, int32_t* tile) {
  static_assert(sizeof(TileEntry<kRows>) <= kRows * kEntryInts * 4);
  const int64_t chunks = w.chunks(), x_chunks = coarse.stride / kChunk;
  const bool halves = w.group == 16;
  const float ratio = w.offset_multiplier / w.scale_multiplier;
  const int count = static_cast<int>(rows < kRows ? rows : kRows);
  auto* first = reinterpret_cast<TileEntry<kRows>*>(tile + tile_header_ints(w.k_padded));
  TileEntry<kRows>* to = first;
  const auto add = [&](const QuantizedRows& x, int64_t c) {
    bool used = false;  // a chunk whose scales are all 0 adds exactly nothing
    for (int m = 0; m < count; ++m) used |= x.scales[(row + m) * x_chunks + c] != 0.0f;
    if (!used) return;
    to->chunk = static_cast<int32_t>(c);
    to->group = static_cast<int32_t>(c * kChunk / w.group);
    for (int m = 0; m < kRows; ++m) {
      const int64_t at = (row + m) * x_chunks + c;
      if (m >= count || x.scales[at] == 0.0f) {
        std::memset(to->codes[m], 0, kChunk);
        to->scale[m] = 0.0f;
        to->term[0][m].correction = to->term[1][m].correction = 0;
        continue;
      }
      std::memcpy(to->codes[m], x.codes + at * kChunk, kChunk);
      to->scale[m] = x.scales[at];
      const int32_t head = x.half_sums[2 * at], tail = x.half_sums[2 * at + 1];
      const int32_t sums[2] = {halves ? head : head + tail, tail};
      for (int part = 0; part < 2; ++part) {
        if (w.has_offset)
          to->term[part][m].sum = x.scales[at] * static_cast<float>(sums[part]) * ratio;
        else to->term[part][m].correction = -w.zero * sums[part];
      }
    }
    ++to;
  };
  for (int64_t panel = 0; panel * kPanelChunks < chunks; ++panel) {
    const int64_t begin = panel * kPanelChunks;
    const int64_t end = begin + kPanelChunks < chunks ? begin + kPanelChunks : chunks;
    tile[panel] = static_cast<int32_t>(to - first);
    for (int64_t c = begin; c < end; ++c) add(coarse, c);
    if (fine)
      for (int64_t c = begin; c < end; ++c) add(*fine, c);
    tile[panel + 1] = static_cast<int32_t>(to - first);
  }
}
