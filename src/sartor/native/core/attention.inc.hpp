// Attention of one kv head over paged keys and values, for a run of tokens of one sequence.
//
// Query heads of a group and neighbouring tokens share each read of K and V. Blocks are combined
// in order (online softmax, arXiv:1805.02867) inside segments of 512 absolute positions, and
// segments in order after that: the arithmetic of a row depends on its position alone, not on
// the rows beside it nor on how its prompt was chunked.

template <Storage kStorage>
static inline F load_kv(const uint8_t* base, int64_t index) {
  if constexpr (kStorage == Storage::kFp32)
    return f_load(reinterpret_cast<const float*>(base) + index);
  else if constexpr (kStorage == Storage::kBf16)
    return f_load_bf16(reinterpret_cast<const uint16_t*>(base) + index);
  else return f_load_fp16(reinterpret_cast<const uint16_t*>(base) + index);
}

static inline float exp_one(float x) {
  float out[16];
  f_store(out, f_exp(f_set(x)));
  return out[0];
}

template <int kRows>
struct AttentionRows {
  int64_t begin[kRows], end[kRows];        // positions that the row sees
  float top[kRows], total[kRows];          // of the segment
  float all_top[kRows], all_total[kRows];  // of the segments so far
};

template <Storage kStorage, int kRows, int kRuns>
static inline void scores16(const uint8_t* keys, const float* q, int64_t head_dim,
                            int64_t block_size, int64_t at, float* scores, const uint8_t* next) {
  F sum[kRows][kRuns];
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) sum[r][u] = f_set(0.0f);
  SARTOR_NO_UNROLL
  for (int64_t d = 0; d < head_dim; ++d) {
    // Few rows wait for memory, and blocks lie apart: fetch the next one's keys meanwhile.
    if constexpr (kRows <= 4)
      __builtin_prefetch(next + (d * block_size + at) * (kStorage == Storage::kFp32 ? 4 : 2));
    F k[kRuns];
    SARTOR_UNROLL
    for (int u = 0; u < kRuns; ++u) k[u] = load_kv<kStorage>(keys, d * block_size + at + 16 * u);
    SARTOR_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F qd = f_set(q[r * head_dim + d]);
      SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u) sum[r][u] = f_fma(k[u], qd, sum[r][u]);
    }
  }
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) f_store(scores + r * block_size + at + 16 * u, sum[r][u]);
}

template <Storage kStorage, int kRows, int kRuns>
static inline void weigh16(const uint8_t* values, const float* weights, int64_t count,
                           int64_t block_size, int64_t stride, int64_t at, const float* keep,
                           float* sums, const uint8_t* next) {
  F sum[kRows][kRuns];
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u)
    sum[r][u] = f_mul(f_load(sums + r * stride + at + 16 * u), f_set(keep[r]));
  SARTOR_NO_UNROLL
  for (int64_t p = 0; p < count; ++p) {
    if constexpr (kRows <= 4)
      __builtin_prefetch(next + (p * stride + at) * (kStorage == Storage::kFp32 ? 4 : 2));
    F v[kRuns];
    SARTOR_UNROLL
    for (int u = 0; u < kRuns; ++u) v[u] = load_kv<kStorage>(values, p * stride + at + 16 * u);
    SARTOR_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F w = f_set(weights[r * block_size + p]);
      SARTOR_UNROLL
      for (int u = 0; u < kRuns; ++u) sum[r][u] = f_fma(v[u], w, sum[r][u]);
    }
  }
  SARTOR_UNROLL
  for (int r = 0; r < kRows; ++r) SARTOR_UNROLL
  for (int u = 0; u < kRuns; ++u) f_store(sums + r * stride + at + 16 * u, sum[r][u]);
}

