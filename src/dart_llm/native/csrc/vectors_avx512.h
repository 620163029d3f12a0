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
static void sums(const V* four, float* to) {  // to[i] = sum(four[i])
  auto half = [&](int i) {
    return _mm256_add_ps(_mm512_castps512_ps256(four[i]), _mm512_extractf32x8_ps(four[i], 1));
  };
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(0), half(1)), _mm256_hadd_ps(half(2), half(3)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
struct Levels {
  V low, high;
};
static Levels levels(const uint8_t* bytes) {
  const V table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return {_mm512_permutexvar_ps(both, table),  // which reads four bits of an index
          _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table)};
}

// Asks for a line of memory, into the second cache, which has room for more requests.  Lines asked for out of
// order, as compilers arrange them, keep the CPU from reading ahead by itself.
static void ask(const uint8_t* p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }

// For packed matrices: see packed_body.h.
static constexpr int64_t BYTES = 64;
using B = __m512i;
using W = __m512i;
static V add(V a, V b) { return _mm512_add_ps(a, b); }
static W add(W a, W b) { return _mm512_add_epi32(a, b); }
static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static B bytes(const void* p) { return _mm512_loadu_si512(p); }
static B same(uint32_t four) { return _mm512_set1_epi32(int(four)); }
static B low(B both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
static B high(B both) { return low(_mm512_srli_epi16(both, 4)); }
static B last(const uint8_t* p, int64_t) {
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m512i twice = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
  return low(twice);
}
static W whole(int x) { return _mm512_set1_epi32(x); }
static V to_float(W x) { return _mm512_cvtepi32_ps(x); }
static __mmask16 first(int64_t n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
static V half(const uint16_t* p, int64_t n) {
  if (n >= N) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
static V small(const int8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
template <int SIZE>
static V spread(const float* p) {
  if (SIZE == 16) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  double both;
  std::memcpy(&both, p, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
static void interleave(const B* r, B* to) {
  B a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  B c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm512_unpacklo_epi16(a, c), to[1] = _mm512_unpackhi_epi16(a, c);
  to[2] = _mm512_unpacklo_epi16(b, d), to[3] = _mm512_unpackhi_epi16(b, d);
}
static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static V div(V a, V b) { return _mm512_div_ps(a, b); }
static V max(V a, V b) { return _mm512_max_ps(a, b); }
static V min(V a, V b) { return _mm512_min_ps(a, b); }
static W max(W a, W b) { return _mm512_max_epi32(a, b); }
static W magnitude(V a) { return _mm512_and_si512(_mm512_castps_si512(a), whole(0x7fffffff)); }  // bits
static int largest(W a) { return _mm512_reduce_max_epi32(a); }
static float largest(V a) { return _mm512_reduce_max_ps(a); }
static W nearest(V a) { return _mm512_cvtps_epi32(a); }
static int sum_of(W a) { return _mm512_reduce_add_epi32(a); }
static void store_small(int8_t* p, W a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
static V power_of_two(W a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
}
static V level(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static void store(bf16* p, V a) {  // rounded to the nearest, ties to even
  W bits = _mm512_castps_si512(a);
  W odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), whole(1));
  W up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, whole(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
