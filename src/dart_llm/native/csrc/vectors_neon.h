// Eight lanes in pairs of 128-bit NEON vectors, inside the set of vectors of CPUs that have them:
// the shape of AVX2's, and with a pair twice as many sums that do not wait for each other.
static constexpr int N = 8;
static constexpr bool PAIRS = false;
struct V {
  float32x4_t a, b;
};
static V all(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
static V zero() { return all(0); }
static V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
static V load(const bf16* p) {
  uint16x8_t half = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
}
static V fma(V a, V b, V c) { return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }
static float sum(V a) { return vaddvq_f32(vaddq_f32(a.a, a.b)); }
static void sums(const V* four, float* to) {  // to[i] = sum(four[i])
  auto half = [&](int i) { return vaddq_f32(four[i].a, four[i].b); };
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(half(0), half(1)), vpaddq_f32(half(2), half(3))));
}
static void store(float* p, V a) { vst1q_f32(p, a.a), vst1q_f32(p + 4, a.b); }
static V widened(int8x8_t eight) {
  int16x8_t words = vmovl_s8(eight);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
}
struct Levels {
  V low, high;
};
static Levels levels(const uint8_t* bytes) {
  uint8x8_t both = vld1_u8(bytes), eight = vdup_n_u8(8);
  uint8x8_t low = vsub_u8(vand_u8(both, vdup_n_u8(15)), eight);
  return {widened(vreinterpret_s8_u8(low)), widened(vreinterpret_s8_u8(vsub_u8(vshr_n_u8(both, 4), eight)))};
}
static V pairs(const bf16*) { return zero(); }
static V dot_bf16(V a, V, V) { return a; }

// Asks for a line of memory.
static void ask(const uint8_t* p) { __builtin_prefetch(p); }

// For packed matrices: see packed_body.h.
static constexpr int64_t BYTES = 32;
struct B {
  uint8x16_t a, b;
};
struct W {
  int32x4_t a, b;
};
static V add(V a, V b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
static V mul(V a, V b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
static B bytes(const void* p) {
  const uint8_t* from = static_cast<const uint8_t*>(p);
  return {vld1q_u8(from), vld1q_u8(from + 16)};
}
static B same(uint32_t four) {
  uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(four));
  return {all, all};
}
static B low(B both) {
  const uint8x16_t mask = vdupq_n_u8(15);
  return {vandq_u8(both.a, mask), vandq_u8(both.b, mask)};
}
static B high(B both) { return {vshrq_n_u8(both.a, 4), vshrq_n_u8(both.b, 4)}; }
static B last(const uint8_t* p, int64_t column) { return column ? high(bytes(p)) : low(bytes(p)); }
static W whole(int x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
static V to_float(W x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
static constexpr int TAKEN = 128;  // both bytes of a product have a sign here
static W dot6(W to, B levels, B x) {
  return {vdotq_s32(to.a, vreinterpretq_s8_u8(levels.a), vreinterpretq_s8_u8(x.a)),
          vdotq_s32(to.b, vreinterpretq_s8_u8(levels.b), vreinterpretq_s8_u8(x.b))};
}
static W dot8(W to, B levels, B x) {
  const uint8x16_t sign = vdupq_n_u8(128);
  return dot6(to, {veorq_u8(levels.a, sign), veorq_u8(levels.b, sign)}, x);
}
static W add_pairs(W to, B levels, B x) { return dot6(to, levels, x); }
static W sum_pairs(W sums) { return sums; }
static W add(W a, W b) { return {vaddq_s32(a.a, b.a), vaddq_s32(a.b, b.b)}; }
static V half(const uint16_t* p, int64_t n) {
  uint16_t own[N] = {};
  if (n < N) std::memcpy(own, p, n * 2), p = own;
  float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(eight)), vcvt_high_f32_f16(eight)};
}
static V small(const int8_t* p, int64_t n) {
  int8_t own[N] = {};
  if (n < N) std::memcpy(own, p, n), p = own;
  return widened(vld1_s8(p));
}
template <int SIZE>
static V spread(const float* p) {
  float32x4_t own = SIZE == 16 ? vld1q_f32(p) : vcombine_f32(vld1_f32(p), vld1_f32(p));
  return {own, own};
}
static void interleave(const uint8x16_t* r, uint8x16_t* to) {
  auto words = [](uint8x16_t x) { return vreinterpretq_u16_u8(x); };
  uint16x8_t a = words(vzip1q_u8(r[0], r[1])), b = words(vzip2q_u8(r[0], r[1]));
  uint16x8_t c = words(vzip1q_u8(r[2], r[3])), d = words(vzip2q_u8(r[2], r[3]));
  to[0] = vreinterpretq_u8_u16(vzip1q_u16(a, c)), to[1] = vreinterpretq_u8_u16(vzip2q_u16(a, c));
  to[2] = vreinterpretq_u8_u16(vzip1q_u16(b, d)), to[3] = vreinterpretq_u8_u16(vzip2q_u16(b, d));
}
static void interleave(const B* r, B* to) {
  const uint8x16_t first[] = {r[0].a, r[1].a, r[2].a, r[3].a};
  const uint8x16_t second[] = {r[0].b, r[1].b, r[2].b, r[3].b};
  uint8x16_t a[4], b[4];
  interleave(first, a), interleave(second, b);
  for (int v = 0; v < 4; ++v) to[v] = {a[v], b[v]};
}
static V sub(V a, V b) { return {vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b)}; }
static V div(V a, V b) { return {vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b)}; }
static V max(V a, V b) { return {vmaxq_f32(a.a, b.a), vmaxq_f32(a.b, b.b)}; }
static V min(V a, V b) { return {vminq_f32(a.a, b.a), vminq_f32(a.b, b.b)}; }
static W max(W a, W b) { return {vmaxq_s32(a.a, b.a), vmaxq_s32(a.b, b.b)}; }
static W magnitude(V a) {  // bits
  return {vreinterpretq_s32_f32(vabsq_f32(a.a)), vreinterpretq_s32_f32(vabsq_f32(a.b))};
}
static int largest(W a) { return vmaxvq_s32(vmaxq_s32(a.a, a.b)); }
static float largest(V a) { return vmaxvq_f32(vmaxq_f32(a.a, a.b)); }
static W nearest(V a) { return {vcvtnq_s32_f32(a.a), vcvtnq_s32_f32(a.b)}; }
static int sum_of(W a) { return vaddvq_s32(vaddq_s32(a.a, a.b)); }
static void store_small(int8_t* p, W a) {
  vst1_s8(p, vqmovn_s16(vcombine_s16(vqmovn_s32(a.a), vqmovn_s32(a.b))));
}
static V power_of_two(W a) {
  const int32x4_t one = vdupq_n_s32(127);
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.a, one), 23)),
          vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.b, one), 23))};
}
static V level(const uint8_t* p) {
  uint16x8_t words = vmovl_u8(vld1_u8(p));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))};
}
static uint16x4_t rounded(float32x4_t x) {  // to the nearest, ties to even
  uint32x4_t bits = vreinterpretq_u32_f32(x);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
}
static void store(bf16* p, V a) { vst1q_u16(p, vcombine_u16(rounded(a.a), rounded(a.b))); }
