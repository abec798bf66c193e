// Elementwise and row kernels, written once over the lanes of an instruction-set path.

static inline F load_part(const float* p, int64_t n) {
  float whole[16] = {};
  std::memcpy(whole, p, static_cast<size_t>(n) * 4);
  return f_load(whole);
}
static inline void store_part(float* p, F a, int64_t n) {
  float whole[16];
  f_store(whole, a);
  std::memcpy(p, whole, static_cast<size_t>(n) * 4);
}

// out[i] = f(i) by sixteens; `body` takes the index and how many lanes count.
template <typename Body>
static inline void each16(int64_t n, float* out, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    f_store(out + i, body([i](const float* p) { return f_load(p + i); }));
  if (i < n) {
    const int64_t rest = n - i;
    store_part(out + i, body([i, rest](const float* p) { return load_part(p + i, rest); }), rest);
  }
}

// e^x to about 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]; 0 below -87.3.
static inline F f_exp(F x) {
  const F clipped = f_max(f_min(x, f_set(88.0f)), f_set(-87.3f));
  const F n = f_round(f_mul(clipped, f_set(1.44269504088896341f)));
  F r = f_fma(n, f_set(-0.693359375f), clipped);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);  // Cephes expf
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_add(f_fma(f_mul(p, r), r, r), f_set(1.0f));
  const F value = f_mul(p, f_exp2i(i_from(n)));
  return f_where_less(x, f_set(-87.3f), f_set(0.0f), value);
}

static inline F f_tanh(F x) {
  const F twice = f_exp(f_add(x, x));
  return f_sub(f_set(1.0f), f_div(f_set(2.0f), f_add(twice, f_set(1.0f))));
}

// Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
static inline F f_erf(F x) {
  const F a = f_abs(x);
  const F t = f_div(f_set(1.0f), f_fma(f_set(0.3275911f), a, f_set(1.0f)));
  F p = f_set(1.061405429f);
  p = f_fma(p, t, f_set(-1.453152027f));
  p = f_fma(p, t, f_set(1.421413741f));
  p = f_fma(p, t, f_set(-0.284496736f));
  p = f_mul(f_fma(p, t, f_set(0.254829592f)), t);
  const F e = f_exp(f_mul(f_mul(a, a), f_set(-1.0f)));
  return f_copysign(f_sub(f_set(1.0f), f_mul(p, e)), x);
}

template <Activation kKind>
static inline F f_activate(F x) {
  const F one = f_set(1.0f), half = f_set(0.5f);
  if constexpr (kKind == Activation::kSilu) {
    return f_div(x, f_add(one, f_exp(f_sub(f_set(0.0f), x))));
  } else if constexpr (kKind == Activation::kGelu) {
    return f_mul(f_mul(half, x), f_add(one, f_erf(f_mul(x, f_set(0.70710678118654752f)))));
  } else if constexpr (kKind == Activation::kGeluTanh) {
    const F cube = f_mul(f_mul(x, x), x);
    const F inner = f_mul(f_set(0.79788456080286536f), f_fma(f_set(0.044715f), cube, x));
    return f_mul(f_mul(half, x), f_add(one, f_tanh(inner)));
  } else if constexpr (kKind == Activation::kSigmoid) {
    return f_div(one, f_add(one, f_exp(f_sub(f_set(0.0f), x))));
  } else if constexpr (kKind == Activation::kSoftplus) {
    float rest[16];  // a few features a head: not worth a logarithm of our own
    f_store(rest, f_exp(f_sub(f_set(0.0f), f_abs(x))));
    for (float& value : rest) value = __builtin_log1pf(value);
    return f_add(f_max(x, f_set(0.0f)), f_load(rest));
  } else if constexpr (kKind == Activation::kExp) {
    return f_exp(x);
  } else if constexpr (kKind == Activation::kTanh) {
    return f_tanh(x);
  } else {
    return f_max(x, f_set(0.0f));
  }
}

// GPT-OSS (ops/functions.py, clamped_silu).
static inline F f_clamped_silu(F gate, F up) {
  const F limit = f_set(7.0f), one = f_set(1.0f);
  gate = f_min(gate, limit);
  up = f_max(f_min(up, limit), f_set(-7.0f));
  const F slope = f_activate<Activation::kSigmoid>(f_mul(gate, f_set(1.702f)));
  return f_mul(f_mul(gate, slope), f_add(up, one));
}

template <Activation kKind>
static void activate_run(const float* x, const float* up, int64_t n, float* out) {
  if (up) {
    each16(n, out, [=](auto load) { return f_mul(f_activate<kKind>(load(x)), load(up)); });
  } else {
    each16(n, out, [=](auto load) { return f_activate<kKind>(load(x)); });
  }
}

