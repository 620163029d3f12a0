// Work in parts for threads that run at the same time, and waiting for it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dart {

// Waiting that takes microseconds if all goes well: spins first, then gives the core away, for
// whoever is waited for may not be running at all.
class Patience {
 public:
  void wait() {
    if (++spins_ > 2000) std::this_thread::yield();
#if defined(__x86_64__)
    else _mm_pause();
#endif
  }

 private:
  int64_t spins_ = 0;
};

// Parts of one job that members take as they come, so that a slow one does not hold up the others.
// The parts do not depend on the number of members, nor does the order in which sums are added.
constexpr int64_t PARTS = 16;

struct Span {
  int64_t begin, end;
};

// The part of 0..n of one member, in steps of `step`.
inline Span part(int64_t n, int64_t member, int64_t size, int64_t step = 4) {
  int64_t blocks = (n + step - 1) / step;
  auto at = [&](int64_t m) { int64_t x = blocks * m / size * step; return x < n ? x : n; };
  return {at(member), at(member + 1)};
}

}  // namespace dart
