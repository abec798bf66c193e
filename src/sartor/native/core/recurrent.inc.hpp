// Layers with a state of fixed size, step by step: the bits of a token's result depend on the
// tokens before it alone, however they were cut into steps.

static void short_conv(const ConvTask& t) {
  const int64_t kept = t.taps - 1;
  for (int64_t c = t.begin; c < t.end; c += kLanes) {
    const int64_t n = t.end - c < kLanes ? t.end - c : kLanes;
    const F bias = t.bias ? load_n(t.bias + c, n) : f_set(0.0f);
    for (int64_t row = 0; row < t.tokens; ++row) {
      F total = f_set(0.0f);
      for (int64_t tap = 0; tap < t.taps; ++tap) {
        const int64_t from = row + tap - kept;  // negative: before this step
        if (from < 0 && !t.before) continue;
        const float* x = from < 0 ? t.before + (from + kept) * t.width : t.x + from * t.width;
        total = f_fma(load_n(x + c, n), load_n(t.weight + tap * t.width + c, n), total);
      }
      total = f_add(total, bias);
      if (n == kLanes) f_store(t.out + row * t.width + c, total);
      else store_part(t.out + row * t.width + c, total, n);
    }
  }
  // Rising order: where the memory is the same, a row is read before it is overwritten.
  const size_t bytes = static_cast<size_t>(t.end - t.begin) * 4;
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t from = t.tokens + i - kept;
    float* to = t.after + i * t.width + t.begin;
    if (from >= 0) std::memcpy(to, t.x + from * t.width + t.begin, bytes);
    else if (t.before) std::memmove(to, t.before + (from + kept) * t.width + t.begin, bytes);
    else std::memset(to, 0, bytes);
  }
}

// kRuns registers of value features, whose part of the state is updated token by token.
template <int kRuns>
static void scan_runs(const ScanTask& t, int64_t at) {
  for (int64_t i = 0; i < t.key_dim; ++i) {
    float* to = t.after + i * t.value_dim + at;
    if (!t.before) std::memset(to, 0, kRuns * 64);
    else if (t.before != t.after) std::memcpy(to, t.before + i * t.value_dim + at, kRuns * 64);
  }
  for (int64_t row = 0; row < t.tokens; ++row) {
    const float* q = t.q + row * t.key_stride;
    const float* k = t.k + row * t.key_stride;
    const F decay = f_set(t.decay[row * t.head_stride]);
    const F beta = f_set(t.beta[row * t.head_stride]);
    F update[kRuns], out[kRuns];
    SARTOR_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      update[r] = f_load(t.v + row * t.value_stride + at + 16 * r);
      out[r] = f_set(0.0f);
    }
    if (t.delta) {
      F known[kRuns];
      SARTOR_UNROLL
      for (int r = 0; r < kRuns; ++r) known[r] = f_set(0.0f);
      for (int64_t i = 0; i < t.key_dim; ++i) {
        const float* state = t.after + i * t.value_dim + at;
        SARTOR_UNROLL
        for (int r = 0; r < kRuns; ++r)
          known[r] = f_fma(f_mul(f_load(state + 16 * r), decay), f_set(k[i]), known[r]);
      }
      SARTOR_UNROLL
      for (int r = 0; r < kRuns; ++r) update[r] = f_sub(update[r], known[r]);
    }
    SARTOR_UNROLL
    for (int r = 0; r < kRuns; ++r) update[r] = f_mul(update[r], beta);
    for (int64_t i = 0; i < t.key_dim; ++i) {
      float* state = t.after + i * t.value_dim + at;
      SARTOR_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        const F s = f_fma(update[r], f_set(k[i]), f_mul(f_load(state + 16 * r), decay));
        f_store(state + 16 * r, s);
        out[r] = f_fma(s, f_set(q[i]), out[r]);
      }
    }
    const F scale = f_set(t.scale);
    SARTOR_UNROLL
    for (int r = 0; r < kRuns; ++r)
      f_store(t.out + row * t.value_stride + at + 16 * r, f_mul(out[r], scale));
  }
}

// The features that fill no register, one by one.
static void scan_one(const ScanTask& t, int64_t at) {
  for (int64_t i = 0; i < t.key_dim; ++i)
    t.after[i * t.value_dim + at] = t.before ? t.before[i * t.value_dim + at] : 0.0f;
  for (int64_t row = 0; row < t.tokens; ++row) {
    const float* q = t.q + row * t.key_stride;
    const float* k = t.k + row * t.key_stride;
    const float decay = t.decay[row * t.head_stride];
    float known = 0.0f, out = 0.0f;
    for (int64_t i = 0; t.delta && i < t.key_dim; ++i)
      known += t.after[i * t.value_dim + at] * decay * k[i];
    const float update = (t.v[row * t.value_stride + at] - known) * t.beta[row * t.head_stride];
    for (int64_t i = 0; i < t.key_dim; ++i) {
      float& state = t.after[i * t.value_dim + at];
      state = update * k[i] + state * decay;
      out += state * q[i];
    }
    t.out[row * t.value_stride + at] = out * t.scale;
  }
}

static void recurrent_scan(const ScanTask& t) {
  int64_t at = t.begin;
  for (; at + 64 <= t.end; at += 64) scan_runs<4>(t, at);
  for (; at + 16 <= t.end; at += 16) scan_runs<1>(t, at);
  for (; at < t.end; ++at) scan_one(t, at);
}
