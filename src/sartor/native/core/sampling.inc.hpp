// What the sampler does with every logit of a row (logit_row.hpp says what for).
//
// Weights are doubles made of multiplications and additions, added up in sixteen lanes and the
// lanes in pairs: every path gives the same bits, and with them the same token.

#if defined(__AVX512F__)
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));
#else
typedef double Doubles __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));
#endif
constexpr int kChains = 4;  // vectors that are worked on side by side
constexpr int kDoubles = sizeof(Doubles) / sizeof(double);
constexpr int kTogether = kChains * kDoubles;          // logits in the chains
constexpr int kRun = kTogether < 16 ? 16 : kTogether;  // logits that are looked at together

// A run of logits: in the row or, past its end, filled up with what no cut lets through.
struct Run {
  const float* at;
  float rest[kRun];

  Run(const float* x, int64_t n) : at(x) {
    if (n >= kRun) return;
    std::memcpy(rest, x, static_cast<size_t>(n) * sizeof(float));
    for (int64_t i = n; i < kRun; ++i) rest[i] = -__builtin_inff();
    at = rest;
  }
  bool reaches(F cut) const {
    uint32_t any = 0;
    for (int i = 0; i < kRun; i += 16) any |= f_at_least(f_load(at + i), cut);
    return any;
  }
};

// The weights of kTogether logits.
static inline void weigh(const float* x, const Weighing& w, Doubles (&weights)[kChains]) {
  double wide[kTogether];
  if constexpr (kTogether >= 16) {
    for (int i = 0; i < kTogether; i += 16) f_widen(x + i, wide + i);
  } else {
    for (int i = 0; i < kTogether; ++i) wide[i] = static_cast<double>(x[i]);
  }
  const Doubles cut = Doubles{} + static_cast<double>(w.cut);
  const Doubles top = Doubles{} + static_cast<double>(w.top), slope = Doubles{} + w.slope;
  Doubles logits[kChains], t[kChains];
  std::memcpy(logits, wide, sizeof(wide));
  SARTOR_UNROLL
  for (int i = 0; i < kChains; ++i) t[i] = (logits[i] - top) * slope;
  exp2_of_16<Doubles, Longs, kChains>(t, weights);
  SARTOR_UNROLL
  for (int i = 0; i < kChains; ++i) weights[i] = logits[i] >= cut ? weights[i] : Doubles{};
}

static double sum_weights(const float* x, int64_t n, const Weighing& w) {
  const F cut = f_set(w.cut);
  Doubles sums[16 / kDoubles] = {};
  for (int64_t i = 0; i < n; i += kRun) {
    const Run run(x + i, n - i);
    if (!run.reaches(cut)) continue;
    SARTOR_UNROLL
    for (int part = 0; part < kRun; part += kTogether) {
      Doubles weights[kChains];
      weigh(run.at + part, w, weights);
      SARTOR_UNROLL
      for (int c = 0; c < kChains; ++c) sums[(part / kDoubles + c) % (16 / kDoubles)] += weights[c];
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
  // What is below the buckets adds 0 somewhere: a lane each has its place, lest they wait in line.
  const F last = f_add(f_set(static_cast<float>(kBuckets)), f_load(kIndex));
  for (int64_t i = 0; i < n; i += kRun) {
    const Run run(x + i, n - i);
    if (!run.reaches(cut)) continue;
    int32_t index[kRun];
    for (int l = 0; l < kRun; l += 16)
      i_store(index + l, i_from(f_min(f_mul(f_sub(top, f_load(run.at + l)), s), last)));
    double measure[kRun];
    if (count) {
      for (int l = 0; l < kRun; ++l) measure[l] = run.at[l] >= w.cut ? 1.0 : 0.0;
    } else {
      SARTOR_UNROLL
      for (int part = 0; part < kRun; part += kTogether) {
        Doubles weights[kChains];
        weigh(run.at + part, w, weights);
        std::memcpy(measure + part, weights, sizeof(weights));
      }
    }
    for (int l = 0; l < kRun; ++l) buckets[index[l]] += measure[l];
  }
}

static int64_t collect(const float* x, int64_t n, float low, float high, int32_t first,
                       int32_t* ids) {
  const F from = f_set(low), to = f_set(high);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    const Run run(x + i, n - i);
    for (int l = 0; l < kRun; l += 16) {
      const F v = f_load(run.at + l);
      uint32_t bits = f_at_least(v, from) & ~f_at_least(v, to);
      const int32_t id = first + static_cast<int32_t>(i) + l;
      if (__builtin_popcount(bits) < 4) {
        for (; bits; bits &= bits - 1) ids[found++] = id + __builtin_ctz(bits);
        continue;
      }
      SARTOR_UNROLL  // nothing to guess wrong
          for (int lane = 0; lane < 16; ++lane) {
        ids[found] = id + lane;
        found += bits >> lane & 1;
      }
    }
  }
  return found;
}

static void block_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t i = 0; i < n; i += kSampleBlock)
    *maxima++ = max_of(x + i, n - i < kSampleBlock ? n - i : kSampleBlock);
}
