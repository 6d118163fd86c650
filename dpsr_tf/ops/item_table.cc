#include "dpsr_tf/ops/item_table.h"

#include <limits>
#include <utility>

#include "dpsr_tf/ops/permutation.h"

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
  // A negative id is a row of no embedding table.
  DPSR_RETURN_IF_ERROR(reader.CheckRows("tokens.values", t->text_.values, int64_t{1} << 31, "tokens"));
  DPSR_RETURN_IF_ERROR(reader.Features(features, t->rows(), "item", &t->features_));
  if (with_ids) DPSR_RETURN_IF_ERROR(t->OpenIndex(reader));
  *table = std::move(t);
  return Status();
}

Status ItemTable::OpenIndex(const SectionReader& reader) {
  DPSR_RETURN_IF_ERROR(reader.Array("id", rows(), &ids_));
  while ((int64_t{1} << bucket_bits_) < rows()) ++bucket_bits_;
  const int64_t buckets = int64_t{1} << bucket_bits_;
  DPSR_RETURN_IF_ERROR(reader.Array("id_index.splits", buckets + 1, &bucket_splits_));
  DPSR_RETURN_IF_ERROR(reader.Array("id_index.rows", rows(), &bucket_rows_));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("id_index.rows", bucket_rows_, rows(), "items"));
  bool good = bucket_splits_[0] == 0 && bucket_splits_[buckets] == rows();
  for (int64_t b = 0; good && b < buckets; ++b) {
    const int32_t begin = bucket_splits_[b], end = bucket_splits_[b + 1];
    good = begin <= end && end <= rows();
    // Each row stands in its bucket, and once: so all of them stand somewhere.
    for (int32_t i = begin; good && i < end; ++i) {
      good = Bucket(ids_[bucket_rows_[i]]) == static_cast<uint64_t>(b) &&
             (i == begin || bucket_rows_[i] > bucket_rows_[i - 1]);
    }
    if (!good) {
      return MakeStatus(StatusCode::kDataLoss, file_->path(), ": section id_index.splits row ", b,
                        " (", begin, " to ", end, ") is not the bucket of its ids; ingest the log again");
    }
  }
  if (!good) {
    return MakeStatus(StatusCode::kDataLoss, file_->path(), ": section id_index.splits does not span its ", rows(),
                      " values; ingest the log again");
  }
  return Status();
}

uint64_t ItemTable::Bucket(int64_t id) const {
  return bucket_bits_ == 0 ? 0 : Mix64(static_cast<uint64_t>(id)) >> (64 - bucket_bits_);
}

int32_t ItemTable::Find(int64_t id) const {
  const uint64_t bucket = Bucket(id);
  for (int32_t i = bucket_splits_[bucket]; i < bucket_splits_[bucket + 1]; ++i) {
    if (ids_[bucket_rows_[i]] == id) return bucket_rows_[i];
  }
  return -1;
}

}  // namespace dpsr