static void gated_activation(Activation kind, const float* x, const float* up, int64_t n,
                             float* out) {
  switch (kind) {
    case Activation::kSilu:
      return activate_run<Activation::kSilu>(x, up, n, out);
    case Activation::kGelu:
      return activate_run<Activation::kGelu>(x, up, n, out);
    case Activation::kGeluTanh:
      return activate_run<Activation::kGeluTanh>(x, up, n, out);
    case Activation::kRelu:
      return activate_run<Activation::kRelu>(x, up, n, out);
    case Activation::kSigmoid:
      return activate_run<Activation::kSigmoid>(x, up, n, out);
    case Activation::kSoftplus:
      return activate_run<Activation::kSoftplus>(x, up, n, out);
    case Activation::kExp:
      return activate_run<Activation::kExp>(x, up, n, out);
    case Activation::kTanh:
      return activate_run<Activation::kTanh>(x, up, n, out);
    case Activation::kClampedSilu:
      return each16(n, out, [=](auto load) { return f_clamped_silu(load(x), load(up)); });
  }
}
static void activation(Activation kind, const float* x, int64_t n, float* out) {
  gated_activation(kind, x, nullptr, n, out);
}
static void add(const float* x, const float* y, int64_t n, float* out) {
  each16(n, out, [=](auto load) { return f_add(load(x), load(y)); });
}
static void mul(const float* x, const float* y, int64_t n, float* out) {
  each16(n, out, [=](auto load) { return f_mul(load(x), load(y)); });
}
static void scale(const float* x, float factor, int64_t n, float* out) {
  const F f = f_set(factor);
  each16(n, out, [=](auto load) { return f_mul(load(x), f); });
}
static void softcap(const float* x, float cap, int64_t n, float* out) {
  const F c = f_set(cap);
  each16(n, out, [=](auto load) { return f_mul(f_tanh(f_div(load(x), c)), c); });
}

template <typename Body>
static inline F sum16(int64_t n, Body body) {
  F total = f_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total = body(i, int64_t{16}, total);
  if (i < n) total = body(i, n - i, total);
  return total;
}
static inline F load_n(const float* p, int64_t n) { return n == 16 ? f_load(p) : load_part(p, n); }

static void rms_norm(const float* x, const float* weight, float weight_offset, float eps,
                     int64_t width, int64_t run, float* out) {
  const F offset = f_set(weight_offset);
  for (int64_t start = 0; start < width; start += run) {
    const float* row = x + start;
    const F squares = sum16(run, [row](int64_t i, int64_t n, F total) {
      const F v = load_n(row + i, n);
      return f_fma(v, v, total);
    });
    const float mean = f_sum(squares) / static_cast<float>(run);
    const F inverse = f_set(1.0f / __builtin_sqrtf(mean + eps));
    each16(run, out + start, [=](auto load) {
      return f_mul(f_mul(load(row), inverse), f_add(load(weight), offset));
    });
  }
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       int64_t width, float* out) {
  const F plain =
      sum16(width, [x](int64_t i, int64_t n, F t) { return f_add(t, load_n(x + i, n)); });
  const float mean = f_sum(plain) / static_cast<float>(width);
  const F centre = f_set(mean);
  const F squares = sum16(width, [=](int64_t i, int64_t n, F total) {
    float part[16] = {};
    store_part(part, f_sub(load_n(x + i, n), centre), n);
    const F v = f_load(part);
    return f_fma(v, v, total);
  });
  const float variance = f_sum(squares) / static_cast<float>(width);
  const F inverse = f_set(1.0f / __builtin_sqrtf(variance + eps));
  each16(width, out, [=](auto load) {
    const F y = f_mul(f_mul(f_sub(load(x), centre), inverse), load(weight));
    return bias ? f_add(y, load(bias)) : y;
  });
}

static void l2_norm(const float* x, float eps, int64_t width, int64_t run, float* out) {
  for (int64_t start = 0; start < width; start += run) {
    const float* row = x + start;
    const F squares = sum16(run, [row](int64_t i, int64_t n, F total) {
      const F v = load_n(row + i, n);
      return f_fma(v, v, total);
    });
    const F inverse = f_set(1.0f / __builtin_sqrtf(f_sum(squares) + eps));
    each16(run, out + start, [=](auto load) { return f_mul(load(row), inverse); });
  }
}

static void weighted_sum(const float* parts, const float* weights, int64_t count, int64_t n,
                         float* out) {
  each16(n, out, [=](auto load) {
    F total = f_set(0.0f);
    for (int64_t i = 0; i < count; ++i)
      total = f_fma(load(parts + i * n), f_set(weights[i]), total);
    return total;
  });
}

static void rope(const float* x, const float* cosines, const float* sines, int64_t heads,
                 int64_t head_dim, int64_t dim, bool interleaved, float* out) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_dim, out += head_dim) {
    if (interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * cosines[i] - b * sines[i];
        out[2 * i + 1] = b * cosines[i] + a * sines[i];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cosines[i] - b * sines[i];
        out[half + i] = b * cosines[i] + a * sines[i];
      }
    }
    if (out != x) std::memcpy(out + dim, x + dim, static_cast<size_t>(head_dim - dim) * 4);
  }
}

static float max_of(const float* x, int64_t n) {
  F top = f_set(x[0]);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) top = f_max(top, f_load(x + i));
  float best = f_top(top);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

static void narrow(const float* x, int64_t n, Storage storage, uint8_t* out) {
  if (storage == Storage::kFp32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    storage == Storage::kBf16 ? f_store_bf16(to + i, f_load(x + i))
                              : f_store_fp16(to + i, f_load(x + i));
  if (i < n) {
    uint16_t whole[16];
    const F rest = load_part(x + i, n - i);
    storage == Storage::kBf16 ? f_store_bf16(whole, rest) : f_store_fp16(whole, rest);
    std::memcpy(to + i, whole, static_cast<size_t>(n - i) * 2);
  }
}
