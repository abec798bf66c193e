// Sixty-four numbers as whole ones (vec_planes.hpp), sixteen by sixteen: for paths that have
// nothing better. Included by their vector headers, inside a namespace of their own.

// The sum of what was stored, which is below 2^24.
struct WideCount {
  F sum = f_set(0.0f);
  int32_t total() const { return static_cast<int32_t>(f_sum(sum)); }
};

// Rounds numbers within `limit`; what is not a number becomes it.
static inline void wide_store(int8_t* row, int64_t n, int64_t at, const F (&x)[4], float limit,
                              WideCount& count) {
  for (int i = 0; i < 4; ++i) {
    const F whole = f_round(f_max(f_min(x[i], f_set(limit)), f_set(-limit)));
    count.sum = f_add(count.sum, whole);
    wide_store(row, n, at + kLanes * i, whole);
  }
}
