#include "export/faiss_binding/faiss_gpu_copy.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace dpsr {
namespace {

// Queries of one search. A grid of a GPU has room for 65,535.
constexpr int64_t kMostAtOnce = 32768;

}  // namespace

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
      searches_(d, [this, d](int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
        for (int64_t begin = 0; begin < n; begin += kMostAtOnce) {
          faiss_.Search(index_, std::min(kMostAtOnce, n - begin), x + begin * d, k, distances + begin * k,
                        labels + begin * k);
        }
      }) {
  resources_.fill(kUntouched);
  faiss_.construct_gpu_resources(resources_.data());
}

FaissGpuCopy::~FaissGpuCopy() {
  if (index_ != nullptr) faiss_.Delete(index_);
  faiss_.destroy_gpu_resources(resources_.data());
}

}  // namespace dpsr
