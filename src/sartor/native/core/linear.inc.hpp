// Linear layers over integer codes and int8 activations.
//
// Few rows read the packed codes as they stream by; more rows share codes that were unpacked to
// bytes, a panel of kPanelChunks chunks by a few column blocks at a time, small enough for the
// first-level cache with the rows' own chunks beside it.

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

// How many of `count` rows go in tiles over unpacked codes; the last tile may have more rows than
// are left. Unpacked codes are there then, so half a tile and more is worth a whole one.
static inline int64_t tiled_rows(int64_t count) {
  if (count <= kDirectRows) return 0;
  return (count / kTileRows + (count % kTileRows > kTileRows / 2)) * kTileRows;
}
// Rows of the next of the others' tiles when `left` are left; it too may have more.
static inline int64_t direct_tile_rows(int64_t left) {
  if (left > 2 && kDirectRows >= 4) return 4;
  return left > 1 && kDirectRows >= 2 ? 2 : 1;
}

// The scales and offsets of a column block.
struct BlockScales {
  const uint16_t *scales, *offsets;
};
template <bool kOffset>
static inline BlockScales block_scales(const Matrix& w, int64_t block) {
  const int64_t at = block * (w.k_padded / w.group) * kLanes;
  return {w.scales + at, kOffset ? w.offsets + at : nullptr};
}

// kRows rows by kBlocks column blocks, straight from the packed codes.
template <int kBits, bool kHalves, bool kOffset, int kRows, int kBlocks>
static void direct_tile(const Matrix& w, int64_t block, const int32_t* tile, int64_t row,
                        int64_t rows, const LinearOutput& out) {
  constexpr int kParts = kHalves ? 2 : 1;
  constexpr int kBytes = 64 * kStoredBits<kBits>;
  constexpr int64_t kAhead = kPrefetchBytes / kBytes;  // chunks
  const int64_t chunks = w.chunks(), panels = (chunks + kPanelChunks - 1) / kPanelChunks;
  const int64_t stride = chunks * kBytes;
  const uint8_t* block_codes = w.codes + block * stride;
  const TileEntry<kRows>* entry = entries_of<kRows>(w, tile);
  BlockScales from[kBlocks];
  F total[kBlocks][kRows];
  SARTOR_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    from[b] = block_scales<kOffset>(w, block + b);
    SARTOR_UNROLL
    for (int m = 0; m < kRows; ++m) total[b][m] = f_set(0.0f);
  }
  // The rows are unrolled so that the totals stay in registers; unrolling the chunks as well
  // would push them out (gcc 12).
  SARTOR_NO_UNROLL
  for (const TileEntry<kRows>* end = entry + tile[panels]; entry < end; ++entry) {
    const uint8_t* codes = block_codes + entry->chunk * kBytes;
    // Few rows wait for memory. After a column block this stream goes on kBlocks further.
    const int64_t ahead = entry->chunk + kAhead;
    const uint8_t* next =
        block_codes + ahead * kBytes + (ahead < chunks ? 0 : kBlocks - 1) * stride;
    SARTOR_UNROLL
    for (int b = 0; b < kBlocks; ++b, codes += stride, next += stride) {
      for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(next + i);
      Q bytes[8];
      unpack_codes<kBits>(w, codes, bytes);
      SARTOR_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const F s = f_load_fp16(from[b].scales + (entry->group + part) * kLanes);
        const F o = kOffset ? f_load_fp16(from[b].offsets + (entry->group + part) * kLanes) : s;
        // The rows' sums side by side: one after the other, each would wait for itself.
        Dot<kByteBits<kBits>> dot[kRows];
        SARTOR_UNROLL
        for (int m = 0; m < kRows; ++m) dot[m].start(kOffset ? 0 : entry->term[part][m].correction);
        SARTOR_UNROLL
        for (int i = part * 4; i < (kHalves ? part * 4 + 4 : 8); ++i) SARTOR_UNROLL
        for (int m = 0; m < kRows; ++m) dot[m].add(bytes[i], a_load(entry->codes[m] + 4 * i));
        SARTOR_UNROLL
        for (int m = 0; m < kRows; ++m) {
          F& to = total[b][m];
          to = f_fma(f_from(dot[m].total()), f_mul(s, f_set(entry->scale[m])), to);
          if constexpr (kOffset) to = f_fma(o, f_set(entry->term[part][m].sum), to);
        }
      }
    }
  }
  const F multiplier = f_set(w.scale_multiplier);
  SARTOR_UNROLL
  for (int b = 0; b < kBlocks; ++b)
    for (int m = 0; m < kRows && m < rows; ++m)
      store_columns(w, block + b, out, row + m, f_mul(total[b][m], multiplier));
}