template <Storage kStorage, int kRows>
static void attend_block(const AttentionTask& t, AttentionRows<kRows>& rows, int64_t block,
                         const float* q, float* weights, float* sums) {
  const int64_t size = t.block_size, stride = (t.value_dim + 15) / 16 * 16;
  const int64_t element = kStorage == Storage::kFp32 ? 4 : 2;
  const int64_t slot = static_cast<int64_t>(t.block_table[block]) * t.kv_heads + t.kv_head;
  const uint8_t* keys = t.keys + slot * t.head_dim * size * element;
  const uint8_t* values = t.values + slot * size * stride * element;
  const int64_t start = block * size;
  const int64_t last_block = (rows.end[kRows - 1] - 1) / size;
  const int64_t next_slot =
      static_cast<int64_t>(t.block_table[block < last_block ? block + 1 : block]) * t.kv_heads +
      t.kv_head;
  const uint8_t* next_keys = t.keys + next_slot * t.head_dim * size * element;
  const uint8_t* next_values = t.values + next_slot * size * stride * element;
  int64_t at = 0;
  for (; at + 32 <= size; at += 32)
    scores16<kStorage, kRows, 2>(keys, q, t.head_dim, size, at, weights, next_keys);
  for (; at < size; at += 16)
    scores16<kStorage, kRows, 1>(keys, q, t.head_dim, size, at, weights, next_keys);

  float keep[kRows];
  int64_t visible_end = 0;
  for (int r = 0; r < kRows; ++r) {
    const int64_t end = rows.end[r] - start, begin = rows.begin[r] - start;
    if (end > visible_end) visible_end = end;
    const F last = f_set(static_cast<float>(end)), first = f_set(static_cast<float>(begin));
    const F none = f_set(-__builtin_inff());
    float* row = weights + r * size;
    F top = none;
    for (int64_t i = 0; i < size; i += 16) {
      F s = f_load(row + i);
      if (t.softcap > 0.0f) s = f_mul(f_tanh(f_div(s, f_set(t.softcap))), f_set(t.softcap));
      const F index = f_add(f_load(kIndex), f_set(static_cast<float>(i)));
      s = f_where_less(index, last, s, none);
      if (begin > 0) s = f_where_less(index, first, none, s);
      f_store(row + i, s);
      top = f_max(top, s);
    }
    const float highest = f_top(top);
    if (!(highest > -__builtin_inff())) {  // nothing of this block is visible to the row
      keep[r] = 1.0f;
      std::memset(row, 0, static_cast<size_t>(size) * 4);
      continue;
    }
    const float now = highest > rows.top[r] ? highest : rows.top[r];
    const F shift = f_set(now);
    F total = f_set(0.0f);
    for (int64_t i = 0; i < size; i += 16) {
      const F e = f_exp(f_sub(f_load(row + i), shift));
      f_store(row + i, e);
      total = f_add(total, e);
    }
    keep[r] = exp_one(rows.top[r] - now);
    rows.total[r] = rows.total[r] * keep[r] + f_sum(total);
    rows.top[r] = now;
  }
  const int64_t count = visible_end < size ? visible_end : size;
  constexpr int kWide = kRows <= 2 ? 4 : 2;
  at = 0;
  for (; at + 16 * kWide <= stride; at += 16 * kWide)
    weigh16<kStorage, kRows, kWide>(values, weights, count, size, stride, at, keep, sums,
                                    next_values);
  for (; at < stride; at += 16)
    weigh16<kStorage, kRows, 1>(values, weights, count, size, stride, at, keep, sums, next_values);
}

