// Attributes of items that have changed since their index was built, and those of items that were added. Readers share
// them without locks: they are immutable, and a change copies only the page that it is in.
#ifndef DPSR_EXPORT_FAISS_SEARCH_CHANGED_ATTRIBUTES_H_
#define DPSR_EXPORT_FAISS_SEARCH_CHANGED_ATTRIBUTES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dpsr {

// The values that a change gives to one attribute. None of them means that the value is missing.
struct AttributeValue {
  std::string name;
  std::vector<double> numbers;
  // Texts, or a number as decimal text. Only a multi-valued attribute takes more than the first one.
  std::vector<std::string> texts;
};

// The values of one attribute for kPageSlots slots in a row, in the widest type. One vector of values is filled.
struct AttributePage {
  static constexpr int64_t kPageSlots = 1024;  // a multiple of 64

  std::vector<double> numbers;  // [slots], NaN if missing
  std::vector<int32_t> codes;   // [slots], 0 if missing; or all values of a multi-valued attribute
  std::vector<int64_t> splits;  // [slots + 1], only for a multi-valued attribute
};

// One attribute. Slots are those of the index (item_filter.h), or the rows of a segment of added items.
struct ChangedColumn {
  // [pages]; a page that is null has the values of the attributes file.
  std::vector<std::shared_ptr<const AttributePage>> pages;
  // Slots of the index that were changed, in any order, with repetitions; null when they are many.
  std::shared_ptr<const std::vector<int32_t>> slots;
  bool many_slots = false;
  uint64_t generation = 0;  // of the last change; 0 when there is none
  // The slots that the last batches of changes have changed, the newest last: all since `recent_since`. With them, a
  // cached mask is brought up to date.
  struct Batch {
    uint64_t generation;
    std::shared_ptr<const std::vector<int32_t>> slots;
  };
  std::vector<Batch> recent;
  uint64_t recent_since = 0;

  const AttributePage* Page(int64_t slot) const {
    return pages.empty() ? nullptr : pages[slot / AttributePage::kPageSlots].get();
  }
};

// As many columns as the attributes file has, in its order.
using ChangedAttributes = std::vector<ChangedColumn>;

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_CHANGED_ATTRIBUTES_H_
