// Internal to export/faiss_binding/. Restricts a FAISS search to some positions.
#ifndef DPSR_EXPORT_FAISS_BINDING_POSITION_SELECTOR_H_
#define DPSR_EXPORT_FAISS_BINDING_POSITION_SELECTOR_H_

#include <cstdint>

#include "common/span.h"
#include "export/faiss_binding/faiss_layout.h"

namespace dpsr {

// FAISS asks it, for one position after another, whether the position may be a result. Position i is allowed when bit
// i % 64 of word i / 64 is set.
class PositionSelector : public faiss::IDSelector {
 public:
  explicit PositionSelector(Span<const uint64_t> allowed) : allowed_(allowed) {}
  bool is_member(int64_t id) const override {
    return static_cast<uint64_t>(id) / 64 < allowed_.size() && (allowed_[id / 64] >> (id % 64) & 1) != 0;
  }

 private:
  const Span<const uint64_t> allowed_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_POSITION_SELECTOR_H_
