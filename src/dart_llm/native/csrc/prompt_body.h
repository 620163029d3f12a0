// Attention of a prompt, written once over the set of vectors `S` of one CPU kind; included by
// kernels_body.h after packed_body.h.

// c[i, j] = a[i, 0] b[0, j] + ... + a[i, k - 1] b[k - 1, j] of R rows and C vectors of j.
template <int R, int C>
inline void product_block(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t k,
                          float* c, int64_t c_pitch) {
  typename S::V sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = S::zero();
  for (int64_t i = 0; i < k; ++i) {
    typename S::V row[C];
    for (int j = 0; j < C; ++j) row[j] = S::load(b + i * b_pitch + j * S::N);
    for (int r = 0; r < R; ++r) {
      auto by = S::all(a[r * a_pitch + i]);
      for (int j = 0; j < C; ++j) sum[r][j] = S::fma(by, row[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) S::store(c + r * c_pitch + j * S::N, sum[r][j]);
}

template <int R>
inline void product_rows(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t k,
                         int64_t n, float* c, int64_t c_pitch) {
  constexpr int C = S::N == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + C * S::N <= n; j += C * S::N) product_block<R, C>(a, a_pitch, b + j, b_pitch, k, c + j, c_pitch);
  for (; j < n; j += S::N) product_block<R, 1>(a, a_pitch, b + j, b_pitch, k, c + j, c_pitch);
}

// c [m, n] = a [m, k] b [k, n]; n: whole vectors.
inline void product(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t m, int64_t k,
                    int64_t n, float* c, int64_t c_pitch) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    product_rows<4>(a + i * a_pitch, a_pitch, b, b_pitch, k, n, c + i * c_pitch, c_pitch);
  for (; i < m; ++i) product_rows<1>(a + i * a_pitch, a_pitch, b, b_pitch, k, n, c + i * c_pitch, c_pitch);
}

void attend_some(const Queries& q) {
  int64_t n = q.first + q.count, room = (n + S::N - 1) / S::N * S::N, size = whole_lanes(q.size);
  product(q.queries, q.pitch, q.keys, q.keys_pitch, q.count, q.size, room, q.scores, room);
  float totals[QUERIES];
  for (int64_t i = 0; i < q.count; ++i) {
    float most = -INFINITY;
    totals[i] = soften(q.scores + i * room, q.first + i + 1, room, q.scale, most);
  }
  float* mixed = q.scores + QUERIES * room;
  product(q.scores, room, q.values, size, q.count, n, size, mixed, size);
  for (int64_t i = 0; i < q.count; ++i)
    for (int64_t c = 0; c < q.size; ++c) q.out[i * q.out_pitch + c] = mixed[i * size + c] / totals[i];
}
