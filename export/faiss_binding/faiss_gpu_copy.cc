#include "export/faiss_binding/faiss_gpu_copy.h"

#include <stdexcept>
#include <utility>

namespace dpsr {
Status FaissGpuCopy::Create(const FaissFunctions& faiss, const faiss::Index* index, int64_t d, int device,
                            std::unique_ptr<FaissGpuCopy>* copy) {
  if (!faiss.has_gpu()) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS library ", faiss.path(),
                      " does not support GPUs; install faiss-gpu==", kFaissVersion, " instead of faiss-cpu");
  }
  return CatchExceptions(StatusCode::kFailedPrecondition, StrCat("cannot copy the index to GPU ", device), [&] {
    const int devices = faiss.num_gpus();
    if (device < 0 || device >= devices) throw std::out_of_range(StrCat("there are ", devices, " GPUs"));
    std::unique_ptr<FaissGpuCopy> created(new FaissGpuCopy(faiss, d));
    if (created->resources_.back() != kUntouched) {
      throw std::length_error("StandardGpuResources is larger than expected");
    }
    created->index_ = faiss.copy_to_gpu(created->resources_.data(), device, index, nullptr);
    *copy = std::move(created);
  });
}

FaissGpuCopy::FaissGpuCopy(const FaissFunctions& faiss, int64_t d)
    : faiss_(faiss),
      searches_(d, [this](int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
        faiss_.Search(index_, n, x, k, distances, labels);
      }) {
  resources_.fill(kUntouched);
  faiss_.construct_gpu_resources(resources_.data());
}

FaissGpuCopy::~FaissGpuCopy() {
  if (index_ != nullptr) faiss_.Delete(index_);
  faiss_.destroy_gpu_resources(resources_.data());
}

}  // namespace dpsr
