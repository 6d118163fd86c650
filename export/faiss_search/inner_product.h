// The inner product of two vectors, without FAISS.
#ifndef DPSR_EXPORT_FAISS_SEARCH_INNER_PRODUCT_H_
#define DPSR_EXPORT_FAISS_SEARCH_INNER_PRODUCT_H_

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dpsr {

inline float InnerProduct(const float* a, const float* b, int64_t dim) {
  // The sums are independent, so the compiler can use vector instructions without reordering additions.
  float sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= dim; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  for (; i < dim; ++i) sum += a[i] * b[i];
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) inline float InnerProductAvx2(const float* a, const float* b, int64_t dim) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sums[0]);
    sums[1] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), sums[1]);
  }
  alignas(32) float parts[8];
  _mm256_store_ps(parts, _mm256_add_ps(sums[0], sums[1]));
  float sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
  for (; i < dim; ++i) sum += a[i] * b[i];
  return sum;
}
#endif

// Returns the fastest function for this processor, for one query and many vectors, such as all centroids.
inline auto* FastInnerProduct() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return InnerProductAvx2;
#endif
  return InnerProduct;
}

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_INNER_PRODUCT_H_
