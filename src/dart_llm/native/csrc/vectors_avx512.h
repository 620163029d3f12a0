// Sixteen lanes of AVX-512, inside the set of vectors of each kind of CPU that has them.
  static constexpr int N = 16;
  using V = __m512;
  static V all(float v) { return _mm512_set1_ps(v); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const bf16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V a) { return _mm512_reduce_add_ps(a); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  struct Levels { V low, high; };
  static Levels levels(const uint8_t* bytes) {
    const V table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return {_mm512_permutexvar_ps(both, table),  // which reads four bits of an index
            _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table)};
  }
