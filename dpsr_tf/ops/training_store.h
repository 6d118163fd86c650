// The three files of a store (DPSR section 5.1.2) as the trainer sees them: user features, item features, and the
// interactions that refer to both by row. Nothing is copied: the files stay memory-mapped.
//
// users.dpsr (kind "users")
//   id               int64 [users]
//   feature.<name>   int32 [users]            one section a profile feature, codes from 0
// items.dpsr (kind "items")
//   id               int64 [items]
//   tokens.splits    int64 [items + 1]        row splits of
//   tokens.values    int32 [tokens]           the token ids of the item's text
// interactions.dpsr (kind "interactions")
//   query.splits     int64 [queries + 1]      row splits of
//   query.tokens     int32 [tokens]           the token ids of each distinct query text
//   positive.splits  int64 [queries + 1]      rows of each query: positives are sorted by (query, item)
//   positive.query   int32 [positives]
//   positive.user    int32 [positives]
//   positive.item    int32 [positives]
//   positive.weight  float32 [positives]
//   negative.splits  int64 [queries + 1]      supervised negatives (section 4.5) of each query
//   negative.item    int32 [negatives]
#ifndef DPSR_DPSR_TF_OPS_TRAINING_STORE_H_
#define DPSR_DPSR_TF_OPS_TRAINING_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tokenizer_cc/packed_file.h"
#include "tokenizer_cc/status.h"

namespace dpsr {

// Rows of variable length: row i is values[splits[i]] up to values[splits[i + 1]].
struct RaggedColumn {
  Span<const int64_t> splits;
  Span<const int32_t> values;

  int64_t rows() const { return static_cast<int64_t>(splits.size()) - 1; }
  int64_t length(int64_t row) const { return splits[row + 1] - splits[row]; }
  Span<const int32_t> operator[](int64_t row) const { return {values.data() + splits[row], size_t(length(row))}; }
};

// Immutable after Open, so thread-safe.
class TrainingStore {
 public:
  struct Paths {
    std::string users, items, interactions;
  };

  // `user_features` names the profile features to read. Errors: those of PackedFile::Open; DataLoss when the files do
  // not fit together (a row that refers beyond a table, splits that do not rise); NotFound for an unknown feature;
  // FailedPrecondition when there is no positive interaction or no item.
  static Status Open(const Paths& paths, const std::vector<std::string>& user_features,
                     std::unique_ptr<TrainingStore>* store);

  int64_t num_users() const { return static_cast<int64_t>(user_ids_.size()); }
  int64_t num_items() const { return item_tokens_.rows(); }
  int64_t num_queries() const { return query_tokens_.rows(); }
  int64_t num_positives() const { return static_cast<int64_t>(positive_query_.size()); }

  const RaggedColumn& item_tokens() const { return item_tokens_; }
  const RaggedColumn& query_tokens() const { return query_tokens_; }
  // Items of the positives of each query, ascending; an item clicked twice stands twice.
  const RaggedColumn& clicked_items() const { return positives_; }
  const RaggedColumn& negative_items() const { return negatives_; }
  Span<const int32_t> positive_query() const { return positive_query_; }
  Span<const int32_t> positive_user() const { return positive_user_; }
  Span<const int32_t> positive_item() const { return positives_.values; }
  Span<const float> positive_weight() const { return positive_weight_; }
  // One span a requested feature, indexed by user row.
  const std::vector<Span<const int32_t>>& user_features() const { return user_features_; }

 private:
  TrainingStore() = default;

  std::unique_ptr<PackedFile> users_, items_, interactions_;
  Span<const int64_t> user_ids_;
  std::vector<Span<const int32_t>> user_features_;
  RaggedColumn item_tokens_, query_tokens_, positives_, negatives_;
  Span<const int32_t> positive_query_, positive_user_;
  Span<const float> positive_weight_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_TRAINING_STORE_H_
