// Internal to export/faiss_binding/. The copy of an index on a GPU, by faiss-gpu.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_GPU_COPY_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_GPU_COPY_H_

#include <array>
#include <cstdint>
#include <memory>

#include "common/status.h"
#include "export/faiss_binding/combined_searches.h"
#include "export/faiss_binding/faiss_functions.h"

namespace dpsr {

class FaissGpuCopy {
 public:
  // Copies an index of vectors [d]. Errors: FailedPrecondition (the library is faiss-cpu, there is no such device, no
  // memory, FAISS has no such index on a GPU).
  static Status Create(const FaissFunctions& faiss, const faiss::Index* index, int64_t d, int device,
                       std::unique_ptr<FaissGpuCopy>* copy);
  ~FaissGpuCopy();
  FaissGpuCopy(const FaissGpuCopy&) = delete;
  FaissGpuCopy& operator=(const FaissGpuCopy&) = delete;

  // As FaissFunctions::Search. Thread-safe: FAISS's GPU resources run one search at a time. Callers that wait for it
  // share the next one. Throws what FAISS throws.
  void Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
    searches_.Search(n, x, k, distances, labels);
  }

 private:
  FaissGpuCopy(const FaissFunctions& faiss, int64_t d);

  const FaissFunctions& faiss_;
  // A faiss::gpu::StandardGpuResources, which holds one pointer.
  alignas(64) std::array<unsigned char, 1024> resources_;
  faiss::Index* index_ = nullptr;
  CombinedSearches searches_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_GPU_COPY_H_
