// Memory in huge pages, for what is copied so that every token reads it quickly.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <vector>

namespace dart {

// Room for tensors that lie one after the other in pages of 2 MiB, where the system gives these.
// A page is asked for before anything is written to it: small ones would be copied into it later.
// The memory goes back to the system with the room and the last tensor in it; of several maps, one
// with the last tensor in it.
class HugeRoom : public torch::CustomClassHolder {
 public:
  // With pages for `bytes`, which are there when it returns; more of them come as they are needed.
  explicit HugeRoom(int64_t bytes);
  ~HugeRoom() override;

  // A tensor of `count` values that are not set.  Where no map can be had: in torch's own memory.
  at::Tensor take(int64_t count, at::ScalarType);
  // `count` zeros, in one room for all that is made by this.
  static at::Tensor zeros(int64_t count, at::ScalarType);
  // Bytes that are there and free.
  int64_t left();

 private:
  // Addresses, and what of them is free: begin -> end, in bytes from `start`.
  struct Map {
    char* base;
    size_t mapped;
    char* start;
    size_t size, made;  // bytes; those whose pages are there
    std::map<size_t, size_t> free;
  };
  bool add_map(size_t bytes);
  static void make(Map&, size_t end, size_t ahead);
  char* take_bytes(size_t bytes);
  void give(char* place, size_t bytes);

  std::mutex mutex_;
  std::vector<Map> maps_;
};

void register_rooms(torch::Library&);

}  // namespace dart
