// Work on torch's threads, with the kernels that are in use.
#pragma once
#include <ATen/Parallel.h>

#include "kernels.h"
#include "team.h"

namespace dart {

// Calls work(member) once on each of torch's threads, at the same time.
template <class Work>
void run_on_threads(const Work& work) {
  int64_t wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (wanted == 1) {
    work(0);
    return;
  }
  // Fewer threads than wanted may run: then each stands for the first of several members.
  at::parallel_for(0, wanted, 1, [&](int64_t, int64_t) { work(at::get_thread_num()); });
}

// The kernels that run: those selected by name, else the best of this CPU.
const Kernels& best();

}  // namespace dart
