// Attention whose queries and weights are rounded to bf16 (AVX-512 BF16): products are of bf16
// pairs, sums are float32.

static inline __m256i bf16_of(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }

static inline void store_elements(uint16_t* out, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bf16_of(x));
}

// The total is of the rounded weights: the mean has no bias.
static inline void weights_of(const float* scores, F top, uint16_t* out, F& total) {
  const F first = f_exp2_short(f_sub(f_load(scores), top));
  const F second = f_exp2_short(f_sub(f_load(scores + kLanes), top));
  const __m512bh pairs = _mm512_cvtne2ps_pbh(second.v, first.v);
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  total.v = _mm512_dpbf16_ps(total.v, pairs, ones);
  _mm512_storeu_si512(out, reinterpret_cast<__m512i>(pairs));
}

// For Lanes: pairs as they lie in memory.
struct KvBf16Pairs : KvFp32 {
  using Rows = FloatRows<uint16_t>;
  using Element = uint16_t;
  static constexpr int kPack = 2;
  using Step = __m512bh;
  static inline Step load(const uint8_t* p) {
    return reinterpret_cast<Step>(_mm512_loadu_si512(p));
  }
  static inline F dot(const Factors&, F sum, Step s, const uint16_t* y) {
    int32_t pair;
    std::memcpy(&pair, y, 4);
    return {_mm512_dpbf16_ps(sum.v, s, reinterpret_cast<Step>(_mm512_set1_epi32(pair)))};
  }
};
