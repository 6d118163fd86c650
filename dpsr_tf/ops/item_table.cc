#include "dpsr_tf/ops/item_table.h"

#include <limits>
#include <utility>

namespace dpsr {

Status ItemTable::Open(std::unique_ptr<PackedFile> file, const FeatureNames& features, bool with_ids,
                       std::unique_ptr<ItemTable>* table) {
  std::unique_ptr<ItemTable> t(new ItemTable);
  t->file_ = std::move(file);
  const SectionReader reader(*t->file_);
  DPSR_RETURN_IF_ERROR(reader.Ragged("tokens.splits", "tokens.values", SectionReader::kAnyLength, &t->text_));
  if (t->rows() > std::numeric_limits<int32_t>::max()) {
    return MakeStatus(StatusCode::kFailedPrecondition, t->file_->path(), ": ", t->rows(),
                      " items, at most 2147483647 fit one store; split the corpus");
  }
  // No embedding table has a row for a negative id.
  DPSR_RETURN_IF_ERROR(reader.CheckRows("tokens.values", t->text_.values, int64_t{1} << 31, "tokens"));
  DPSR_RETURN_IF_ERROR(reader.Features(features, t->rows(), "item", &t->features_));
  if (with_ids) DPSR_RETURN_IF_ERROR(t->index_.Open(reader, t->rows()));
  *table = std::move(t);
  return Status();
}

}  // namespace dpsr