// Codes of kPanelChunks chunks as bytes: [chunk][512]. kSigned takes the zero point off.
template <int kBits, bool kSigned>
static void unpack_panel(const Matrix& w, int64_t block, int64_t begin, int64_t end,
                         uint8_t* panel) {
  constexpr int kBytes = 64 * kStoredBits<kBits>;
  const uint8_t* codes = w.codes + block * w.chunks() * kBytes;
  for (int64_t c = begin; c < end; ++c, panel += 512) {
    Q bytes[8];
    unpack_codes<kBits>(w, codes + c * kBytes, bytes);
    for (int i = 0; i < 8; ++i)
      q_store(panel + 64 * i, kSigned ? q_minus(bytes[i], static_cast<uint8_t>(w.zero)) : bytes[i]);
  }
}

template <bool kSigned>
struct Unpackers {
  using Function = void (*)(const Matrix&, int64_t, int64_t, int64_t, uint8_t*);
  static constexpr Function kOf[9] = {unpack_panel<0, kSigned>, nullptr,
                                      unpack_panel<2, kSigned>, unpack_panel<3, kSigned>,
                                      unpack_panel<4, kSigned>, unpack_panel<5, kSigned>,
                                      unpack_panel<6, kSigned>, unpack_panel<7, kSigned>,
                                      unpack_panel<8, kSigned>};
};

static inline int code_kind(const Matrix& w) { return w.storage == Storage::kLookup ? 0 : w.bits; }

// Sums of rows by columns that grow panel by panel: [block][row][16].
struct Totals {
  float* data;
  int64_t rows;  // of all tiles
  float* at(int64_t block, int64_t row) const { return data + (block * rows + row) * kLanes; }
};

// The packed weights of the panel after this one. It lies a column block or more away, too far for
// the hardware to guess: the first tile of a panel fetches them, chunk by chunk, as it multiplies.
struct NextPanel {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t chunk_bytes, block_bytes, chunk_scales, block_scales;

  NextPanel(const Matrix& w, int64_t block, int64_t chunk)
      : chunk_bytes(64 * w.bits),
        block_bytes(w.chunks() * chunk_bytes),
        chunk_scales(kLanes * kChunk / w.group),
        block_scales(w.k_padded / w.group * kLanes) {
    codes = w.codes + block * block_bytes + chunk * chunk_bytes;
    scales = w.scales + block * block_scales + chunk * kChunk / w.group * kLanes;
  }
  void fetch(int64_t block, int64_t chunk) const {
    const uint8_t* from = codes + block * block_bytes + chunk * chunk_bytes;
    for (int64_t i = 0; i < chunk_bytes; i += 64) __builtin_prefetch(from + i);
    __builtin_prefetch(scales + block * block_scales + chunk * chunk_scales);
  }
};

// Panels of a task's columns, one after the other; tiles(panel, block, blocks, codes, next) adds
// what each gives to the totals, which are written out at the end.
template <bool kSigned, typename Tiles>
static void each_panel(const Matrix& w, int64_t block_begin, int64_t block_end, int64_t rows,
                       const Totals& totals, const LinearOutput& out, uint8_t* codes,
                       const Tiles& tiles) {
  const auto unpack = Unpackers<kSigned>::kOf[code_kind(w)];
  std::memset(totals.data, 0,
              static_cast<size_t>((block_end - block_begin) * totals.rows * kLanes) * 4);
  for (int64_t begin = 0; begin < w.chunks(); begin += kPanelChunks) {
    const int64_t end = begin + kPanelChunks < w.chunks() ? begin + kPanelChunks : w.chunks();
    for (int64_t block = block_begin; block < block_end; block += kTileBlocks) {
      const int64_t left = block_end - block;
      const int64_t blocks = left < kTileBlocks ? left : kTileBlocks;
      for (int64_t b = 0; b < blocks; ++b)
        unpack(w, block + b, begin, end, codes + b * kPanelBytes);
      const bool last = block + kTileBlocks >= block_end;
      const NextPanel next(w, last ? block_begin : block + kTileBlocks, last ? end : begin);
      tiles(begin / kPanelChunks, block, blocks, codes, next);
    }
  }
  const F multiplier = f_set(w.scale_multiplier);
  // Row by row: what lies together is written together.
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = block_begin; block < block_end; ++block)
      store_columns(w, block, out, row,
                    f_mul(f_load(totals.at(block - block_begin, row)), multiplier));
}

