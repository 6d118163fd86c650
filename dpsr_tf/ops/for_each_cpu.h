// Loops over many numbers are compiled for several kinds of CPU; which one runs is chosen when the library loads.
#ifndef DPSR_TF_OPS_FOR_EACH_CPU_H_
#define DPSR_TF_OPS_FOR_EACH_CPU_H_

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

#endif  // DPSR_TF_OPS_FOR_EACH_CPU_H_
