// Eight lanes of AVX2, inside the set of vectors of each kind of CPU that has them.
static constexpr int N = 8;
static constexpr bool PAIRS = false;
using V = __m256;
static V all(float v) { return _mm256_set1_ps(v); }
static V zero() { return _mm256_setzero_ps(); }
static V load(const float* p) { return _mm256_loadu_ps(p); }
static V load(const bf16* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static void sums(const V* four, float* to) {  // to[i] = sum(four[i])
  V s = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
struct Levels {
  V low, high;
};
static Levels levels(const uint8_t* bytes) {
  __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(15));
  const V eight = all(8);
  return {_mm256_sub_ps(_mm256_cvtepi32_ps(low), eight),
          _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)), eight)};
}
static V pairs(const bf16*) { return zero(); }
static V dot_bf16(V a, V, V) { return a; }

// Asks for a line of memory.  Lines asked for out of order, as compilers arrange
// them, keep the CPU from reading ahead by itself.
static void ask(const uint8_t* p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }

// For packed matrices: see packed_body.h.
static constexpr int64_t BYTES = 32;
using B = __m256i;
using W = __m256i;
static V add(V a, V b) { return _mm256_add_ps(a, b); }
static W add(W a, W b) { return _mm256_add_epi32(a, b); }
static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static B bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static B same(uint32_t four) { return _mm256_set1_epi32(int(four)); }
static B low(B both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
static B high(B both) { return low(_mm256_srli_epi16(both, 4)); }
static B last(const uint8_t* p, int64_t column) { return column ? high(bytes(p)) : low(bytes(p)); }
static W whole(int x) { return _mm256_set1_epi32(x); }
static V to_float(W x) { return _mm256_cvtepi32_ps(x); }
static V half(const uint16_t* p, int64_t n) {
  uint16_t own[N] = {};
  if (n < N) std::memcpy(own, p, n * 2), p = own;
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static V small(const int8_t* p, int64_t n) {
  int8_t own[N] = {};
  if (n < N) std::memcpy(own, p, n), p = own;
  __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}
template <int SIZE>
static V spread(const float* p) {
  if (SIZE == 16) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  double both;
  std::memcpy(&both, p, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
static void interleave(const B* r, B* to) {
  B a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
  B c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
  to[0] = _mm256_unpacklo_epi16(a, c), to[1] = _mm256_unpackhi_epi16(a, c);
  to[2] = _mm256_unpacklo_epi16(b, d), to[3] = _mm256_unpackhi_epi16(b, d);
}
static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
static V div(V a, V b) { return _mm256_div_ps(a, b); }
static V max(V a, V b) { return _mm256_max_ps(a, b); }
static V min(V a, V b) { return _mm256_min_ps(a, b); }
static W max(W a, W b) { return _mm256_max_epi32(a, b); }
static W magnitude(V a) { return _mm256_and_si256(_mm256_castps_si256(a), whole(0x7fffffff)); }  // bits
static int largest(W a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
static float largest(V a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static W nearest(V a) { return _mm256_cvtps_epi32(a); }
static int sum_of(W a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static void store_small(int8_t* p, W a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
static V power_of_two(W a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(127)), 23));
}
static V level(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static void store(bf16* p, V a) {  // rounded to the nearest, ties to even
  W bits = _mm256_castps_si256(a);
  W odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), whole(1));
  W up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, whole(0x7fff))), 16);
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
