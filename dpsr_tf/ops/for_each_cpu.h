// Loops over many numbers are compiled for several kinds of CPU; which one runs is chosen when the library loads.
#ifndef DPSR_TF_OPS_FOR_EACH_CPU_H_
#define DPSR_TF_OPS_FOR_EACH_CPU_H_

#include <cstdint>

// Before a function that has such loops. What it calls must be inline to have a part in it (DPSR_INLINE). Sanitizers do
// not go with that.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define DPSR_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DPSR_FOR_EACH_CPU
#endif
#define DPSR_INLINE inline __attribute__((always_inline))
#define DPSR_INLINE_LAMBDA __attribute__((always_inline))

namespace dpsr {

// Sums are kept in as many parts as a wide register holds, so that they are the same on every kind of CPU.
constexpr int64_t kLanes = 16;

template <typename T>
DPSR_INLINE T Total(const T (&lanes)[kLanes]) {
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

}  // namespace dpsr

#endif  // DPSR_TF_OPS_FOR_EACH_CPU_H_
