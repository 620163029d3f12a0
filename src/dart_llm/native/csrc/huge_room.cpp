// Memory for compact weights, from large maps that ask for huge pages.
#include "huge_room.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "threads.h"

namespace dart {
namespace {

constexpr size_t PAGE = size_t(2) << 20;
constexpr size_t MAP = size_t(64) << 20;  // addresses of a map that is added; pages come as needed
constexpr size_t LINE = 64;
constexpr size_t AHEAD = 8;  // pages that are made at once at most: one for each thread

size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

HugeRoom::HugeRoom(int64_t bytes) {
  size_t size = up(size_t(std::max<int64_t>(bytes, 0)), PAGE);
  if (size && add_map(size)) make(maps_[0], size, 0);
}

HugeRoom::~HugeRoom() {
  for (Map& one : maps_) munmap(one.base, one.mapped);
}

bool HugeRoom::add_map(size_t bytes) {
  size_t mapped = bytes + PAGE;
  void* got =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return false;
  char* base = static_cast<char*>(got);
  char* start = base + (up(size_t(base), PAGE) - size_t(base));
#ifdef MADV_HUGEPAGE
  madvise(start, bytes, MADV_HUGEPAGE);  // where it is refused pages stay small
#endif
  maps_.push_back({base, mapped, start, bytes, 0, {{0, bytes}}});
  return true;
}

// Writes to each page up to `end`, and `ahead` bytes from the last one on, on torch's threads: two
// that write to the same new page would each make it.
void HugeRoom::make(Map& map, size_t end, size_t ahead) {
  if (end <= map.made) return;
  size_t last = std::min(up(std::max(end, map.made + ahead), PAGE), map.size) / PAGE;
  std::atomic<size_t> next{map.made / PAGE};
  run_on_threads([&](int64_t) {
    for (size_t page; (page = next++) < last;) *static_cast<volatile char*>(map.start + page * PAGE) = 0;
  });
  map.made = last * PAGE;
}

char* HugeRoom::take_bytes(size_t bytes) {
  for (bool added : {false, true}) {
    if (added && !add_map(std::max(MAP, up(bytes, PAGE)))) return nullptr;
    for (Map& map : maps_)
      for (auto [begin, end] : map.free) {
        if (end - begin < bytes) continue;
        map.free.erase(begin);
        if (begin + bytes < end) map.free[begin + bytes] = end;
        make(map, begin + bytes, std::min(size_t(at::get_num_threads()), AHEAD) * PAGE);
        return map.start + begin;
      }
  }
  return nullptr;
}

at::Tensor HugeRoom::take(int64_t count, at::ScalarType type) {
  size_t bytes = up(std::max<size_t>(1, size_t(count) * c10::elementSize(type)), LINE);
  std::lock_guard<std::mutex> lock(mutex_);
  char* place = take_bytes(bytes);
  if (!place) return at::empty({count}, type);
  auto self = c10::intrusive_ptr<HugeRoom>::reclaim_copy(this);
  return at::from_blob(place, {count}, [self, place, bytes](void*) { self->give(place, bytes); }, type);
}

at::Tensor HugeRoom::zeros(int64_t count, at::ScalarType type) {
  static std::mutex mutex;
  static c10::weak_intrusive_ptr<HugeRoom> last{c10::intrusive_ptr<HugeRoom>()};
  c10::intrusive_ptr<HugeRoom> room;
  {
    std::lock_guard<std::mutex> lock(mutex);
    room = last.lock();
    if (!room) last = room = c10::make_intrusive<HugeRoom>(0);
  }
  return room->take(count, type).zero_();
}

void HugeRoom::give(char* place, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto one = maps_.begin(); one != maps_.end(); ++one) {
    Map& map = *one;
    if (place < map.start || place >= map.start + map.size) continue;
    size_t begin = size_t(place - map.start), end = begin + bytes;
    auto after = map.free.lower_bound(begin);
    if (after != map.free.end() && after->first == end) end = after->second, after = map.free.erase(after);
    if (after != map.free.begin() && std::prev(after)->second == begin) std::prev(after)->second = end;
    else map.free[begin] = end;
    if (maps_.size() > 1 && map.free.begin()->second - map.free.begin()->first == map.size) {
      munmap(map.base, map.mapped);
      maps_.erase(one);
    }
    return;
  }
}

int64_t HugeRoom::left() {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (Map& map : maps_)
    for (auto [begin, end] : map.free) total += std::max(std::min(end, map.made), begin) - begin;
  return int64_t(total);
}

void register_rooms(torch::Library& library) {
  library.class_<HugeRoom>("HugeRoom").def(torch::init<int64_t>()).def("left", &HugeRoom::left);
}

}  // namespace dart
