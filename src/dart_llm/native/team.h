// Threads that work on one thing together, and wait for one another between its parts.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dart {

class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}
  int64_t size() const { return size_; }

  // Returns when every member has come here.  Spins, for parts take microseconds; gives the core
  // away after a while, for a member may not be running at all.
  void wait() {
    if (size_ == 1) return;
    int64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 20000) std::this_thread::yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }

 private:
  const int64_t size_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
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
