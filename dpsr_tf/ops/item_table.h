// The items of a store, by row or by id. Training reads the items of batches and histories; serving reads histories
// that a caller sends as item ids.
//
// items.dpsr (kind "items"), rows in ascending order of id
//   id               int64 [items]
//   id_index.splits  int32 [2^k + 1], 2^k the smallest power of two >= items
//   id_index.rows    int32 [items]            rows with Mix64(id) >> (64 - k) == bucket, ascending
//   tokens.splits    int64 [items + 1]        row splits of
//   tokens.values    int32 [tokens]           the token ids of the item's text
//   feature.<name>   uint8 or int32 [items]   codes from 0; or for lists
//   feature.<name>.splits int64 [items + 1], feature.<name>.values int32, or float for vectors
#ifndef DPSR_DPSR_TF_OPS_ITEM_TABLE_H_
#define DPSR_DPSR_TF_OPS_ITEM_TABLE_H_

#include <cstdint>
#include <memory>

#include "dpsr_tf/ops/columns.h"
#include "dpsr_tf/ops/id_index.h"
#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// Immutable after Open, so thread-safe.
class ItemTable {
 public:
  // `with_ids` reads the sections that Find needs. Errors: DataLoss for sections that are damaged or do not fit
  // together, NotFound for a feature that the file does not have, FailedPrecondition for more than 2^31 - 1 items.
  static Status Open(std::unique_ptr<PackedFile> file, const FeatureNames& features, bool with_ids,
                     std::unique_ptr<ItemTable>* table);

  const PackedFile& file() const { return *file_; }
  int64_t rows() const { return text_.rows(); }
  const RaggedColumn& text() const { return text_; }
  const FeatureColumns& features() const { return features_; }
  // Returns the row of an id, -1 if there is none, in constant time. Needs `with_ids`.
  int32_t Find(int64_t id) const { return index_.Find(id); }

 private:
  ItemTable() = default;

  std::unique_ptr<PackedFile> file_;
  RaggedColumn text_;
  FeatureColumns features_;
  IdIndex index_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_ITEM_TABLE_H_
