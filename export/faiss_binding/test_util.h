// For tests only: builds FAISS index files with functions of FAISS that the binding itself does not need.
#ifndef DPSR_EXPORT_FAISS_BINDING_TEST_UTIL_H_
#define DPSR_EXPORT_FAISS_BINDING_TEST_UTIL_H_

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "export/faiss_binding/faiss_library.h"
#include "export/faiss_binding/faiss_metric.h"

namespace dpsr {

// Returns [n, d] normally distributed numbers.
inline std::vector<float> RandomVectors(int64_t n, int d, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n * d);
  for (float& value : x) value = normal(random);
  return x;
}

// Writes an index of `vectors` [n, d] to a file. `description` is that of index_factory: "Flat", one that begins with
// "HNSW", or one that begins with "IVF", which is trained with the first `num_train` vectors. With `second_lists` [n],
// which is for IVF with PQ only, each vector is also in this list. The index in memory is not freed.
inline void WriteTestIndex(const FaissLibrary& library, const std::string& path, const std::string& description, int d,
                           FaissMetric metric, const std::vector<float>& vectors, int64_t num_train = 0,
                           const std::vector<int64_t>& second_lists = {}) {
  using AddFunction = void(void* index, int64_t n, const float* x);
  using AddToListsFunction = void(void* index, int64_t n, const float* x, const int64_t* ids, const int64_t* lists,
                                  void* context);
  const bool has_lists = description.rfind("IVF", 0) == 0;
  void* const handle = dlopen(library.path().c_str(), RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(handle, nullptr);
  const auto create = reinterpret_cast<void* (*)(int, const char*, FaissMetric, bool)>(
      dlsym(handle, "_ZN5faiss13index_factoryEiPKcNS_10MetricTypeEb"));
  const auto train = reinterpret_cast<AddFunction*>(dlsym(handle, "_ZN5faiss8IndexIVF5trainElPKf"));
  const auto add = reinterpret_cast<AddFunction*>(
      dlsym(handle, has_lists                           ? "_ZN5faiss8IndexIVF3addElPKf"
                    : description.rfind("HNSW", 0) == 0 ? "_ZN5faiss9IndexHNSW3addElPKf"
                                                        : "_ZN5faiss14IndexFlatCodes3addElPKf"));
  const auto add_to_lists = reinterpret_cast<AddToListsFunction*>(
      dlsym(handle, "_ZN5faiss10IndexIVFPQ8add_coreElPKfPKlS4_Pv"));
  const auto write = reinterpret_cast<void (*)(const void*, const char*, int)>(
      dlsym(handle, "_ZN5faiss11write_indexEPKNS_5IndexEPKci"));
  const auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(handle, "omp_set_num_threads"));
  ASSERT_TRUE(create != nullptr && train != nullptr && add != nullptr && write != nullptr && set_threads != nullptr);

  set_threads(1);
  void* const index = create(d, description.c_str(), metric, /*own_inverted_lists=*/true);
  if (has_lists) train(index, num_train, vectors.data());
  add(index, static_cast<int64_t>(vectors.size()) / d, vectors.data());
  if (!second_lists.empty()) {
    ASSERT_NE(add_to_lists, nullptr);
    std::vector<int64_t> ids(second_lists.size());
    std::iota(ids.begin(), ids.end(), 0);
    add_to_lists(index, static_cast<int64_t>(ids.size()), vectors.data(), ids.data(), second_lists.data(), nullptr);
  }
  write(index, path.c_str(), /*io_flags=*/0);
}

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_TEST_UTIL_H_
