// Writes keys and values into a block (kv_layout.hpp).

template <Storage kStorage>
using KvElement = std::conditional_t<kStorage == Storage::kFp32, float, uint16_t>;

// Sixteen floats as elements of the state; those past `count` as zero.
template <Storage kStorage>
static inline void narrow16(const float* x, int64_t count, KvElement<kStorage>* out) {
  const F lanes = count >= kLanes ? f_load(x) : load_part(x, count);
  if constexpr (kStorage == Storage::kFp32) f_store(out, lanes);
  else if constexpr (kStorage == Storage::kBf16) f_store_bf16(out, lanes);
  else f_store_fp16(out, lanes);
}

// Sixteen elements of kBits, each as number `side` of those that share 32 bits.
template <int kBits, typename Element>
static inline void put_aside(uint8_t* place, int side, const Element (&elements)[kLanes]) {
  uint32_t words[kLanes];
  std::memcpy(words, place, sizeof words);
  const int shift = kBits * side;
  const uint32_t keep = ~(((1u << kBits) - 1) << shift);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    words[lane] = (words[lane] & keep) | static_cast<uint32_t>(elements[lane]) << shift;
  std::memcpy(place, words, sizeof words);
}

template <Storage kStorage>
static void write_tokens(const KvWriteTask& t) {
  using Element = KvElement<kStorage>;
  constexpr int64_t kPack = kStorage == Storage::kBf16 ? 2 : 1;
  const KvLayout& layout = t.layout;
  const int64_t step = layout.step_bytes(), chunk = layout.chunk();
  // A key has a cache line for each step: ask for all of them before the first store waits.
  for (int64_t s = 0; s < layout.key_steps(); ++s)
    __builtin_prefetch(t.keys + t.at / kLanes * layout.group_bytes() + s * step, 1);
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t at = t.at + i;
    Element lanes[kLanes];
    uint8_t* key = t.keys + at / kLanes * layout.group_bytes() +
                   at % kLanes * kPack * static_cast<int64_t>(sizeof(Element));
    for (int64_t d = 0; d < layout.head_dim; d += kLanes) {
      const int64_t left = layout.head_dim - d;
      narrow16<kStorage>(t.k + i * t.k_stride + d, left, lanes);
      const int64_t count = left < kLanes ? left : kLanes;
      for (int64_t e = 0; e < count; e += kPack, key += step)
        std::memcpy(key, lanes + e, kPack * sizeof(Element));
    }
    // What another sequence left in a chunk could be infinite, and 0 times that is not 0.
    if (at % chunk == 0 && t.count - i < chunk)
      for (int64_t c = 0; c < layout.value_stride() / kLanes; ++c)
        std::memset(t.values + c * layout.run_bytes() + at / chunk * layout.chunk_bytes(), 0,
                    static_cast<size_t>(layout.chunk_bytes()));
    uint8_t* value = t.values + at / kPack * step;
    for (int64_t c = 0; c < layout.value_dim; c += kLanes, value += layout.run_bytes()) {
      narrow16<kStorage>(t.v + i * t.v_stride + c, layout.value_dim - c, lanes);
      if constexpr (kPack == 1) {
        std::memcpy(value, lanes, sizeof lanes);
      } else {
        put_aside<16>(value, static_cast<int>(at & 1), lanes);
      }
    }
  }
}

// Where the largest of n is found, what is not finite, and the codes of sixteen (ops/kv.py).
struct Vector {
  const float* x;
  int64_t n;
  F part(int64_t d) const { return n - d >= kLanes ? f_load(x + d) : load_part(x + d, n - d); }
  float scale() const {
    F top = f_set(0.0f), wrong = f_set(0.0f);
    for (int64_t d = 0; d < n; d += kLanes) {
      top = f_max(top, f_abs(part(d)));
      wrong = f_fma(part(d), f_set(0.0f), wrong);
    }
    return f_top(top) / 127.0f + f_sum(wrong);
  }
  // 128 more than they mean, in fours.
  void codes(int64_t d, float inverse, uint32_t (&fours)[4]) const {
    const F x16 = f_min(f_round(f_mul(part(d), f_set(inverse))), f_set(127.0f));
    i_store_bytes(reinterpret_cast<int8_t*>(fours), i_from(f_max(x16, f_set(-127.0f))));
    for (uint32_t& four : fours) four ^= 0x80808080u;
  }
};

static void write_codes(const KvWriteTask& t) {
  const KvLayout& layout = t.layout;
  const int64_t step = layout.step_bytes();
  auto* scales = reinterpret_cast<uint16_t*>(t.keys + layout.scales_at());
  for (int64_t s = 0; s < layout.key_steps(); ++s)
    __builtin_prefetch(t.keys + t.at / kLanes * layout.group_bytes() + s * step, 1);
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t at = t.at + i;
    const Vector k{t.k + i * t.k_stride, layout.head_dim};
    const Vector v{t.v + i * t.v_stride, layout.value_dim};
    float wide[kLanes] = {k.scale(), v.scale()};
    uint16_t stored[kLanes];
    f_store_fp16(stored, f_load(wide));
    scales[at] = stored[0];
    scales[layout.block_size + at] = stored[1];
    f_store(wide, f_load_fp16(stored));
    const auto inverse = [](float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; };
    uint32_t fours[4];
    uint8_t* key = t.keys + at / kLanes * layout.group_bytes() + at % kLanes * 4;
    for (int64_t d = 0; d < layout.head_dim; d += kLanes) {
      k.codes(d, inverse(wide[0]), fours);
      for (int64_t e = 0; e < 4 && d + 4 * e < layout.head_dim; ++e, key += step)
        std::memcpy(key, fours + e, 4);
    }
    uint8_t* value = t.values + at / 4 * step;
    for (int64_t c = 0; c < layout.value_dim; c += kLanes, value += layout.run_bytes()) {
      v.codes(c, inverse(wide[1]), fours);
      uint8_t codes[kLanes];
      std::memcpy(codes, fours, sizeof codes);
      put_aside<8>(value, static_cast<int>(at & 3), codes);
    }
  }
}

static void write_kv(const KvWriteTask& t) {
  switch (t.layout.storage) {
    case Storage::kInt8:
      return write_codes(t);
    case Storage::kFp32:
      return write_tokens<Storage::kFp32>(t);
    case Storage::kFp16:
      return write_tokens<Storage::kFp16>(t);
    default:
      return write_tokens<Storage::kBf16>(t);
  }
}
