#include "dpsr_tf/ops/training_store.h"

#include <limits>

namespace dpsr {
namespace {

Status ReadRagged(const PackedFile& file, const std::string& splits_name, const std::string& values_name,
                  RaggedColumn* column) {
  DPSR_RETURN_IF_ERROR(file.Get(splits_name, &column->splits));
  DPSR_RETURN_IF_ERROR(file.Get(values_name, &column->values));
  const Span<const int64_t>& splits = column->splits;
  if (splits.empty() || splits[0] != 0 || splits[splits.size() - 1] != static_cast<int64_t>(column->values.size())) {
    return MakeStatus(StatusCode::kDataLoss, file.path(), ": section ", splits_name, " does not span the ",
                      column->values.size(), " values of ", values_name, "; ingest the log again");
  }
  for (size_t i = 1; i < splits.size(); ++i) {
    if (splits[i] < splits[i - 1]) {
      return MakeStatus(StatusCode::kDataLoss, file.path(), ": section ", splits_name, " falls from ", splits[i - 1],
                        " to ", splits[i], " at row ", i, "; ingest the log again");
    }
  }
  return Status();
}

Status CheckRows(const PackedFile& file, const char* name, Span<const int32_t> rows, int64_t table_size,
                 const char* table) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || rows[i] >= table_size) {
      return MakeStatus(StatusCode::kDataLoss, file.path(), ": section ", name, " row ", i, " refers to row ", rows[i],
                        " of ", table_size, " ", table, "; the files of one store belong together, ingest the log again");
    }
  }
  return Status();
}

// The rows of query q, as the splits say, have to be of query q and in the order of their items: the mask of clicked
// items is looked up in them.
Status CheckPositives(const PackedFile& file, const RaggedColumn& items, Span<const int32_t> query) {
  for (int64_t q = 0; q < items.rows(); ++q) {
    for (int64_t row = items.splits[q]; row < items.splits[q + 1]; ++row) {
      if (query[row] != q || (row > items.splits[q] && items.values[row] < items.values[row - 1])) {
        return MakeStatus(StatusCode::kDataLoss, file.path(), ": section positive.query row ", row, " is query ",
                          query[row], " item ", items.values[row], ", expected query ", q,
                          " and items in ascending order; ingest the log again");
      }
    }
  }
  return Status();
}

Status CheckLength(const PackedFile& file, const char* name, size_t got, size_t expected) {
  if (got == expected) return Status();
  return MakeStatus(StatusCode::kDataLoss, file.path(), ": section ", name, " has ", got, " rows, expected ", expected,
                    "; ingest the log again");
}

}  // namespace

Status TrainingStore::Open(const Paths& paths, const std::vector<std::string>& user_features,
                           std::unique_ptr<TrainingStore>* store) {
  std::unique_ptr<TrainingStore> s(new TrainingStore);
  DPSR_RETURN_IF_ERROR(PackedFile::Open(paths.users, "users", /*verify=*/true, &s->users_));
  DPSR_RETURN_IF_ERROR(PackedFile::Open(paths.items, "items", /*verify=*/true, &s->items_));
  DPSR_RETURN_IF_ERROR(PackedFile::Open(paths.interactions, "interactions", /*verify=*/true, &s->interactions_));

  DPSR_RETURN_IF_ERROR(s->users_->Get("id", &s->user_ids_));
  for (const std::string& name : user_features) {
    if (s->users_->Find("feature." + name) == nullptr) {
      return MakeStatus(StatusCode::kNotFound, paths.users, ": no user feature '", name,
                        "'; name it in the schema's users.features and ingest again, or drop it from the config");
    }
    Span<const int32_t> codes;
    DPSR_RETURN_IF_ERROR(s->users_->Get("feature." + name, &codes));
    DPSR_RETURN_IF_ERROR(CheckLength(*s->users_, name.c_str(), codes.size(), s->user_ids_.size()));
    s->user_features_.push_back(codes);
  }

  DPSR_RETURN_IF_ERROR(ReadRagged(*s->items_, "tokens.splits", "tokens.values", &s->item_tokens_));

  const PackedFile& log = *s->interactions_;
  DPSR_RETURN_IF_ERROR(ReadRagged(log, "query.splits", "query.tokens", &s->query_tokens_));
  DPSR_RETURN_IF_ERROR(ReadRagged(log, "positive.splits", "positive.item", &s->positives_));
  DPSR_RETURN_IF_ERROR(ReadRagged(log, "negative.splits", "negative.item", &s->negatives_));
  DPSR_RETURN_IF_ERROR(log.Get("positive.query", &s->positive_query_));
  DPSR_RETURN_IF_ERROR(log.Get("positive.user", &s->positive_user_));
  DPSR_RETURN_IF_ERROR(log.Get("positive.weight", &s->positive_weight_));

  const size_t positives = s->positives_.values.size();
  const size_t query_rows = s->query_tokens_.splits.size();
  DPSR_RETURN_IF_ERROR(CheckLength(log, "positive.splits", s->positives_.splits.size(), query_rows));
  DPSR_RETURN_IF_ERROR(CheckLength(log, "negative.splits", s->negatives_.splits.size(), query_rows));
  DPSR_RETURN_IF_ERROR(CheckLength(log, "positive.query", s->positive_query_.size(), positives));
  DPSR_RETURN_IF_ERROR(CheckLength(log, "positive.user", s->positive_user_.size(), positives));
  DPSR_RETURN_IF_ERROR(CheckLength(log, "positive.weight", s->positive_weight_.size(), positives));
  DPSR_RETURN_IF_ERROR(CheckRows(log, "positive.query", s->positive_query_, s->num_queries(), "queries"));
  DPSR_RETURN_IF_ERROR(CheckRows(log, "positive.user", s->positive_user_, s->num_users(), "users"));
  DPSR_RETURN_IF_ERROR(CheckRows(log, "positive.item", s->positives_.values, s->num_items(), "items"));
  DPSR_RETURN_IF_ERROR(CheckRows(log, "negative.item", s->negatives_.values, s->num_items(), "items"));
  DPSR_RETURN_IF_ERROR(CheckPositives(log, s->positives_, s->positive_query_));
  if (positives == 0 || s->num_items() == 0) {
    return MakeStatus(StatusCode::kFailedPrecondition, paths.interactions, ": ", positives, " positive interactions and ",
                      s->num_items(), " items; training needs at least one of each");
  }
  if (s->num_items() > std::numeric_limits<int32_t>::max()) {
    return MakeStatus(StatusCode::kFailedPrecondition, paths.items, ": ", s->num_items(),
                      " items, at most 2147483647 fit one store; split the corpus");
  }
  *store = std::move(s);
  return Status();
}

}  // namespace dpsr