template <Storage kStorage, int kRows>
static void attend_rows(const AttentionTask& t, int64_t first_row, int64_t count) {
  const int64_t stride = (t.value_dim + 15) / 16 * 16, size = t.block_size;
  float* q = t.scratch;
  float* weights = q + kRows * t.head_dim;
  float* sums = weights + kRows * size;
  float* all = sums + kRows * stride;
  AttentionRows<kRows> rows;
  for (int r = 0; r < kRows; ++r) {
    // Rows past the end repeat the last one; their results are dropped.
    const int64_t row = first_row + (r < count ? r : count - 1);
    const int64_t token = t.token_begin + row / t.group;
    const int64_t head = t.kv_head * t.group + row % t.group;
    const int64_t position = t.first_position + token;
    rows.begin[r] = t.window > 0 && position >= t.window ? position + 1 - t.window : 0;
    rows.end[r] = position + 1;
    if (!t.causal) {
      const bool whole = t.window == 0 || position + t.window > t.length;
      rows.end[r] = whole ? t.length : position + t.window;
    }
    rows.all_top[r] = -__builtin_inff();
    rows.all_total[r] = 0.0f;
    scale(t.q + token * t.q_stride + head * t.head_dim, t.scale, t.head_dim, q + r * t.head_dim);
  }
  std::memset(all, 0, static_cast<size_t>(kRows * stride) * 4);
  const int64_t last = rows.end[kRows - 1] - 1, low = rows.begin[0];
  for (int64_t segment = low / kAttentionSegment; segment <= last / kAttentionSegment; ++segment) {
    const int64_t begin = segment * kAttentionSegment;
    const int64_t end = begin + kAttentionSegment - 1;
    for (int r = 0; r < kRows; ++r) {
      rows.top[r] = -__builtin_inff();
      rows.total[r] = 0.0f;
    }
    std::memset(sums, 0, static_cast<size_t>(kRows * stride) * 4);
    const int64_t from = (begin > low ? begin : low) / size;
    const int64_t to = (end < last ? end : last) / size;
    for (int64_t block = from; block <= to; ++block)
      attend_block<kStorage, kRows>(t, rows, block, q, weights, sums);
    for (int r = 0; r < kRows; ++r) {
      if (!(rows.top[r] > -__builtin_inff())) continue;
      const float top = rows.top[r] > rows.all_top[r] ? rows.top[r] : rows.all_top[r];
      const float old_keep = exp_one(rows.all_top[r] - top), keep = exp_one(rows.top[r] - top);
      const F a = f_set(old_keep), b = f_set(keep);
      for (int64_t i = 0; i < stride; i += 16)
        f_store(all + r * stride + i,
                f_fma(f_load(sums + r * stride + i), b, f_mul(f_load(all + r * stride + i), a)));
      rows.all_total[r] = rows.all_total[r] * old_keep + rows.total[r] * keep;
      rows.all_top[r] = top;
    }
  }
  for (int r = 0; r < count && r < kRows; ++r) {
    const int64_t token = t.token_begin + (first_row + r) / t.group;
    const int64_t head = t.kv_head * t.group + (first_row + r) % t.group;
    float keep = 1.0f, total = rows.all_total[r];
    if (t.sinks) {
      const float top = t.sinks[head] > rows.all_top[r] ? t.sinks[head] : rows.all_top[r];
      keep = exp_one(rows.all_top[r] - top);
      total = total * keep + exp_one(t.sinks[head] - top);
    }
    scale(all + r * stride, keep / total, t.value_dim,
          t.out + token * t.out_stride + head * t.value_dim);
  }
}

template <Storage kStorage>
static void attend(const AttentionTask& t) {
  const int64_t rows = (t.token_end - t.token_begin) * t.group;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row < kAttentionRows ? rows - row : kAttentionRows;
    switch (left) {
      case 1:
        attend_rows<kStorage, 1>(t, row, left);
        break;
      case 2:
        attend_rows<kStorage, 2>(t, row, left);
        break;
      case 3:
        attend_rows<kStorage, 3>(t, row, left);
        break;
      case 4:
        attend_rows<kStorage, 4>(t, row, left);
        break;
      default:
        attend_rows<kStorage, 8>(t, row, left);
        break;
    }
    row += left;
  }
}

static void attention(const AttentionTask& t) {
  switch (t.kv) {
    case Storage::kFp32:
      return attend<Storage::kFp32>(t);
    case Storage::kFp16:
      return attend<Storage::kFp16>(t);
    default:
      return attend<Storage::kBf16>(t);
  }
}
