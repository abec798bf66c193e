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

template <Storage kStorage>
static void write_tokens(const KvWriteTask& t) {
  using Element = KvElement<kStorage>;
  constexpr int64_t kPack = kStorage == Storage::kBf16 ? 2 : 1;
  const KvLayout& layout = t.layout;
  const int64_t step = layout.step_bytes(), chunk = layout.chunk();
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
      } else {  // one side of each pair
        uint32_t pairs[kLanes];
        std::memcpy(pairs, value, sizeof pairs);
        const int side = 16 * static_cast<int>(at & 1);
        const uint32_t keep = ~(0xffffu << side);
        for (int64_t lane = 0; lane < kLanes; ++lane)
          pairs[lane] = (pairs[lane] & keep) | static_cast<uint32_t>(lanes[lane]) << side;
        std::memcpy(value, pairs, sizeof pairs);
      }
    }
  }
}

static void write_kv(const KvWriteTask& t) {
  switch (t.layout.storage) {
    case Storage::kFp32:
      return write_tokens<Storage::kFp32>(t);
    case Storage::kFp16:
      return write_tokens<Storage::kFp16>(t);
    default:
      return write_tokens<Storage::kBf16>(t);
  }
}
