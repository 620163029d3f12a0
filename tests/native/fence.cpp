// Memory whose end is the end of a page that nothing may touch beyond, where there is no ASan: what reads
// or writes behind a buffer ends the program.
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t PAGE = 4096;

std::size_t room(std::size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

}  // namespace

void* operator new(std::size_t size) {
  void* from = mmap(nullptr, room(size) + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* end = static_cast<char*>(from) + room(size);
  if (from == MAP_FAILED || mprotect(end, PAGE, PROT_NONE)) std::abort();
  return end - size;
}

void operator delete(void* memory, std::size_t size) noexcept {
  if (memory) munmap(static_cast<char*>(memory) + size - room(size), room(size) + PAGE);
}

void operator delete(void*) noexcept {}  // of unknown size: stays
