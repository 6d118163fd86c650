// Macros that compile loops over many numbers for several kinds of CPU. The loader chooses the one that runs.
#ifndef DPSR_TF_OPS_FOR_EACH_CPU_H_
#define DPSR_TF_OPS_FOR_EACH_CPU_H_

#include <cstdint>

// Put DPSR_FOR_EACH_CPU before a function that has such loops, and DPSR_INLINE before the functions that it calls,
// which are compiled for each CPU only if they are inlined. It cannot be combined with sanitizers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define DPSR_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DPSR_FOR_EACH_CPU
#endif
#define DPSR_INLINE inline __attribute__((always_inline))
#define DPSR_INLINE_LAMBDA __attribute__((always_inline))

namespace dpsr {

// A sum has as many parts as the widest register, on every kind of CPU, so that results do not depend on the CPU.
constexpr int64_t kLanes = 16;

template <typename T>
DPSR_INLINE T Total(const T (&lanes)[kLanes]) {
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

// Returns the inner product of two vectors of n numbers.
DPSR_INLINE float Dot(const float* a, const float* b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[k + lane] * b[k + lane];
  }
  for (; k < n; ++k) lanes[k % kLanes] += a[k] * b[k];
  return Total(lanes);
}

}  // namespace dpsr

#endif  // DPSR_TF_OPS_FOR_EACH_CPU_H_
