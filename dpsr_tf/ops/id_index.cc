#include "dpsr_tf/ops/id_index.h"

#include "dpsr_tf/ops/permutation.h"

namespace dpsr {

Status IdIndex::Open(const SectionReader& reader, int64_t rows) {
  DPSR_RETURN_IF_ERROR(reader.Array("id", rows, &ids_));
  while ((int64_t{1} << bucket_bits_) < rows) ++bucket_bits_;
  const int64_t buckets = int64_t{1} << bucket_bits_;
  DPSR_RETURN_IF_ERROR(reader.Array("id_index.splits", buckets + 1, &bucket_splits_));
  DPSR_RETURN_IF_ERROR(reader.Array("id_index.rows", rows, &bucket_rows_));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("id_index.rows", bucket_rows_, rows, "items"));
  bool good = bucket_splits_[0] == 0 && bucket_splits_[buckets] == rows;
  for (int64_t b = 0; good && b < buckets; ++b) {
    const int32_t begin = bucket_splits_[b], end = bucket_splits_[b + 1];
    good = begin <= end && end <= rows;
    // Each entry is in its own bucket and none repeats, so every row has an entry.
    for (int32_t i = begin; good && i < end; ++i) {
      good = Bucket(ids_[bucket_rows_[i]]) == static_cast<uint64_t>(b) &&
             (i == begin || bucket_rows_[i] > bucket_rows_[i - 1]);
    }
    if (!good) {
      return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section id_index.splits row ", b,
                        " (", begin, " to ", end, ") is not the bucket of its ids; ingest the log again");
    }
  }
  if (!good) {
    return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section id_index.splits does not span its ", rows,
                      " values; ingest the log again");
  }
  return Status();
}

uint64_t IdIndex::Bucket(int64_t id) const {
  return bucket_bits_ == 0 ? 0 : Mix64(static_cast<uint64_t>(id)) >> (64 - bucket_bits_);
}

int32_t IdIndex::Find(int64_t id) const {
  const uint64_t bucket = Bucket(id);
  for (int32_t i = bucket_splits_[bucket]; i < bucket_splits_[bucket + 1]; ++i) {
    if (ids_[bucket_rows_[i]] == id) return bucket_rows_[i];
  }
  return -1;
}

}  // namespace dpsr