// kTileRows rows by kBlocks column blocks, one panel.
template <int kBits, bool kHalves, bool kOffset, int kBlocks>
static void panel_tile(const Matrix& w, int64_t block, const TileEntry<kTileRows>* entry,
                       const TileEntry<kTileRows>* end, const uint8_t* codes, const NextPanel* next,
                       float* const (&totals)[kTileBlocks]) {
  constexpr int kParts = kHalves ? 2 : 1;
  BlockScales from[kBlocks];
  for (int b = 0; b < kBlocks; ++b) from[b] = block_scales<kOffset>(w, block + b);
  F kept[kBlocks][kTileRows];
  if constexpr (kKeepTotals) {
    SARTOR_UNROLL
    for (int b = 0; b < kBlocks; ++b) SARTOR_UNROLL
    for (int m = 0; m < kTileRows; ++m) kept[b][m] = f_load(totals[b] + m * kLanes);
  }
  SARTOR_NO_UNROLL
  for (; entry < end; ++entry) {
    const int64_t chunk = entry->chunk % kPanelChunks;
    const uint8_t* bytes = codes + chunk * 512;
    if (next)
      for (int b = 0; b < kBlocks; ++b) next->fetch(b, chunk);
    SARTOR_UNROLL
    for (int part = 0; part < kParts; ++part) {
      // All sums of a tile at once, so that none waits for itself.
      Dot<kBits> dot[kTileRows][kBlocks];
      SARTOR_UNROLL
      for (int m = 0; m < kTileRows; ++m) SARTOR_UNROLL
      for (int b = 0; b < kBlocks; ++b)
        dot[m][b].start(kOffset ? 0 : entry->term[part][m].correction);
      SARTOR_UNROLL
      for (int i = part * 4; i < (kHalves ? part * 4 + 4 : 8); ++i) {
        Q column[kBlocks];
        SARTOR_UNROLL
        for (int b = 0; b < kBlocks; ++b) column[b] = q_load(bytes + b * kPanelBytes + 64 * i);
        SARTOR_UNROLL
        for (int m = 0; m < kTileRows; ++m) {
          const A four = a_load(entry->codes[m] + 4 * i);
          SARTOR_UNROLL
          for (int b = 0; b < kBlocks; ++b) dot[m][b].add(column[b], four);
        }
      }
      SARTOR_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const F s = f_load_fp16(from[b].scales + (entry->group + part) * kLanes);
        const F o = kOffset ? f_load_fp16(from[b].offsets + (entry->group + part) * kLanes) : s;
        SARTOR_UNROLL
        for (int m = 0; m < kTileRows; ++m) {
          float* at = totals[b] + m * kLanes;
          F total = kKeepTotals ? kept[b][m] : f_load(at);
          total = f_fma(f_from(dot[m][b].total()), f_mul(s, f_set(entry->scale[m])), total);
          if constexpr (kOffset) total = f_fma(o, f_set(entry->term[part][m].sum), total);
          if constexpr (kKeepTotals) kept[b][m] = total;
          else f_store(at, total);
        }
      }
    }
  }
  if constexpr (kKeepTotals) {
    SARTOR_UNROLL
    for (int b = 0; b < kBlocks; ++b) SARTOR_UNROLL
    for (int m = 0; m < kTileRows; ++m) f_store(totals[b] + m * kLanes, kept[b][m]);
  }
}

#if !defined(SARTOR_PANELS_ONLY)
static void arrange_rows(const Matrix& w, const QuantizedRows& x, const QuantizedRows* residual,
                         int64_t rows, Range part, const LinearVariant&, int32_t* arranged) {
  const int64_t stride = arranged_ints(w.k_padded, residual != nullptr);
  const int64_t tiled = tiled_rows(rows);
  for (int64_t row = part.begin; row < part.end;) {
    const int64_t left = rows - row, count = row < tiled ? kTileRows : direct_tile_rows(left);
    int32_t* to = arranged + row * stride;
    if (count == kTileRows) arrange_tile<kTileRows>(w, x, residual, row, left, to);
    else if (count == 4) arrange_tile<4>(w, x, residual, row, left, to);
    else if (count == 2) arrange_tile<2>(w, x, residual, row, left, to);
    else arrange_tile<1>(w, x, residual, row, left, to);
    row += count;
  }
}

template <int kBits, bool kHalves, bool kOffset, int kBlocks>
static void direct_blocks(const Matrix& w, int64_t block, const ArrangedRows& x, int64_t row,
                          const LinearOutput& out) {
  while (row < x.count) {
    const int64_t left = x.count - row, count = direct_tile_rows(left);
    const int32_t* tile = x.data + row * x.stride;
    if constexpr (kDirectRows >= 4)
      if (count == 4)
        direct_tile<kBits, kHalves, kOffset, 4, kBlocks>(w, block, tile, row, left, out);
    if (count == 2)
      direct_tile<kBits, kHalves, kOffset, 2, kBlocks>(w, block, tile, row, left, out);
    if (count == 1)
      direct_tile<kBits, kHalves, kOffset, 1, kBlocks>(w, block, tile, row, left, out);
    row += count;
  }
}

