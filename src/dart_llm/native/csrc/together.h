// Work on torch's threads, with the kernels that are in use.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace dart {

// Calls work(member) once on each of torch's threads, at the same time.
template <class Work>
void together(const Work& work) {
  int64_t wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (wanted == 1) {
    work(0);
    return;
  }
  at::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t) {
    int64_t running = std::min<int64_t>(omp_get_num_threads(), wanted);  // may be fewer
    int64_t each = (wanted + running - 1) / running;
    work(begin / each);
  });
}

// The kernels that run: those chosen by name, else the best of this CPU.
const Kernels& best();

}  // namespace dart
