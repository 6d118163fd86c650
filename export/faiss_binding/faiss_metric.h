// The metric of a FAISS index.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_METRIC_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_METRIC_H_

#include <cstdint>
#include <string>

#include "common/status.h"

namespace dpsr {

// faiss::MetricType. An index file may hold other values than these two.
enum class FaissMetric : int32_t { kInnerProduct = 0, kL2 = 1 };

// Returns "inner product", "L2", or, for example, "faiss::MetricType(4)".
inline std::string FaissMetricName(FaissMetric metric) {
  switch (metric) {
    case FaissMetric::kInnerProduct:
      return "inner product";
    case FaissMetric::kL2:
      return "L2";
  }
  return StrCat("faiss::MetricType(", static_cast<int32_t>(metric), ")");
}

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_METRIC_H_
