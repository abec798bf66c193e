// What the sampler does with every logit of a row (logit_row.hpp says what for).
//
// Weights are doubles made of multiplications and additions, added up in sixteen lanes and the
// lanes in pairs: every path gives the same bits, and with them the same token.

#if defined(__AVX512F__)
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
#elif defined(__AVX2__)
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(16)));
#else
typedef double Doubles __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(8)));
#endif
constexpr int kDoubles = sizeof(Doubles) / sizeof(double);
constexpr int kParts = 16 / kDoubles;

// Where sixteen logits lie: in the row or, past its end, filled up with what no cut lets through.
struct Sixteen {
  const float* at;
  float rest[16];

  Sixteen(const float* x, int64_t n) : at(x) {
    if (n >= 16) return;
    for (int i = 0; i < 16; ++i) rest[i] = i < n ? x[i] : -__builtin_inff();
    at = rest;
  }
};

// Weights of kDoubles logits; 0 of those below the cut.
static inline void weigh(const float* x, const Weighing& w, Doubles& weights) {
  Floats few;
  std::memcpy(&few, x, sizeof(few));
  const Doubles wide = __builtin_convertvector(few, Doubles);
  exp2_of<Doubles, Longs>((wide - static_cast<double>(w.top)) * w.slope, weights);
  const Doubles cut = Doubles{} + static_cast<double>(w.cut);
  weights = wide >= cut ? weights : Doubles{};
}

static double sum_weights(const float* x, int64_t n, const Weighing& w) {
  const F cut = f_set(w.cut);
  Doubles sums[kParts] = {};
  for (int64_t i = 0; i < n; i += 16) {
    const Sixteen part(x + i, n - i);
    if (!f_at_least(f_load(part.at), cut)) continue;
    SARTOR_UNROLL
    for (int d = 0; d < kParts; ++d) {
      Doubles weights;
      weigh(part.at + d * kDoubles, w, weights);
      sums[d] += weights;
    }
  }
  double lanes[16];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

static void sort_into_buckets(const float* x, int64_t n, const Weighing& w, float scale, bool count,
                              double* buckets) {
  const F cut = f_set(w.cut), top = f_set(w.top), s = f_set(scale);
  const F last = f_set(static_cast<float>(kBuckets));
  for (int64_t i = 0; i < n; i += 16) {
    const Sixteen part(x + i, n - i);
    const F v = f_load(part.at);
    const uint32_t high = f_at_least(v, cut);
    if (!high) continue;
    int32_t index[16];
    i_store(index, i_from(f_min(f_mul(f_sub(top, v), s), last)));
    double measure[16];
    if (count) {
      for (int l = 0; l < 16; ++l) measure[l] = high >> l & 1;
    } else {
      SARTOR_UNROLL
      for (int d = 0; d < kParts; ++d) {
        Doubles weights;
        weigh(part.at + d * kDoubles, w, weights);
        std::memcpy(measure + d * kDoubles, &weights, sizeof(weights));
      }
    }
    for (int l = 0; l < 16; ++l) buckets[index[l]] += measure[l];
  }
}

static int64_t collect(const float* x, int64_t n, float low, float high, int32_t first,
                       int32_t* ids) {
  const F from = f_set(low), to = f_set(high);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const Sixteen part(x + i, n - i);
    const F v = f_load(part.at);
    for (uint32_t bits = f_at_least(v, from) & ~f_at_least(v, to); bits; bits &= bits - 1)
      ids[found++] = first + static_cast<int32_t>(i) + __builtin_ctz(bits);
  }
  return found;
}

static void block_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t i = 0; i < n; i += kSampleBlock)
    *maxima++ = max_of(x + i, n - i < kSampleBlock ? n - i : kSampleBlock);
}
