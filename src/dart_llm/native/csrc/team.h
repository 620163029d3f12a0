// Work in parts for threads that run at the same time, and waiting for it.
#pragma once
#include <atomic>
#include <cassert>
#include <cstdint>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dart {

// Waits that take microseconds if all goes well: spins first, then yields the core, because the
// thread that is waited for may not be running at all.
class SpinWait {
 public:
  void wait() {
    if (++spins_ > 2000) std::this_thread::yield();
#if defined(__x86_64__)
    else _mm_pause();
#elif defined(__aarch64__)
    else __asm__ __volatile__("yield");
#endif
  }

 private:
  int64_t spins_ = 0;
};

// Parts of one job.  Each member begins with neighbouring parts of its own, whose weights lie one after
// the other in memory, and then takes those of the others, so that a slow one does not hold them up.
// The parts do not depend on the number of members, nor does the order in which sums are added.
constexpr int64_t PARTS = 16, FEW_PARTS = 4;  // few: of a job so short that taking parts shows

struct Span {
  int64_t begin, end;
};

// The part of 0..n of one member, in steps of `step`.
inline Span part(int64_t n, int64_t member, int64_t size, int64_t step = 4) {
  int64_t blocks = (n + step - 1) / step;
  auto at = [&](int64_t m) {
    int64_t x = blocks * m / size * step;
    return x < n ? x : n;
  };
  return {at(member), at(member + 1)};
}

// Jobs that members do together, one after the other: the parts of each that they have taken, and
// have finished.
struct Jobs {
  explicit Jobs(int64_t count, int64_t members = 1)
      : count(count), members(members), taken(size_t(count * members)), done(size_t(count)) {}
  void begin() {  // before the members begin
    for (auto* counts : {&taken, &done})
      for (std::atomic<int64_t>& one : *counts) one.store(0, std::memory_order_relaxed);
  }
  int64_t count, members;
  // [members, count]: of each member's parts, apart from those of others in memory; [count]
  std::vector<std::atomic<int64_t>> taken, done;
};

// One member at its jobs; all members go through the same ones.
class Worker {
 public:
  static constexpr int64_t MOST = 8;  // jobs that may be open at once

  explicit Worker(Jobs& jobs, int64_t member = 0) : jobs_(jobs), member_(member % jobs.members) {}

  // Calls work(part, number of parts) for the parts of a job that fall to this member; every member
  // calls it.  A member that comes late finds nothing left.  What a job reads may change as soon as
  // all its parts are done: a member reads it only while it works on a part (see `Once`).
  template <class Work>
  void in_parts(int64_t parts, const Work& work) {
    assert(begun_ < jobs_.count);
    int64_t finished = 0;  // told at once: every word of it to the others takes time
    for (int64_t i = 0; i < jobs_.members; ++i) {
      int64_t member = (member_ + i) % jobs_.members;
      Span own = part(parts, member, jobs_.members, 1);
      std::atomic<int64_t>& taken = jobs_.taken[size_t(member * jobs_.count + begun_)];
      auto next = [&] {
        bool none = taken.load(std::memory_order_relaxed) >= own.end - own.begin;
        return none ? own.end : own.begin + taken.fetch_add(1, std::memory_order_relaxed);
      };
      for (int64_t one; (one = next()) < own.end; ++finished) work(one, parts);
    }
    if (finished) jobs_.done[begun_].fetch_add(finished, std::memory_order_release);
    assert(begun_ - seen_ < MOST);
    open_[begun_++ - seen_] = parts;
  }

  bool is_first() const { return member_ == 0; }

  // Returns when all jobs begun so far are finished.  Waits for parts, not for members: one that is
  // not running, and has taken nothing, holds nobody up.
  void finish() {
    for (int64_t job = seen_; job < begun_; ++job) {
      SpinWait spin;
      while (jobs_.done[job].load(std::memory_order_acquire) < open_[job - seen_]) spin.wait();
    }
    seen_ = begun_;
  }

 private:
  Jobs& jobs_;
  int64_t member_;
  int64_t begun_ = 0, seen_ = 0;  // jobs: begun, and seen to be finished; `begun_` is alike for all
  int64_t open_[MOST] = {};       // parts of the jobs between the two
};

// What a member makes when it first works on a part, and keeps for the others.
template <class Make>
class Once {
 public:
  explicit Once(Make make) : make_(std::move(make)) {}
  const auto& operator()() {
    if (!made_) made_.emplace(make_());
    return *made_;
  }

 private:
  Make make_;
  std::optional<decltype(std::declval<Make&>()())> made_;
};

}  // namespace dart
