// What the x86-64 paths share. Included by their vector headers, inside a namespace of its own.

// The sums of 16 and 16 signed bytes.
static inline void sum_bytes(const int8_t* p, int32_t* sums) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i raised = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));  // + 128, unsigned
  alignas(32) int64_t eights[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(eights),
                     _mm256_sad_epu8(raised, _mm256_setzero_si256()));
  sums[0] = static_cast<int32_t>(eights[0] + eights[1]) - 16 * 128;
  sums[1] = static_cast<int32_t>(eights[2] + eights[3]) - 16 * 128;
}
