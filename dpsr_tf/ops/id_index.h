// Looks up rows by id in constant time, in the sections id, id_index.splits and id_index.rows of a packed file
// (item_table.h).
#ifndef DPSR_DPSR_TF_OPS_ID_INDEX_H_
#define DPSR_DPSR_TF_OPS_ID_INDEX_H_

#include <cstdint>

#include "dpsr_tf/ops/columns.h"
#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// Immutable after Open, so thread-safe. The file must outlive it.
class IdIndex {
 public:
  // Reads and checks all sections. DataLoss for sections that are damaged or do not fit `rows` rows.
  Status Open(const SectionReader& reader, int64_t rows);

  Span<const int64_t> ids() const { return ids_; }
  // Returns the row of an id, -1 if there is none.
  int32_t Find(int64_t id) const;

 private:
  uint64_t Bucket(int64_t id) const;

  Span<const int64_t> ids_;
  Span<const int32_t> bucket_splits_, bucket_rows_;
  int bucket_bits_ = 0;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_ID_INDEX_H_