// Several column blocks at once are several streams, which a core reads faster than one.
template <int kBits, bool kHalves, bool kOffset>
static void direct_rows(const Matrix& w, int64_t block_begin, int64_t block_end,
                        const ArrangedRows& x, int64_t row, const LinearVariant& variant,
                        const LinearOutput& out) {
  int64_t block = block_begin;
  for (; variant.streams != 1 && block + kStreams <= block_end; block += kStreams)
    direct_blocks<kBits, kHalves, kOffset, kStreams>(w, block, x, row, out);
  for (; block < block_end; ++block)
    direct_blocks<kBits, kHalves, kOffset, 1>(w, block, x, row, out);
}

using DirectFunction = void (*)(const Matrix&, int64_t, int64_t, const ArrangedRows&, int64_t,
                                const LinearVariant&, const LinearOutput&);
#define SARTOR_BITS(bits)                                                \
  {                                                                      \
    {direct_rows<bits, false, false>, direct_rows<bits, false, true>}, { \
      direct_rows<bits, true, false>, direct_rows<bits, true, true>      \
    }                                                                    \
  }
static const DirectFunction kDirectFunctions[9][2][2] = {
    SARTOR_BITS(0), {{nullptr, nullptr}, {nullptr, nullptr}},
    SARTOR_BITS(2), SARTOR_BITS(3),
    SARTOR_BITS(4), SARTOR_BITS(5),
    SARTOR_BITS(6), SARTOR_BITS(7),
    SARTOR_BITS(8)};
#undef SARTOR_BITS

// The rows of whole tiles, from unpacked panels.
template <int kBits, bool kHalves, bool kOffset>
static void panel_rows(const Matrix& w, int64_t block_begin, int64_t block_end,
                       const ArrangedRows& x, int64_t tiles, const LinearOutput& out,
                       float* scratch) {
  auto* codes = reinterpret_cast<uint8_t*>(scratch);
  const Totals totals{scratch + kTileBlocks * kPanelBytes / 4, tiles * kTileRows};
  const int64_t rows = x.count < totals.rows ? x.count : totals.rows;
  each_panel<false>(
      w, block_begin, block_end, rows, totals, out, codes,
      [&](int64_t panel, int64_t block, int64_t blocks, const uint8_t* unpacked,
          const NextPanel& next) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int32_t* tile = x.data + t * kTileRows * x.stride;
          const TileEntry<kTileRows>* entries = entries_of<kTileRows>(w, tile);
          float* at[kTileBlocks];
          for (int64_t b = 0; b < kTileBlocks; ++b)
            at[b] = totals.at(block - block_begin + (b < blocks ? b : 0), t * kTileRows);
          const auto run = blocks == kTileBlocks ? panel_tile<kBits, kHalves, kOffset, kTileBlocks>
                                                 : panel_tile<kBits, kHalves, kOffset, 1>;
          for (int64_t b = 0; b < blocks; b += blocks == kTileBlocks ? kTileBlocks : 1)
            run(w, block + b, entries + tile[panel], entries + tile[panel + 1],
                unpacked + b * kPanelBytes, t == 0 ? &next : nullptr, at);
        }
      });
}

static void linear_int8(const Matrix& w, int64_t block_begin, int64_t block_end,
                        const ArrangedRows& x, const LinearVariant& variant,
                        const LinearOutput& out, float* scratch) {
  using PanelFunction = void (*)(const Matrix&, int64_t, int64_t, const ArrangedRows&, int64_t,
                                 const LinearOutput&, float*);
  // By the bits that a byte uses: up to 4, up to 7, all.
  constexpr int kFew = kWideCodesCostMore ? 4 : 8, kMany = kWideCodesCostMore ? 7 : 8;
  static constexpr PanelFunction kPanelFunctions[3][2][2] = {
      {{panel_rows<kFew, false, false>, panel_rows<kFew, false, true>},
       {panel_rows<kFew, true, false>, panel_rows<kFew, true, true>}},
      {{panel_rows<kMany, false, false>, panel_rows<kMany, false, true>},
       {panel_rows<kMany, true, false>, panel_rows<kMany, true, true>}},
      {{panel_rows<8, false, false>, panel_rows<8, false, true>},
       {panel_rows<8, true, false>, panel_rows<8, true, true>}}};
  const int64_t row = tiled_rows(x.count);
  const int bits = w.storage == Storage::kLookup ? 8 : w.bits;
  const int width = bits <= 4 ? 0 : bits <= 7 ? 1 : 2;
  if (row > 0)
    kPanelFunctions[width][w.group == 16][w.has_offset](w, block_begin, block_end, x,
                                                        row / kTileRows, out, scratch);
  if (row < x.count)
    kDirectFunctions[code_kind(w)][w.group == 16][w.has_offset](w, block_begin, block_end, x, row,
                                                                variant, out);
}
#endif
