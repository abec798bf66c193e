// Four vectors at once, one by one: for paths that have nothing better. Included by their vector
// headers, inside a namespace of its own.

// The largest lane of each of four.
static inline void f_tops(const F (&x)[4], float* tops) {
  for (int i = 0; i < 4; ++i) tops[i] = f_top(x[i]);
}
// 64 bytes of four; their values fit.
static inline void i_store_bytes(int8_t* p, const I (&x)[4]) {
  for (int i = 0; i < 4; ++i) i_store_bytes(p + 16 * i, x[i]);
}
// The sums of 16 signed bytes each, of 128.
static inline void sum_bytes_of_128(const int8_t* p, int32_t* sums) {
  for (int i = 0; i < 4; ++i) sum_bytes(p + 32 * i, sums + 2 * i);
}
