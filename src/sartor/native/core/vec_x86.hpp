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

// The sums of 16 signed bytes each, of 128.
static inline void sum_bytes_of_128(const int8_t* p, int32_t* sums) {
  __m256i eights[4];  // of 32 bytes: the sums of 8 and 8, of 8 and 8
  for (int i = 0; i < 4; ++i) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
    eights[i] =
        _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  }
  __m256i sixteens[2];
  for (int i = 0; i < 2; ++i)
    sixteens[i] = _mm256_add_epi64(_mm256_unpacklo_epi64(eights[2 * i], eights[2 * i + 1]),
                                   _mm256_unpackhi_epi64(eights[2 * i], eights[2 * i + 1]));
  const __m256 low =
      _mm256_shuffle_ps(_mm256_castsi256_ps(sixteens[0]), _mm256_castsi256_ps(sixteens[1]), 0x88);
  const __m256i ordered = _mm256_permutevar8x32_epi32(_mm256_castps_si256(low),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums),
                      _mm256_sub_epi32(ordered, _mm256_set1_epi32(16 * 128)));
}

// The largest lane of each of four.
static inline void tops_of(const __m256 (&x)[4], float* tops) {
  const __m256 a = _mm256_max_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  const __m256 b = _mm256_max_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  const __m256 both = _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  _mm_storeu_ps(tops, _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
